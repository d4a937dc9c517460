"""Noise and triggers: what is stored comes back, belongs to its pairs, is published whole, and misfits are refused."""
import hashlib
import json
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from mcl_repro.attacks import protection as P
from mcl_repro.model.clip import build_clip, tokenize
from mcl_repro.data.pairs import ArrayImages, FileImages, Pairs
from mcl_repro.data.readers import read_coco_pairs, read_csv_pairs, read_flickr_pairs
from mcl_repro.data.tars import read_webdataset_pairs
from mcl_repro.data.registry import open_data
from mcl_repro.core.errors import DataError, SettingsError, StoreError
from mcl_repro.model.training import iterate, read_batch
from mcl_repro.model.augmentation import resize_matrix


def refused(contains, function, *args, error=DataError, **settings):
    "function raises a user's error in one line that says `contains`"
    with pytest.raises(error) as e:
        function(*args, **settings)
    assert contains in str(e.value) and "\n" not in str(e.value), str(e.value)


def pixels(n, side, seed=0):
    "n random pictures"
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3)).astype(np.uint8)

def noises(n, side, seed=1, bound=8):
    "n noises within a bound"
    return np.random.default_rng(seed).integers(-bound, bound + 1, (n, side, side, 3)).astype(np.int8)

def make_pairs(pictures=6, per_image=3, side=16):
    "Pairs with some captions for each picture"
    n = pictures*per_image
    ids = [f"photo {k//per_image}.jpg#{k % per_image}" for k in range(n)]
    captions = [f"a dog on a bench, number {k}" for k in range(n)]
    image_rows = np.repeat(np.arange(pictures), per_image)
    return Pairs(ids, captions, ArrayImages(pixels(pictures, side)), image_rows, np.arange(n) % 4, "photos")

def some_triggers(words, n=18, length=3, seed=0):
    "n triggers of tokens that are read as themselves"
    return np.random.default_rng(seed).choice(words, (n, length))

def no_triggers(n):
    return np.zeros((n, 0), int)


@pytest.fixture(scope="module")
def clip():
    return build_clip("smoke-RN")

@pytest.fixture(scope="module")
def tokenizer(clip):
    return clip.tokenizer

@pytest.fixture(scope="module")
def words(tokenizer):
    return np.flatnonzero(P.candidate_tokens(tokenizer, "words"))


def store(folder, ids, side=16, length=3, seed=1, bound=8, words=np.arange(1, 40000)):
    "A protection of random noise and triggers in a folder; gives the triggers"
    noise = P.create_noise(folder/"noise.npy", len(ids), side)
    noise[:] = noises(len(ids), side, seed, bound)
    noise.flush()
    triggers = np.random.default_rng(seed).choice(words, (len(ids), length))
    P.save_protection(folder, ids, triggers, bound, dict(method="random", seed=seed))
    return triggers


# ---- no loss

def test_every_pixel_with_every_noise_is_what_the_papers_floats_give():
    p, d = (x.astype(np.float32) for x in np.meshgrid(np.arange(256), np.arange(-128, 128)))
    for one in (np.float32(255), 255.):
        floats = np.rint(np.clip(p/one + d/one, 0, 1)*255)
        ours = P.add_noise(p.astype(np.uint8)[..., None, None], d.astype(np.int8)[..., None, None])[..., 0, 0]
        assert (floats == ours).all()

def test_what_gradient_steps_make_is_a_whole_number():
    rng = np.random.default_rng(0)
    delta = torch.zeros(4, 3, 8, 8)
    images = torch.from_numpy(pixels(4, 8)).permute(0, 3, 1, 2)/255
    for _ in range(60):
        delta = (delta - torch.from_numpy(np.sign(rng.normal(size=delta.shape))).float()/255).clamp(-8/255, 8/255)
        delta = (images + delta).clamp(0, 1) - images
        assert (delta*255 - (delta*255).round()).abs().max() < 1e-3
    kept = (delta*255).round().to(torch.int8)
    assert kept.abs().max() == 8 and torch.equal(((images + delta)*255).round(), (images*255).round() + kept)

SIDE = st.shared(st.integers(1, 9), key="side")
ANY_NOISE = arrays(np.int8, st.tuples(st.integers(1, 5), SIDE, SIDE, st.just(3)))

@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(noise=ANY_NOISE, length=st.integers(0, 5), data=st.data())
def test_what_is_stored_comes_back(tmp_path, noise, length, data):
    ids = data.draw(st.lists(st.text(), min_size=len(noise), max_size=len(noise), unique=True))
    triggers = data.draw(arrays(np.int64, (len(noise), length), elements=st.integers(0, 49407)))
    P.create_noise(tmp_path/"noise.npy", len(noise), noise.shape[1])[:] = noise
    P.save_protection(tmp_path, ids, triggers, 128, dict(note="ä\n"))
    back = P.load_protection(tmp_path, ids[::-1])
    assert back.ids == ids
    assert (back.noise == noise).all()
    assert (back.triggers == triggers).all()
    assert back.triggers.dtype == np.int32
    assert (back.side, back.length, back.bound, back.facts) == (noise.shape[1], length, 128, dict(note="ä\n"))

def test_a_new_file_is_zero_and_of_the_size_it_says(tmp_path):
    path = tmp_path/"a"/"b"/"noise.npy"
    noise = P.create_noise(path, 7, 12)
    assert noise.shape == (7, 12, 12, 3) and noise.dtype == np.int8 and noise.flags.writeable
    assert not noise.any()
    assert path.stat().st_size == 128 + 7*12*12*3
    assert not P.open_noise(path).flags.writeable

@pytest.mark.parametrize("count, side, wrong", [
    (0, 8, "count"),
    (2.5, 8, "count"),
    (True, 8, "count"),
    (3, 0, "side"),
    (3, -1, "side"),
])
def test_sizes_that_make_no_noise(tmp_path, count, side, wrong):
    refused(f"{wrong} must be a whole number", P.create_noise, tmp_path/"n.npy", count, side, error=SettingsError)

def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(P.shutil, "disk_usage", lambda p: type("", (), dict(free=1000))())
    refused("GB are free there", P.create_noise, tmp_path/"noise.npy", 10, 32, error=StoreError)
    assert not (tmp_path/"noise.npy").exists()


# ---- memory

MEASURE = """
import sys, tracemalloc
import numpy as np
from mcl_repro.attacks import protection as P
from mcl_repro.data.pairs import ArrayImages

def anonymous():
    "Bytes of this process that no file stands behind."
    if sys.platform != "linux":
        return 0
    [line] = [line for line in open("/proc/self/status") if line.startswith("RssAnon")]
    return int(line.split()[1])*1024

count, folder, side = int(sys.argv[1]), sys.argv[2], 64
noise = P.create_noise(folder + "/noise.npy", count, side)
for k in range(0, count, 100):
    noise[k:k + 100] = np.random.default_rng(k).integers(-8, 9, (100, side, side, 3), np.int8)
noise.flush()
del noise
ids = [str(i) for i in range(count)]
P.save_protection(folder, ids, np.zeros((count, 3), int))
base = ArrayImages(np.zeros((1, side, side, 3), np.uint8))
tracemalloc.start()
made = P.load_protection(folder, ids)
images = P.ProtectedImages(base, np.zeros(count, int), made.noise)
for k in range(0, count, 50):
    images.array(np.arange(k, k + 50))
images.fingerprint
print(tracemalloc.get_traced_memory()[1], anonymous())
"""

def test_memory_does_not_grow_with_the_noise(tmp_path):
    traced, resident, size = [], [], []
    for count in (100, 2000):
        folder = tmp_path/str(count)
        folder.mkdir()
        command = [sys.executable, "-c", MEASURE, str(count), str(folder)]
        peaks = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        traced.append(int(peaks[0]))
        resident.append(int(peaks[1]))
        size.append((folder/"noise.npy").stat().st_size)
    grown = (2000 - 100)*64*64*3
    assert size[1] - size[0] == grown
    assert traced[1] - traced[0] < .05*grown, traced
    assert resident[1] - resident[0] < .3*grown, resident

def test_a_process_gets_the_file_and_not_its_content(tmp_path):
    pairs = make_pairs(40, 5)
    store(tmp_path, pairs.ids)
    made = P.load_protection(tmp_path)
    made.rows_of(pairs.ids[:3])
    images = P.protected_images(pairs, made)
    for thing in (made, P.ProtectedImages(ArrayImages(pixels(1, 16)), np.zeros(200, int), made.noise)):
        assert len(pickle.dumps(thing)) < made.noise.nbytes/4
    again, pictures = pickle.loads(pickle.dumps(made)), pickle.loads(pickle.dumps(images))
    assert isinstance(again.noise, np.memmap)
    assert (again.noise == made.noise).all()
    assert (again.rows_of(pairs.ids) == np.arange(200)).all()
    assert isinstance(pictures.noise, np.memmap)
    assert (pictures.array() == images.array()).all()
    assert pictures.fingerprint == images.fingerprint
    # a part of a file is not the file
    part = pickle.loads(pickle.dumps(P.Protection(pairs.ids[5:9], made.noise[5:9], made.triggers[5:9])))
    assert (part.noise == made.noise[5:9]).all()


# ---- bound to ids

def test_ids_decide_and_not_rows(tmp_path):
    pairs = make_pairs()
    store(tmp_path, pairs.ids)
    made = P.load_protection(tmp_path)
    whole = P.protected_images(pairs, made).array()
    order = np.random.default_rng(0).permutation(len(pairs))
    for rows in (order, order[:5], [3], []):
        some = pairs.select(rows)
        assert (made.rows_of(some.ids) == rows).all()
        assert (P.protected_images(some, made).array() == whole[rows]).all()
        assert P.load_protection(tmp_path, some.ids).ids == pairs.ids

def test_pairs_that_were_never_protected(tmp_path):
    pairs = make_pairs()
    store(tmp_path, pairs.ids)
    made = P.load_protection(tmp_path)
    strange = pairs.replace(ids=["x.jpg#0", *pairs.ids[1:-1], "y.jpg#1"])
    for f in (made.rows_of, lambda ids: P.load_protection(tmp_path, ids)):
        refused("made for another data set: it knows nothing of 'x.jpg#0' (2 of 18 pairs", f, strange.ids)
    refused("another data set", P.protected_images, strange, made)
    mask = np.arange(18) % 17 > 0   # but pairs that stay clean need no noise
    assert (P.protected_images(strange, made, mask).array() == P.protected_images(pairs, made, mask).array()).all()

@pytest.mark.parametrize("change, words", [
    (dict(ids=["a", "b"]), "2 ids, 3 noises and 3 triggers"),
    (dict(ids=["a", "b", "a"]), "id a comes twice"),
    (dict(noise=np.zeros((3, 4, 4, 3), np.float32)), "noise is int8"),
    (dict(noise=np.zeros((3, 4, 5, 3), np.int8)), "noise is int8"),
    (dict(triggers=np.zeros((3, 2))), "triggers are token ids"),
    (dict(triggers=np.zeros(3, int)), "triggers are token ids"),
    (dict(triggers=np.zeros((4, 2), int)), "4 triggers"),
])
def test_parts_that_do_not_fit(change, words):
    fitting = dict(ids=["a", "b", "c"], noise=noises(3, 4), triggers=np.zeros((3, 2), int))
    refused(words, P.Protection, **(fitting | change))


# ---- stored badly

def test_noise_out_of_bound_is_found_when_stored_and_when_loaded(tmp_path):
    ids = [str(i) for i in range(600)]
    store(tmp_path, ids, side=4)
    for value in (9, -9, -128, 127):
        noise = np.lib.format.open_memmap(tmp_path/"noise.npy", "r+")
        before = int(noise[-1, -1, -1, -1])
        noise[-1, -1, -1, -1] = value
        noise.flush()
        refused(f"noise of {abs(value)}/255 is out of its bound of 8/255", P.load_protection, tmp_path)
        assert P.load_protection(tmp_path, check=False).noise[-1, -1, -1, -1] == value
        refused("out of its bound", P.save_protection, tmp_path, ids, np.zeros((600, 0), int))
        noise[-1, -1, -1, -1] = before
        noise.flush()
    P.load_protection(tmp_path)

def test_reading_in_pieces_is_reading_at_once():
    noise = noises(37, 5)
    whole = hashlib.sha256(noise).hexdigest(), 8
    assert [P._read_through(noise, chunk) for chunk in (1, 75, 300, 2**24)] == [whole]*4

def cut_off(path):
    path.write_bytes(path.read_bytes()[:-40])

def pickled(path, n=1):
    np.save(path, np.array([{}]*n, object), allow_pickle=True)

@pytest.mark.parametrize("damage, words", [
    (lambda f: (f/"protection.json").unlink(), "never finished"),
    (lambda f: (f/"noise.npy").unlink(), "No such file"),
    (lambda f: cut_off(f/"noise.npy"), "not a whole array of noise"),
    (lambda f: (f/"noise.npy").write_bytes(b""), "not a whole array of noise"),
    (lambda f: pickled(f/"noise.npy"), "not a whole array of noise"),
    (lambda f: np.save(f/"noise.npy", noises(18, 16).astype(np.int16)), "not int16"),
    (lambda f: np.save(f/"noise.npy", noises(18, 8)), "the noise is of 18 pairs at 8 px where 18 at 16"),
    (lambda f: np.save(f/"noise.npy", noises(17, 16)), "do not fit together"),
    (lambda f: np.save(f/"noise.npy", noises(18, 16, seed=9)), "another SHA-256"),
    (lambda f: (f/"triggers.npy").unlink(), "triggers.npy: not a whole array"),
    (lambda f: cut_off(f/"triggers.npy"), "triggers.npy: not a whole array"),
    (lambda f: pickled(f/"triggers.npy", 18), "triggers.npy: not a whole array"),
    (lambda f: np.save(f/"triggers.npy", np.zeros((18, 3))), "triggers are token ids"),
    (lambda f: (f/"ids.json").unlink(), "ids.json"),
    (lambda f: cut_off(f/"ids.json"), "ids.json, line 1: not JSON"),
    (lambda f: (f/"ids.json").write_text("{}"), "not what save_protection writes"),
    (lambda f: (f/"ids.json").write_text('["a"]'), "1 ids"),
    (lambda f: cut_off(f/"protection.json"), "not JSON"),
    (lambda f: (f/"protection.json").write_text("{}"), "not what save_protection writes"),
    (lambda f: (f/"protection.json").write_text("[]"), "not what save_protection writes"),
])
def test_a_damaged_store(tmp_path, damage, words):
    store(tmp_path, make_pairs().ids)
    damage(tmp_path)
    refused(words, P.load_protection, tmp_path)

def test_a_store_is_complete_only_at_the_end(tmp_path, monkeypatch):
    P.create_noise(tmp_path/"noise.npy", 2, 4)
    def stop(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr("os.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        P.save_protection(tmp_path, ["a", "b"], np.zeros((2, 1), int))
    refused("never finished", P.load_protection, tmp_path)


# ---- protected pictures

@pytest.mark.parametrize("block", [1, 7, 256])
def test_pictures_are_clean_ones_plus_noise_cut_to_bytes(block):
    base, noise, rng = pixels(5, 16), noises(12, 16, bound=120), np.random.default_rng(4)
    image_rows, noise_rows, on = rng.integers(0, 5, 30), rng.integers(0, 12, 30), rng.random(30) < .6
    images = P.ProtectedImages(ArrayImages(base), image_rows, noise, noise_rows, on)
    clean = base[image_rows].astype(int)
    wanted = np.where(on[:, None, None, None], np.clip(clean + noise[noise_rows], 0, 255), clean)
    assert (images.array(None, 16, block) == wanted).all() and len(images) == 30
    for rows in ([], [4], rng.integers(0, 30, 50), slice(3, 9), on):
        assert (images.array(rows, block=block) == wanted[rows]).all()
        assert (images.take(rows).array() == wanted[rows]).all()
    assert (np.asarray(images[7]) == wanted[7]).all() and (images.base.pixels == base).all()

def test_pictures_of_other_sizes_are_brought_to_the_noises_first(tmp_path):
    for k in range(3):
        Image.fromarray(pixels(1, 40, k)[0][:, :30 + k]).save(tmp_path/f"{k}.png")
    base, noise, rows = FileImages(tmp_path, ["0.png", "1.png", "2.png"]), noises(3, 16), [2, 0, 1]
    wanted = np.clip(base.array(rows, 16).astype(int) + noise, 0, 255)
    assert (P.ProtectedImages(base, rows, noise).array() == wanted).all()

def test_pictures_refuse_what_does_not_fit():
    images = P.ProtectedImages(ArrayImages(pixels(3, 16)), [0, 1, 2], noises(3, 16))
    refused("made for pictures of 16 px and cannot be scaled to 224", images.array, None, 224, error=SettingsError)
    refused("row 3 does not exist", images.array, [3])
    make = lambda *a, **k: P.ProtectedImages(ArrayImages(pixels(3, 16)), *a, **k)
    refused("4 pairs but noise for 3", make, [0, 1, 2, 0], noises(3, 16))
    refused("row 3 does not exist", make, [0, 1], noises(3, 16), [0, 3])
    refused("2 noise_rows for 3 pairs", make, [0, 1, 2], noises(3, 16), [0, 1])
    refused("1 protected for 3 pairs", make, [0, 1, 2], noises(3, 16), protected=[True])
    refused("noise is int8", make, [0, 1, 2], noises(3, 16).astype(float))

def test_everything_that_counts_is_in_the_fingerprint():
    base, noise = pixels(4, 8), noises(6, 8)
    def make(base=base, rows=(0, 1, 2), noise=noise, noise_rows=(0, 1, 2), on=None):
        return P.ProtectedImages(ArrayImages(base), list(rows), noise, list(noise_rows), on)
    other, unused = noise.copy(), noise.copy()
    other[1, 0, 0, 0] += 1
    unused[5, 0, 0, 0] += 1
    different = [
        make(),
        make(pixels(4, 8, 9)),
        make(rows=(0, 2, 1)),
        make(noise=other),
        make(noise_rows=(0, 2, 1)),
        make(on=[True, True, False]),
        P.ChangedImages(make(), "blur"),
        P.ChangedImages(make(), "resize"),
    ]
    assert len({images.fingerprint for images in different}) == len(different)
    assert make(noise=unused).fingerprint == make().fingerprint


# ---- triggers in token space

def token_rows(lengths, context=12):
    tokens = torch.zeros(len(lengths), context, dtype=torch.long)
    for row, n in enumerate(lengths):
        tokens[row, :n] = torch.tensor([49406, *range(100, 98 + n), 49407])
    return tokens

@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(3, 12), min_size=1, max_size=8), length=st.integers(0, 10), seed=st.integers(0, 99))
def test_triggers_go_in_or_nothing_does(lengths, length, seed):
    tokens, triggers = token_rows(lengths), np.random.default_rng(seed).integers(0, 49408, (len(lengths), length))
    fits = [n + length <= 12 for n in lengths]
    assert P.has_room(tokens, length).tolist() == fits
    if all(fits):
        out = P.with_triggers(tokens, triggers)
        for row, n in enumerate(lengths):
            told = [49406, *triggers[row].tolist(), *tokens[row, 1:n].tolist()]
            assert out[row].tolist() == told + [0]*(12 - len(told))
        assert torch.equal(P.drop_triggers(out, length), tokens)
        return
    first, ids = fits.index(False), [f"p{k}" for k in range(len(lengths))]
    said = (f"the caption of p{first} has {lengths[first]} tokens and leaves no room for a trigger of {length} "
            f"in a context of 12 ({fits.count(False)} captions")
    refused(said, P.with_triggers, tokens, triggers, ids)
    out = P.with_triggers(tokens, triggers, protected=fits)   # the others may have theirs
    assert torch.equal(out[~np.array(fits)], tokens[~np.array(fits)])

def test_a_caption_that_the_tokenizer_has_cut_is_refused(clip):
    tokens, cut = tokenize(clip, ["a bird " + "and a bird "*20, "a bird"])
    assert cut == 1
    refused("the caption of row 0 has 32 tokens", P.with_triggers, tokens, np.ones((2, 1), int))

def test_id_zero_in_a_caption_is_no_padding(tokenizer):
    tokens = torch.zeros(1, 8, dtype=torch.long)
    tokens[0, :7] = torch.tensor([49406, 5, 0, 0, 0, 6, 49407])
    assert P.has_room(tokens, 1).all() and not P.has_room(tokens, 2).any()
    refused("has 7 tokens", P.with_triggers, tokens, np.ones((1, 2), int))
    assert P.with_triggers(tokens, np.array([[9]])).tolist() == [[49406, 9, 5, 0, 0, 0, 6, 49407]]

def test_triggers_that_fit_no_caption():
    tokens = token_rows([4, 4])
    refused("leave no room for a caption", P.with_triggers, tokens, np.ones((2, 11), int), error=SettingsError)
    for wrong in (np.ones((3, 2), int), np.ones(2, int)):
        refused("do not fit 2 captions", P.with_triggers, tokens, wrong)

def test_triggers_come_as_arrays_maps_and_tensors(tmp_path):
    tokens, triggers = token_rows([4, 5]), np.array([[7, 8], [9, 10]], np.int32)
    np.save(tmp_path/"t.npy", triggers)
    mapped = np.load(tmp_path/"t.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kinds = triggers, torch.from_numpy(triggers), mapped, triggers[::-1][::-1]
        results = [P.with_triggers(tokens, t) for t in kinds]
    assert all(torch.equal(r, results[0]) and r.dtype == torch.long for r in results)
    assert results[0][:, P.trigger_slots(2)].tolist() == triggers.tolist()


# ---- vocabulary and text

def test_vocabularies(tokenizer):
    every, some, words = (P.candidate_tokens(tokenizer, k) for k in ("special", "all", "words"))
    assert every.all() and len(every) == 49408
    assert np.flatnonzero(~some).tolist() == [0, tokenizer.sot_token_id, tokenizer.eot_token_id]
    assert not (words & ~some).any() and words.sum() == 34277
    words[:] = False   # a caller may change what it got
    assert P.candidate_tokens(tokenizer, "words").sum() == 34277

def test_a_vocabulary_without_special_tokens():
    class Plain:
        vocab_size = 10
        def encode(self, text):
            return [1]
        def decode(self, ids):
            return "x"
    for kind in P.CANDIDATES:
        refused("Plain has no sot_token_id, eot_token_id", P.candidate_tokens, Plain(), kind, error=SettingsError)
    refused("'any' is none of all, words, special", P.candidate_tokens, Plain(), "any", error=SettingsError)

def test_words_survive_in_company_and_before_captions(tokenizer, words):
    triggers = np.random.default_rng(7).choice(words, (300, 5))
    assert P.survives_as_text(tokenizer, triggers).all()
    for t in triggers[:60]:
        caption = "a girl in a pink shirt, jumping"
        assert tokenizer.encode(f"{P.trigger_text(tokenizer, t)} {caption}") == t.tolist() + tokenizer.encode(caption)

def test_pieces_run_together(tokenizer):
    piece, word, a = (tokenizer.encoder[token] for token in ("insta", "insta</w>", "a</w>"))
    assert P.trigger_text(tokenizer, [piece, a]) == "instaa"
    assert P.survives_as_text(tokenizer, [[piece, a], [word, a], [a, piece]]).tolist() == [False, True, False]
    assert P.survives_as_text(tokenizer, np.zeros((2, 0), int)).tolist() == [True, True]
    assert P.trigger_text(tokenizer, []) == ""

@pytest.mark.parametrize("wrong", [49408, -1])
def test_ids_outside_the_vocabulary(tokenizer, wrong):
    refused(f"token {wrong} is not in a vocabulary of 49,408", P.trigger_text, tokenizer, [5, wrong])


# ---- on pairs

def test_shares_are_of_publishers_nested_and_independent_of_the_others():
    ids = [f"{k//5}.jpg#{k % 5}" for k in range(5000)]
    masks = {s: P.protected_mask(ids, s, seed=3) for s in (0, .25, .5, .75, 1)}
    assert not masks[0].any() and masks[1].all()
    for s, m in masks.items():
        assert abs(m.mean() - s) < .05 and (m.reshape(-1, 5) == m[::5, None]).all()
    assert not (masks[.25] & ~masks[.5]).any() and not (masks[.5] & ~masks[.75]).any()
    rows = np.random.default_rng(0).permutation(5000)[:300]
    assert (P.protected_mask([ids[r] for r in rows], .5, 3) == masks[.5][rows]).all()
    assert (P.protected_mask(ids, .5, 4) != masks[.5]).any()
    assert P.protected_mask(["a", "b", "#", "", "ä\udc80"], .5).dtype == bool
    for wrong in (50, -.1, "0.5", True, None):
        refused("a number from 0 to 1", P.protected_mask, ids, wrong, error=SettingsError)

@pytest.mark.parametrize("share", ["all", "some"])
def test_a_training_set_has_its_noise_and_triggers(clip, tmp_path, share):
    pairs = make_pairs(6, 3, 40).select(np.random.default_rng(1).permutation(18))
    ids = sorted(pairs.ids)
    triggers = store(tmp_path, ids, side=32)
    made = P.load_protection(tmp_path, pairs.ids)
    mask = None if share == "all" else np.arange(18) % 3 > 0
    lazy, here = (P.protected_training_set(clip, pairs, made, mask, memory_limit=m) for m in (0, .5))
    assert here.resident and not lazy.resident
    assert torch.equal(lazy.tokens, here.tokens)
    assert here.captions_cut == 0
    tokens, _ = tokenize(clip, pairs.captions)
    for k, i in enumerate(pairs.ids):
        row, protected = ids.index(i), mask is None or mask[k]
        assert here.tokens[k, 1:4].tolist() == (triggers[row] if protected else tokens[k, 1:4]).tolist()
        clean = pairs.image_array([k], 32)[0].astype(int)
        wanted = np.clip(clean + protected*made.noise[row].astype(int), 0, 255)
        assert (here.images[here.image_rows[k]].permute(1, 2, 0).numpy() == wanted).all()
    for batch in iterate(lazy, torch.arange(18).view(2, 9), "cpu", workers=1):
        assert torch.equal(batch.images, read_batch(here, batch.rows, "cpu").images)

def test_training_sets_that_cannot_be(clip):
    pairs = make_pairs(6, 3, 32)
    made = P.Protection(pairs.ids, noises(18, 32), np.ones((18, 3), int))
    small = P.Protection(pairs.ids, noises(18, 16), no_triggers(18))
    refused("cannot be scaled to 32", P.protected_training_set, clip, pairs, small, error=SettingsError)
    refused("3 entries for 18 pairs", P.protected_training_set, clip, pairs, made, [True]*3)
    long = pairs.replace(captions={4: "a dog " + "and a dog "*9})
    refused(f"the caption of {pairs.ids[4]} has", P.protected_training_set, clip, long, made)

def test_noise_alone(clip):
    pairs = make_pairs(6, 3, 32)
    made = P.Protection(pairs.ids, noises(18, 32), no_triggers(18), method="uap")
    assert torch.equal(P.protected_training_set(clip, pairs, made).tokens, tokenize(clip, pairs.captions)[0])
    published = P.published_pairs(pairs, made, clip.tokenizer)
    assert published.captions == pairs.captions
    told = P.check_published_pairs(published, pairs, made, clip.tokenizer)
    assert told["exact_pixels"] == told["exact_captions"] == told["exact_triggers"] == 1


# ---- published

CAPTIONS = [
    "plain words",
    'a "quoted" word, a comma',
    "it's; semi\tand tab",
    "Grüße aus Köln, 東京 and ☃",
    " spaces on both ends ",
    "<b>not html</b> &amp; more",
    "'single'",
    "#hash, $money$ and \\slash",
    "a,b\tc|d",
    '{"json": 1}',
    "\u200bzero width",
    "emoji 👩‍🚀",
]
IDS = ["a.jpg#0", "a.jpg#1", "b c.jpg#0", "x,y", '"q"', "it's", "ä/ö.png#3", "0", "no ending", "tab\there", "#",
       "ends with #"]
# what strangers have who crawl them: the plain readers
READ = dict(
    csv=lambda folder: read_csv_pairs(folder/"pairs.csv"),
    flickr=lambda folder: read_flickr_pairs(folder/"captions.token", folder/"images"),
    coco=lambda folder: read_coco_pairs(folder/"captions_protected.json", folder/"images"),
    webdataset=read_webdataset_pairs,
)

@pytest.fixture
def awkward(words):
    pairs = Pairs(IDS, CAPTIONS, ArrayImages(pixels(4, 16)), np.arange(12) % 4, None, "awkward")
    return pairs, P.Protection(IDS[::-1], noises(12, 16), some_triggers(words, 12), method="random")

@pytest.mark.parametrize("format", list(P.PAIR_FORMATS))
def test_every_format_gives_back_what_was_published(format, awkward, tokenizer, tmp_path):
    pairs, made = awkward
    published = P.published_pairs(pairs, made, tokenizer)
    wanted = published.image_array(None, 16)
    back = P.read_published(P.write_published(published, tmp_path/"out", format))
    assert back.ids == pairs.ids
    for read in (back, READ[format](tmp_path/"out")):
        assert read.captions == published.captions
        assert (read.image_array(None, 16) == wanted).all()
    in_another_order = back.select(np.random.default_rng(2).permutation(12))
    told = P.check_published_pairs(in_another_order, pairs, made, tokenizer)
    assert (told["pairs"], told["missing"], told["largest_deviation"]) == (12, 0, 0)
    assert told["exact_pixels"] == told["exact_captions"] == 1
    assert told["noise_kept"] == pytest.approx(1)
    assert told["noise_cosine"] == pytest.approx(1)

@pytest.mark.parametrize("format", list(P.PAIR_FORMATS))
def test_formats_are_found_by_those_who_open_folders(format, awkward, tokenizer, tmp_path, monkeypatch):
    from mcl_repro.data.fetching import add_dataset
    monkeypatch.setenv("MCL_REPRO_DATA", str(tmp_path/"home"))
    published = P.published_pairs(*awkward, tokenizer)
    P.write_published(published, tmp_path/format, format)
    entry = add_dataset(f"mine-{format}", tmp_path/format)
    split, = entry["splits"]
    assert entry["layouts"][0]["format"] == format
    assert open_data(f"mine-{format}:{split}").captions == published.captions

def test_many_shards(tokenizer, tmp_path, monkeypatch):
    n = 2050
    ids, captions = [f"p{k}" for k in range(n)], [f"caption {k}" for k in range(n)]
    pairs = Pairs(ids, captions, ArrayImages(pixels(1, 4)), np.zeros(n, int))
    published = P.published_pairs(pairs, P.Protection(ids, noises(n, 4), no_triggers(n)), tokenizer)
    first, second = (P.write_published(published, tmp_path/name, "webdataset") for name in "ab")
    files = sorted(path.name for path in first.iterdir())
    assert files == [*(f"protected-{k:06d}.tar" for k in range(3)), "published.json"]
    assert all((first/name).read_bytes() == (second/name).read_bytes() for name in files)
    back = P.read_published(first)
    assert back.ids == ids and (back.image_array(None, 4) == published.image_array(None, 4)).all()

def test_what_cannot_be_published(awkward, tokenizer, tmp_path):
    pairs, made = awkward
    published = P.published_pairs(pairs, made, tokenizer)
    unknown = "'jpeg' is none of csv, flickr, coco, webdataset"
    refused(unknown, P.write_published, published, tmp_path/"a", "jpeg", error=SettingsError)
    refused("give it in pixels", P.write_published, pairs, tmp_path/"a", error=SettingsError)
    refused("no pairs", P.write_published, published.select([]), tmp_path/"a")
    (tmp_path/"full").mkdir()
    (tmp_path/"full"/"old.txt").write_text("x")
    refused("old.txt is there already", P.write_published, published, tmp_path/"full")
    broken = published.replace(captions={3: "two\nlines"})
    refused("caption of x,y has a line break", P.write_published, broken, tmp_path/"lines", "flickr")
    refused("not to the end", P.read_published, tmp_path/"lines")
    for format in ("csv", "coco", "webdataset"):
        assert P.read_published(P.write_published(broken, tmp_path/format, format)).captions == broken.captions
    told = json.loads((tmp_path/"csv"/"published.json").read_text())
    told["read_as"][0] = "other"
    (tmp_path/"csv"/"published.json").write_text(json.dumps(told))
    refused("is not among the pairs", P.read_published, tmp_path/"csv")

def test_a_share_is_published(tokenizer, words, tmp_path):
    pairs = make_pairs(12, 3)
    mask = P.protected_mask(pairs.ids, .5)
    n, protected_ids = mask.sum(), [i for i, protected in zip(pairs.ids, mask) if protected]
    made = P.Protection(protected_ids, noises(n, 16), some_triggers(words, n, 5))
    back = P.read_published(P.write_published(P.published_pairs(pairs, made, tokenizer, mask), tmp_path/"out"))
    assert back.select(~mask).captions == pairs.select(~mask).captions
    assert (back.image_array(~mask, 16) == pairs.image_array(~mask, 16)).all()
    told = P.check_published_pairs(back, pairs.select(mask), made, tokenizer)
    assert (told["pairs"], told["missing"]) == (n, 0)
    assert told["exact_pixels"] == told["exact_captions"] == 1

@pytest.fixture
def honest(words, tokenizer):
    "Pairs, a protection for them, and what was published"
    pairs = make_pairs()
    made = P.Protection(pairs.ids, noises(18, 16), some_triggers(words))
    return pairs, made, P.published_pairs(pairs, made, tokenizer)

def test_the_check_finds_pictures_that_changed(honest, tokenizer):
    pairs, made, published = honest
    check = lambda pictures: P.check_published_pairs(
        published.replace(images=ArrayImages(pictures)), pairs, made, tokenizer)
    whole = published.image_array(None, 16)
    one = whole.copy()
    one[4, 3, 2, 1] ^= 1
    told = check(one)
    assert (told["exact_pixels"], told["largest_deviation"], told["exact_captions"]) == (17/18, 1, 1)
    assert .99 < told["noise_kept"] < 1.01
    told = check(np.roll(whole, 1, 0))   # noise of the neighbours
    assert told["exact_pixels"] == 0 and abs(told["noise_kept"]) < .1

def test_the_check_finds_captions_that_changed(honest, tokenizer):
    pairs, made, published = honest
    changed = {0: pairs.captions[0], 1: published.captions[1] + " more", 2: "The " + published.captions[2]}
    told = P.check_published_pairs(published.replace(captions=changed), pairs, made, tokenizer)
    assert (told["exact_captions"], told["exact_triggers"]) == (15/18, 16/18)

def test_the_check_finds_what_is_missing(honest, tokenizer):
    pairs, made, published = honest
    told = P.check_published_pairs(published.select(range(12)), pairs, made, tokenizer)
    assert (told["pairs"], told["missing"], told["exact_pixels"]) == (12, 6, 1)
    strangers = published.replace(ids=[f"z{k}" for k in range(18)])
    said = "none of the 18 pairs of photos, protected is known by its id, the first is 'z0'"
    refused(said, P.check_published_pairs, strangers, pairs, made, tokenizer)

def test_the_check_says_what_jpeg_would_cost(honest, tokenizer):
    pairs, made, published = honest
    told = P.check_published_pairs(published, pairs, made, tokenizer)
    assert told["exact_triggers"] == told["exact_captions"] == 1
    assert 0 < told["noise_kept_if_jpeg"] < .9
    assert told["noise_cosine_if_jpeg"] < .9
    assert json.loads(json.dumps(told)) == told

def test_checking_in_pieces_is_checking_at_once(honest, tokenizer):
    pairs, made, published = honest
    whole, pieces = (P.check_published_pairs(published, pairs, made, tokenizer, block=b) for b in (256, 5))
    for name in whole:
        assert name.endswith("jpeg") or whole[name] == pytest.approx(pieces[name])


# ---- what a hacker does

@pytest.mark.parametrize("change", list(P.HACKER_CHANGES))
def test_changes_are_of_each_picture_alone(change):
    x = pixels(40, 20)
    before = x.copy()
    y = P.change_images(x, change)
    assert y.shape == x.shape and y.dtype == np.uint8 and (y != x).any((1, 2, 3)).all() and (x == before).all()
    for rows in ([], [3], [39, 0, 3], np.arange(30)):
        assert (P.change_images(x[rows], change) == y[rows]).all()
    lazy = P.ChangedImages(ArrayImages(x), change, 20)
    assert (lazy.array([5, 1, 5]) == y[[5, 1, 5]]).all()
    assert (np.asarray(lazy[5]) == y[5]).all()
    assert (lazy.take([7, 2]).array(None, 20) == y[[7, 2]]).all()
    assert len(lazy) == 40
    refused("changed at 20 px, not at 224", lazy.array, None, 224, error=SettingsError)

def test_jpeg_is_what_a_jpeg_file_gives(tmp_path):
    x = pixels(2, 32)
    Image.fromarray(x[1]).save(tmp_path/"x.jpg", quality=75)
    assert (P.change_images(x, "jpeg_75")[1] == np.asarray(Image.open(tmp_path/"x.jpg"))).all()
    assert (P.change_images(x, "jpeg_50") != P.change_images(x, "jpeg_75")).any()

def test_blur_against_a_plain_loop():
    x, out = pixels(1, 7)[0].astype(int), np.zeros((7, 7, 3), int)
    for r in range(7):
        for c in range(7):
            for i, a in enumerate((1, 2, 1)):
                for j, b in enumerate((1, 2, 1)):
                    out[r, c] += a*b*x[min(max(r + i - 1, 0), 6), min(max(c + j - 1, 0), 6)]
    assert (P.change_images(x[None].astype(np.uint8), "blur")[0] == (out + 8)//16).all()

def test_unknown_changes():
    unknown = "'sharpen' is none of jpeg_75"
    refused(unknown, P.change_images, pixels(1, 8), "sharpen", error=SettingsError)
    refused(unknown, P.ChangedImages, ArrayImages(pixels(1, 8)), "sharpen", 8, error=SettingsError)
    refused("no size of their own", P.ChangedImages, ArrayImages(pixels(1, 8)), "blur", error=SettingsError)

def test_noise_left():
    x = np.clip(pixels(8, 16), 20, 235)
    y = P.add_noise(x, noises(8, 16))
    assert P.noise_left(x, y, np.copy) == dict(kept=1., cosine=1.)
    assert P.noise_left(x, y, lambda z: np.zeros_like(z)) == dict(kept=0., cosine=0.)
    assert P.noise_left(x, y, lambda z: 255 - z)["cosine"] == pytest.approx(-1)
    half = P.noise_left(x, P.add_noise(x, 2*noises(8, 16)), lambda z: z//2)
    assert .45 < half["kept"] < .55 and half["cosine"] > .9

@pytest.mark.parametrize("size", [8, 33, 64])
def test_crops(size):
    x = torch.from_numpy(pixels(32, size)).permute(0, 3, 1, 2)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    a, b = P.crop_and_flip(x, 1, 2), P.crop_and_flip(x, 1, 2)
    assert torch.equal(a, b)
    assert a.shape == x.shape
    assert a.dtype == torch.uint8
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(P.crop_and_flip(x, 1, 3), a) and not torch.equal(P.crop_and_flip(x, 2, 2), a)
    assert P.crop_and_flip(x[:0], 1, 2).shape == x[:0].shape
    flat = torch.full((4, 3, size, size), 91, dtype=torch.uint8)
    assert (P.crop_and_flip(flat, 0, 0) == 91).all()

def test_a_crop_is_torchvisions_of_the_same_box(monkeypatch):
    from mcl_repro.core.libraries import import_torchvision
    import_torchvision()
    from torchvision.transforms.functional import resized_crop
    x, boxes = torch.from_numpy(pixels(12, 24)).permute(0, 3, 1, 2), []
    def watched(start, length, size):
        boxes.append((start, length))
        return resize_matrix(start, length, size)
    monkeypatch.setattr(P, "resize_matrix", watched)
    ours = P.crop_and_flip(x, 5, 7)
    (top, height), (left, width) = boxes
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 24).all() and (left + width <= 24).all()
    assert (height*width/24**2).min() > .65 and (width/height).max() < 1.45
    for k in range(12):
        box = [int(side[k]) for side in (top, left, height, width)]
        theirs, = resized_crop(x[k:k + 1].float(), *box, [24, 24], antialias=False)
        assert min((ours[k].float() - t).abs().max() for t in (theirs, theirs.flip(-1))) <= .51

@pytest.mark.parametrize("scale", [(0, 1), (.8, .7), (.7, 1.2), (-1, .5)])
def test_crops_that_are_none(scale):
    refused("two shares", P.crop_and_flip, torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 0, 0, scale, error=SettingsError)

def test_captions_lose_their_beginning(honest):
    assert P.drop_first_words(["a b c", " x   y ", "z", "one two"], 2) == ["c", "y", "z", "two"]
    assert P.drop_first_words(["a b"], 0) == ["a b"]
    pairs, _, published = honest
    bare = P.drop_first_words(published.captions, 3)
    # words of the tokenizer are words of the text, but for 's and the like
    assert np.mean([a == b for a, b in zip(bare, pairs.captions)]) > .8


# ---- gallery

def test_the_gallery_draws_anything(tokenizer, tmp_path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    captions = {0: "costs $5 and $6 東京 👩‍🚀", 1: "a very long caption " + "with many more words "*12}
    pairs = make_pairs().replace(captions=captions)
    triggers = np.random.default_rng(0).integers(1, 49406, (18, 5))
    triggers[2] = tokenizer.eot_token_id
    made = P.Protection(pairs.ids[::-1], noises(18, 16), triggers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")   # such as that of a character without a picture
        fig = P.protection_gallery(pairs, made, tokenizer, range(4))
        fig.savefig(tmp_path/"g.png")
    protected, tenfold = (fig.axes[k].get_images()[0].get_array() for k in (1, 2))
    assert len(fig.axes) == 16
    assert (protected == P.protected_images(pairs, made).array([0])[0]).all()
    assert (tenfold == np.clip(128 + 10*made.noise[17].astype(int), 0, 255)).all()
    plt.close(fig)
    bare = P.protection_gallery(pairs, P.Protection(pairs.ids, noises(18, 16), no_triggers(18)), tokenizer, [0])
    assert len(bare.axes[3].texts) == 1
    plt.close(bare)

@pytest.mark.parametrize("text, drawn", [
    ("grüße, café", "grüße, café"),
    ("東", "[cjk unified ideograph-6771]"),
    ("a 🐶", "a [dog face]"),
    ("\x00\ue000", "[u+0000][u+e000]"),
    ("", ""),
])
def test_characters_that_a_font_lacks_are_named(text, drawn):
    assert P.drawable_text(text) == drawn
