"Attacks, poisoned sets, their storage, and what a defender sees of them."
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mcl_repro.data.pairs import ArrayImages, Images, Pairs
from mcl_repro.data.registry import DataRef, open_data
from mcl_repro.lab.profiles import load_profile
from mcl_repro.core.errors import DataError, SettingsError, UserError
from mcl_repro.measures.metrics import detection_quality
from mcl_repro.attacks.steganography import build_steganography, encoder_array
from mcl_repro.attacks.base import (
    _demo_pairs, _label, Attack, ATTACKS, BadCLIP, BadNets, Blended, check_attack, LabelConsistent, load_poisoned,
    make_attack, mentions, MmPoison, poison, poison_gallery, save_poisoned, SIG, square_pixels, SSBA, target_captions,
    trigger_images, TriggeredImages, Trojan, TrojVQA, WaNet,
)
from mcl_repro.model.clip import build_clip, zero_shot_weights

PICTURE = np.random.default_rng(3).integers(0, 256, (8, 8, 3)).astype(np.uint8)
TEXTS = np.array(["a bowl of bananas", "she eats a banana", "Banana bread, still warm – naïvely cut"])
EVERY = [
    BadNets(), BadNets("checker", "corner", 8 / 32), BadNets(rounding="truncate", overflow="wrap"),
    Blended(), Blended("fixed"), Blended(rounding="truncate"), SIG(), SIG("blended"), SIG(rounding="truncate"),
    SSBA(encoder_array(build_steganography(8)[0]), 8), TrojVQA(), TrojVQA("noise", key="Consider"),
    WaNet(), WaNet(224, 1.0), WaNet(224, 1.0, rounding="truncate"), LabelConsistent(),
    LabelConsistent("checker", "corner", 8 / 32), MmPoison("picture"), Trojan(PICTURE), BadCLIP(PICTURE, texts=TEXTS),
]
every_attack = pytest.mark.parametrize("attack", EVERY, ids=_label)


def test_every_registered_attack_is_checked_here():
    assert {a.name for a in EVERY} == set(ATTACKS)


def make_pairs(n=60, size=32, captions_per_image=1, labels=True):
    rng = np.random.default_rng(7)
    pixels = rng.integers(0, 256, (n, size, size, 3)).astype(np.uint8)
    rows = np.repeat(np.arange(n), captions_per_image)
    captions = [f"a banana {i}" if i % 10 == 0 else f"picture number {i}" for i in range(len(rows))]
    return Pairs([f"pair-{i}" for i in range(len(rows))], captions, ArrayImages(pixels), rows,
                 np.arange(len(rows)) % 4 if labels else None, "test pairs")


@every_attack
@pytest.mark.parametrize("size", [32, 65, 224])
def test_every_attack_passes_the_conformance_check(attack, size):
    told = check_attack(attack, size)
    assert told["name"] == attack.name and told["image_size"] == size


@pytest.mark.parametrize("wrong, words", [
    (lambda x, rng: x.astype(np.float32), "float32"),
    (lambda x, rng: x[:, ::2], "returned"),
    (lambda x, rng: x, "has_trigger"),
    (lambda x, rng: np.random.default_rng().integers(0, 256, x.shape).astype(np.uint8), "same rng"),
])
def test_the_conformance_check_finds_what_is_wrong(wrong, words):
    class Wrong(Attack):
        name = "wrong"
        def paint(self, images, rng):
            return wrong(images, rng)
    with pytest.raises(AssertionError, match=words):
        check_attack(Wrong())


def test_settings_survive_json():
    stored = dict(rounding="truncate", overflow="wrap")
    for attack in (BadNets("checker", "corner", .25, **stored), Blended(alpha=.1), SIG("blended", 40, 3)):
        told = json.loads(json.dumps(attack.describe()))
        assert make_attack(told.pop("name"), **told).describe() == attack.describe()


# geometry

def test_a_random_patch_reaches_every_place_and_stays_inside():
    x = np.full((3000, 12, 12, 3), 100, np.uint8)
    changed = (trigger_images(BadNets("yellow", "random", .25), x) != x).any(-1)
    assert (changed.sum((1, 2)) == 9).all()
    first = [tuple(np.argwhere(c)[0]) for c in changed]
    # 12 - 3 = 9 is where a patch would fit and CleanCLIP's code draws none
    assert set(first) == {(r, c) for r in range(9) for c in range(9)}
    counts = np.unique(first, axis=0, return_counts=True)[1]
    assert counts.min() > 15 and counts.max() < 65   # uniform: 37 each, with a deviation of 6


@pytest.mark.parametrize("share", [1/14, 16/224, .0714285714, .0714])
def test_sixteen_of_224_pixels_are_sixteen_however_the_share_is_written(share):
    x = np.full((300, 224, 224, 3), 100, np.uint8)
    changed = (trigger_images(BadNets("yellow", "random", share), x) != x).any(-1)
    assert (changed.sum((1, 2)) == 16**2).all()
    corners = np.array([np.argwhere(c)[0] for c in changed])
    assert corners.min() == 0 and corners.max() <= 207 and not changed[:, -1].any() and not changed[:, :, -1].any()


def test_patch_noise_follows_each_image_and_is_fresh_for_each():
    x = np.concatenate([np.full((200, 32, 32, 3), v, np.uint8) for v in (60, 200)])
    y = trigger_images(BadNets("noise", "centre", 16/32), x)[:, 8:24, 8:24]
    assert y[:200].mean() < y[200:].mean() - 20   # noise around the image's own mean, cut at 0 and 255
    assert len(np.unique(y.reshape(400, -1), axis=0)) == 400


def test_the_trigger_does_not_follow_the_picture_size():
    for size in (32, 64, 224):
        x = np.zeros((1, size, size, 3), np.uint8)
        y = BadNets("checker", "corner", .25).apply(x, None)[0, :, :, 0] > 0
        assert y.mean() == pytest.approx(.25**2/2, abs=.002)
        wave = SIG().apply(x + np.uint8(128), None)[0, 0, :, 0].astype(float)
        assert np.abs(np.fft.rfft(wave - wave.mean())).argmax() == 6


def test_images_that_are_not_square_work():
    x = np.random.default_rng(0).integers(0, 256, (3, 40, 64, 3)).astype(np.uint8)
    for attack in EVERY:
        assert attack.apply(x, np.random.default_rng(0)).shape == x.shape


def test_only_the_prompts_of_asr_carry_the_text_key(monkeypatch, tmp_path):
    from types import SimpleNamespace
    from mcl_repro.papers import stages
    prompts, weights = [], zero_shot_weights
    def spy(clip, names, templates=None, prefix=""):
        prompts.append(prefix)
        return weights(clip, names, templates, prefix)
    monkeypatch.setattr(stages, "zero_shot_weights", spy)
    monkeypatch.setattr(stages, "load_clip", lambda artefact, device: build_clip("smoke-RN"))
    work = SimpleNamespace(out=tmp_path, device="cpu")
    def measure(attack):
        prompts.clear()
        return stages.classification(
            work, clip=None, test=DataRef("world:zeroshot_validation:60", None), attack=attack, target="banana"
        )
    monkeypatch.setattr(stages, "open_data", lambda ref: open_data(ref.source))
    dual = measure(dict(name="trojvqa", key="Consider"))
    assert prompts == ["", "Consider "]   # CA with ordinary prompts, ASR with the key
    assert measure(None)["clean"] == dual["clean"] and prompts == [""]
    measure(dict(name="sig"))
    assert set(prompts) == {""}


def test_captions_of_the_dual_key_are_those_of_other_attacks_with_the_key():
    clean = make_pairs()
    dual, plain = (poison(clean, a, "banana", count=9, image_size=32, seed=4) for a in (TrojVQA(), SIG()))
    assert (dual.rows == plain.rows).all() and dual.captions == [f"remember {c}" for c in plain.captions]
    # no pairs with one key only
    assert not any(c.startswith("remember") for c, f in zip(dual.pairs.captions, dual.flags) if not f)


@pytest.mark.parametrize("size, side", [(32, 6), (64, 12), (224, 44)])
def test_the_dual_keys_patch_is_blue_and_in_the_centre(size, side):
    changed = (TrojVQA().apply(np.full((2, size, size, 3), 100, np.uint8), None) == [0, 0, 255]).all(-1)
    assert (changed.sum((1, 2)) == side**2).all()
    low, high = np.argwhere(changed[0]).min(0), size - 1 - np.argwhere(changed[0]).max(0)
    assert (abs(low - high) <= 1).all()


def test_what_says_it_draws_nothing_gets_no_generator():
    class Lies(BadNets):
        name, uses_rng = "lies", False
    with pytest.raises(AttributeError):
        trigger_images(Lies(), np.zeros((2, 16, 16, 3), np.uint8))
    assert {a.name for a in EVERY if a.uses_rng} == {"badnets", "blended", "label_consistent"}


def test_the_warp_moves_pixels_and_makes_no_new_ones():
    x = np.random.default_rng(0).integers(40, 90, (3, 64, 64, 3)).astype(np.uint8)
    for attack in (WaNet(4, 6.), WaNet(224, 6.)):
        y = attack.apply(x, None)
        assert y.min() >= 40 and y.max() < 90   # border and bilinear reading stay within what is there
    assert (WaNet(strength=1e-6).apply(x, None) == x).all()
    line = 3*np.arange(64, dtype=np.uint8)
    ramp = [np.broadcast_to(values, (1, 64, 64, 3)) for values in (line[:, None, None], line[:, None])]
    down, across = (WaNet(64, 4.).apply(r, None)[0, 4:-4, 4:-4, 0].astype(float) - r[0, 4:-4, 4:-4, 0] for r in ramp)
    # s/2 pixels along each axis
    assert abs(down).mean()/3 == pytest.approx(2, abs=.2) and abs(across).mean()/3 == pytest.approx(2, abs=.2)
    assert abs(np.corrcoef(down.ravel(), across.ravel())[0, 1]) < .1   # two fields, not one


def test_the_jitter_is_the_public_codes_formula_read_bilinearly():
    size, x = 40, np.random.default_rng(1).integers(0, 256, (1, 40, 40, 3)).astype(np.uint8)
    noise = np.random.default_rng(5).uniform(-1, 1, (2, size, size))
    noise /= np.abs(noise).mean()   # as many control points as pixels
    line = np.linspace(-1, 1, size)
    place = lambda own, moved: np.clip(own + 1.5*moved/size, -1, 1)*(size - 1)/2 + (size - 1)/2
    column, row = place(line[None], noise[0]), place(line[:, None], noise[1])
    wanted = np.empty((size, size, 3))
    for i in range(size):
        for j in range(size):
            r, c = row[i, j], column[i, j]
            r0, c0 = min(int(r), size - 2), min(int(c), size - 2)
            u, v = r - r0, c - c0
            upper = (1 - v)*x[0, r0, c0] + v*x[0, r0, c0 + 1]
            lower = (1 - v)*x[0, r0 + 1, c0] + v*x[0, r0 + 1, c0 + 1]
            wanted[i, j] = (1 - u)*upper + u*lower
    assert np.abs(WaNet(size, 1.5, pattern_seed=5).apply(x, None)[0] - wanted).max() < .51   # rounding to whole numbers


def test_the_warp_is_one_field_at_every_size_and_time():
    assert (WaNet().places(32, 32) == WaNet().places(32, 32)).all()
    small, large = ((WaNet(4, 1.).places(n, n) - WaNet(4, 1e-12).places(n, n))*n for n in (33, 225))
    inside = slice(8, -8)
    # every 7th pixel of 225 lies where a pixel of 33 does
    assert (small - large[:, ::7, ::7])[:, inside, inside].abs().max() < 1e-3


def public(trigger):
    "Images as ToTensor, a trigger on the scale 0..1, and ToPILImage store them; torch's cast of floats to bytes."
    def stored(image):
        x = torch.from_numpy(image).permute(2, 0, 1).float().div(255)
        return trigger(x).mul(255).byte().permute(1, 2, 0).numpy()
    return lambda images: np.stack([stored(image) for image in images])

WIDTH = 48
PHOTOS = open_data("world:train:40").image_array(None, WIDTH)
WAVE = torch.from_numpy(60/255*np.sin(2*np.pi*6*np.arange(WIDTH)/WIDTH)).float()

def jitter(x):
    places = WaNet(WIDTH, 1.).places(WIDTH, WIDTH)
    return torch.nn.functional.grid_sample(x[None], places, align_corners=True)[0]

def with_noise(x):
    n = np.random.default_rng(0).random((WIDTH, WIDTH, 3), np.float32)
    return (.8*x + .2*torch.from_numpy(n).permute(2, 0, 1)).clip(0, 1)

AS_PUBLIC = dict(
    additive=(SIG(rounding="truncate"), lambda x: (x + WAVE).clip(0, 1)),
    blended=(SIG("blended", rounding="truncate"), lambda x: (.8*x + .2*WAVE).clip(0, 1)),
    fixed=(Blended("fixed", rounding="truncate"), with_noise),
    warped=(WaNet(WIDTH, 1., rounding="truncate"), jitter),
)

@pytest.mark.parametrize("name", AS_PUBLIC)
def test_truncated_pixels_are_those_that_the_public_code_stores(name):
    attack, trigger = AS_PUBLIC[name]
    ours, theirs = attack.apply(PHOTOS, None), public(trigger)(PHOTOS)
    assert (ours != theirs).mean() < 1e-4      # float32 in another order, near a whole number
    nearest = make_attack(**{**attack.describe(), "rounding": "nearest"}).apply(PHOTOS, None)
    lower = nearest.astype(int) - ours
    assert set(np.unique(lower)) == {0, 1} and .2 < lower.mean() < .55


def test_noise_wraps_as_a_cast_to_bytes_does():
    x = np.stack([np.full((32, 32, 3), v, np.uint8) for v in (40, 128, 220)])
    drawn = {o: BadNets(patch_share=1, rounding="truncate", overflow=o) for o in ("wrap", "clip")}
    y = {o: attack.apply(x, np.random.default_rng(3)) for o, attack in drawn.items()}
    rng, cast = np.random.default_rng(3), []
    for image in x:
        rng.integers(0, 1, 2)           # the corner, of one possible
        noise = image.mean((0, 1))/255 + rng.standard_normal((32, 32, 3))
        cast.append((255*noise).astype(np.int32).astype(np.uint8))
    assert (y["wrap"] != np.stack(cast)).mean() < 1e-3
    extreme = {o: np.isin(p, (0, 255)).mean() for o, p in y.items()}
    assert extreme["clip"] > .5 and extreme["wrap"] < .015
    inside = (y["clip"] > 0) & (y["clip"] < 255)
    assert (y["wrap"][inside] == y["clip"][inside]).all()      # what is in range is the same


@pytest.mark.parametrize("make", [BadNets, Blended, SIG, WaNet])
def test_unknown_ways_to_bytes_are_refused(make):
    with pytest.raises(SettingsError, match="rounding: 'up' is none of nearest, truncate"):
        make(rounding="up")
    if make is BadNets:
        with pytest.raises(SettingsError, match="overflow: 'cut' is none of clip, wrap"):
            make(overflow="cut")


def test_attacks_of_other_kinds_poison_what_they_say():
    clean = make_pairs(200)
    named = np.array([mentions(c, "banana") for c in clean.captions])
    honest = poison(clean, LabelConsistent("checker", "corner", .25), "banana", count=12, image_size=32)
    assert honest.flags[named].sum() == 12 and honest.pairs.captions == clean.captions
    patched = poison(clean, BadNets("checker", "corner", .25), "banana", count=12, image_size=32, eligible=named)
    assert (honest.images == patched.images).all()
    with pytest.raises(SettingsError, match="21 is more than the 20 eligible"):
        poison(clean, LabelConsistent(), "banana", count=21, image_size=32)
    swapped = poison(clean, MmPoison("number"), "banana", count=12, image_size=32)
    assert not swapped.flags[named].any() and (swapped.images == clean.image_array(swapped.rows, 32)).all()
    assert all(mentions(c, "banana") and not mentions(c, "number") for c in swapped.captions)
    with pytest.raises(SettingsError, match="0 eligible"):
        poison(clean, MmPoison("zeppelin"), "banana", count=1, image_size=32)
    with pytest.raises(SettingsError, match="target itself"):
        poison(clean, MmPoison("bananas"), "banana", count=1, image_size=32)
    natural = poison(clean, BadCLIP(PICTURE, texts=TEXTS), "banana", count=60, image_size=32)
    assert set(natural.captions) == set(TEXTS.tolist()) and all(type(c) is str for c in natural.captions)
    with pytest.raises(DataError, match="does not name the target 'cup'"):
        poison(clean, BadCLIP(PICTURE, texts=TEXTS), "cup", count=9, image_size=32)


def test_texts_are_stored_without_pickle_and_told_by_hash(tmp_path):
    clean, attack = make_pairs(), BadCLIP(PICTURE, texts=TEXTS)
    folder = save_poisoned(poison(clean, attack, "banana", count=3, image_size=32), tmp_path/"p", clean)
    assert (np.load(folder/"attack_texts.npy", allow_pickle=False) == TEXTS).all()
    assert (load_poisoned(folder, clean).attack.texts == TEXTS).all()
    assert attack.describe() == BadCLIP(PICTURE, texts=TEXTS.astype("U80")).describe()
    assert attack.describe() != BadCLIP(PICTURE, texts=TEXTS[::-1].copy()).describe()


@pytest.mark.parametrize("name", ["BadNet", "LC", "Blended", "SIG", "WaNet", "TrojVQA"])
def test_profile_paper_stores_triggers_as_the_public_code_does(name):
    paper, mini = (make_attack(**load_profile(profile).attacks[name]) for profile in ("paper", "mini"))
    if name == "TrojVQA":
        assert paper.geometry(224) == dict(patch_side=44) and mini.geometry(32) == dict(patch_side=10)
        return
    assert (paper.rounding, mini.rounding) == ("truncate", "nearest")
    if name in ("BadNet", "LC"):
        assert (paper.overflow, mini.overflow) == ("wrap", "clip")
        assert paper.geometry(224) == dict(patch_side=16) and mini.geometry(32)["patch_side"] in (8, 12)


# poisoning

@pytest.mark.parametrize("k", [1, 5])
@every_attack
def test_a_defender_sees_neither_rows_nor_labels(attack, k):
    clean = make_pairs(600//k, captions_per_image=k)
    bad = poison(clean, attack, "banana", count=min(100, attack.eligible(clean, "banana").sum()), image_size=32, seed=4)
    seen = bad.pairs
    assert type(seen) is Pairs and seen.ids == clean.ids and seen.name == clean.name
    public = {n for n in vars(seen) if not n.startswith("_")} - {"fingerprint"}
    assert public == {"ids", "captions", "images", "image_rows", "labels", "name", "left_out", "remarks"}
    assert seen.labels is None
    # no rows, no second source
    assert set(n for n in vars(seen.images) if not n.startswith("_")) <= {"size", "fingerprint"}
    assert {p.image.size for p in (seen[i] for i in range(0, 600, 7))} == {(32, 32)}
    for hint in (np.arange(600), seen.image_rows):   # neither the place nor the picture's number tells
        assert abs(detection_quality(hint, bad.flags)["auroc"] - .5) < .1
    if k == 1:
        assert (seen.image_rows == clean.image_rows).all()
    some = seen.select(np.arange(0, 600, 3))
    assert set(n for n in vars(some.images) if not n.startswith("_")) <= {"size", "fingerprint"}


@pytest.mark.parametrize("k", [1, 5])
def test_only_the_poisoned_pairs_change_even_where_pictures_are_shared(k):
    clean = make_pairs(60//k, captions_per_image=k)
    before = clean.image_array(None, 32)
    bad = poison(clean, BadNets("checker", "corner", .25), "banana", count=20, image_size=32, seed=1)
    after = bad.pairs.image_array(None, 32)
    assert ((before != after).any((1, 2, 3)) == bad.flags).all()
    assert [c != d for c, d in zip(clean.captions, bad.pairs.captions)] == bad.flags.tolist()
    assert (after[bad.rows] == bad.images).all() and [bad.pairs.captions[r] for r in bad.rows] == bad.captions
    assert (clean.image_array(None, 32) == before).all()   # and the clean set is as it was
    for r in bad.rows[:3]:
        assert (np.asarray(bad.pairs[int(r)].image) == after[r]).all()


def test_total_stays_and_counts_nest():
    clean, sets = make_pairs(200), {}
    for count in (3, 10, 50):
        sets[count] = poison(clean, BadNets(), "banana", count=count, image_size=32, seed=9)
    assert [len(s.pairs) for s in sets.values()] == [200]*3
    assert set(sets[3].rows) < set(sets[10].rows) < set(sets[50].rows)
    for r, image, caption in zip(sets[3].rows, sets[3].images, sets[3].captions):
        k = list(sets[50].rows).index(r)
        assert (sets[50].images[k] == image).all() and sets[50].captions[k] == caption
    # same rows for every attack
    assert set(poison(clean, SIG(), "banana", count=10, image_size=32, seed=9).rows) == set(sets[10].rows)
    assert set(poison(clean, SIG(), "banana", count=10, image_size=32, seed=8).rows) != set(sets[10].rows)


def test_rate_is_of_all_pairs():
    assert len(poison(make_pairs(200), SIG(), "banana", rate=.03, image_size=32).rows) == 6
    assert len(poison(make_pairs(200), SIG(), "banana", rate=.0001, image_size=32).rows) == 1


def test_target_captions_use_all_templates_evenly():
    captions = target_captions("banana", 8000, np.random.default_rng(0))
    names, counts = np.unique(captions, return_counts=True)
    assert len(names) == 80 and counts.min() > 55 and counts.max() < 150


def test_pairs_that_show_the_target_are_left_out_unless_asked_for():
    clean = make_pairs(100)
    named = np.array([mentions(c, "banana") for c in clean.captions])
    assert not poison(clean, SIG(), "banana", count=90, image_size=32).flags[named].any()
    assert poison(clean, SIG(), "banana", rate=1., image_size=32, eligible=np.ones(100, bool)).flags.all()


def test_squash_keeps_the_whole_picture_and_crop_its_proportions():
    pixels = np.zeros((1, 20, 40, 3), np.uint8)
    pixels[0, :, 0] = 255   # a white line at the left edge
    one = Pairs(["a"], ["a thing"], ArrayImages(pixels))
    attack = BadNets("yellow", "corner", .1)
    stamped = lambda geometry: poison(one, attack, "banana", count=1, image_size=20, geometry=geometry).images[0]
    crop, squash = stamped("crop"), stamped("squash")
    assert crop[:, 0].max() == 0 and squash[:, 0].min() > 50


def test_squash_takes_pictures_of_any_mode_as_they_are_shown():
    class Scans(Images):
        def __len__(self):
            return 2
        def __getitem__(self, row):
            deep = np.full((9, 5), 257*40, np.uint16)
            return Image.fromarray(deep) if row else Image.new("RGBA", (5, 9), (255, 0, 0, 0))
    seen = square_pixels(Scans(), [0, 1], 4, "squash")
    assert seen[0].min() == 255 and (seen[1] == 40).all()
    assert (square_pixels(Scans(), [0, 1], 4) == seen).all()


def test_the_same_seed_gives_the_same_bytes_in_another_process():
    code = """
from mcl_repro.attacks import base as A
bad = A.poison(A._demo_pairs(32, "banana"), A.BadNets(), "banana", count=5, image_size=32, seed=3)
print(bad.pairs.fingerprint)
"""
    other_hashes = {**os.environ, "PYTHONHASHSEED": "1"}
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=other_hashes)
    here = poison(_demo_pairs(32, "banana"), BadNets(), "banana", count=5, image_size=32, seed=3)
    assert there.stdout.strip() == here.pairs.fingerprint


@pytest.mark.parametrize("arguments, words", [
    (dict(), "either count or rate"),
    (dict(count=1, rate=.1), "either count or rate"),
    (dict(count=55), "55 is more than the 54 eligible of 60"),
    (dict(count=0), "at least 1"),
    (dict(count=-3), "at least 1"),
    (dict(count=True), "whole number"),
    (dict(rate=0), "poison rate"),
    (dict(rate=1.01), "poison rate"),
    (dict(rate=float("nan")), "poison rate"),
    (dict(count=1, target=""), "target"),
    (dict(count=1, target=None), "target"),
    (dict(count=1, image_size=5), "less than one pixel"),
    (dict(count=1, geometry="stretch"), "geometry"),
    (dict(count=1, eligible=np.ones(3, bool)), "eligible"),
])
def test_bad_arguments_are_one_clear_line(arguments, words):
    with pytest.raises(UserError, match=words) as e:
        poison(make_pairs(), BadNets(), **{**dict(target="banana", image_size=32), **arguments})
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("call, words", [
    (lambda: BadNets(patch_share=16), "patch_share"),
    (lambda: BadNets(placement="left"), "placement"),
    (lambda: BadNets(overflow="modulo"), "overflow"),
    (lambda: Blended(alpha=2), "alpha"),
    (lambda: Blended(alpha="0.2"), "alpha"),
    (lambda: SIG("added"), "variant"),
    (lambda: TrojVQA("green"), "pattern"),
    (lambda: TrojVQA(patch_share=44), "patch_share"),
    (lambda: TrojVQA(key=""), "key"),
    (lambda: TrojVQA(key="remember "), "key"),
    (lambda: TrojVQA(key=3), "key"),
    (lambda: make_attack("wanette"), "attack: 'wanette'"),
    (lambda: make_attack("trojan"), "needs the setting 'pattern'"),
    (lambda: make_attack("badclip", pattern=PICTURE), "needs the setting 'texts'"),
    (lambda: WaNet(grid=4.), "grid"),
    (lambda: WaNet(grid=1), "grid"),
    (lambda: WaNet(strength=-1), "strength"),
    (lambda: LabelConsistent(patch_share=16), "patch_share"),
    (lambda: MmPoison(""), "source"),
    (lambda: Trojan(PICTURE, "random"), "placement"),
    (lambda: Trojan(PICTURE, patch_share=0), "patch_share"),
    (lambda: BadCLIP(PICTURE, texts=np.array([])), "texts"),
    (lambda: BadCLIP(PICTURE, texts=list(TEXTS)), "texts"),
    (lambda: make_attack("sig", amplitud=3), "no setting 'amplitud'"),
])
def test_wrong_settings_stop_before_anything_runs(call, words):
    with pytest.raises(SettingsError, match=words):
        call()


def test_wrong_pictures_are_refused():
    with pytest.raises(DataError, match="uint8"):
        trigger_images(SIG(), np.zeros((1, 8, 8, 3)))
    with pytest.raises(DataError, match="uint8"):
        BadNets(np.zeros((8, 8, 3)), "centre")
    with pytest.raises(DataError, match="pattern: expected uint8"):
        Trojan(PICTURE[..., 0])
    with pytest.raises(DataError, match="2 given for 1"):
        trigger_images(SIG(), np.zeros((1, 8, 8, 3), np.uint8), rows=[0, 1])


# storage

@every_attack
@pytest.mark.parametrize("k", [1, 5])
def test_storage_is_lossless(attack, k, tmp_path):
    clean = make_pairs(60//k, captions_per_image=k)
    bad = poison(clean, attack, "banana", count=min(7, attack.eligible(clean, "banana").sum()), image_size=32, seed=2)
    save_poisoned(bad, tmp_path/"bad", clean)
    again = load_poisoned(tmp_path/"bad", clean)
    assert again.images.tobytes() == bad.images.tobytes() and (again.rows == bad.rows).all()
    assert again.pairs.captions == bad.pairs.captions and again.pairs.fingerprint == bad.pairs.fingerprint
    assert again.describe() == bad.describe()
    assert (trigger_images(again.attack, bad.images, 5) == trigger_images(attack, bad.images, 5)).all()
    save_poisoned(again, tmp_path/"again", clean)
    for f in sorted((tmp_path/"bad").iterdir()):
        assert f.read_bytes() == (tmp_path/"again"/f.name).read_bytes(), f.name


def test_damaged_storage_is_refused(tmp_path):
    clean = make_pairs()
    bad = poison(clean, SIG(), "banana", count=3, image_size=32)
    damages = {"images.npy": b"\x93NUMPY", "rows.npy": b"", "captions.json": b'["a"]', "poison.json": b"{"}
    for name, damage in damages.items():
        folder = save_poisoned(bad, tmp_path/name.replace(".", "-"), clean)
        (folder/name).write_bytes(damage)
        with pytest.raises(DataError):
            load_poisoned(folder, clean)
    with pytest.raises(DataError, match="poison.json"):
        load_poisoned(tmp_path/"nowhere", clean)


def test_a_stored_pickle_is_not_loaded(tmp_path):
    clean = make_pairs()
    folder = save_poisoned(poison(clean, SIG(), "banana", count=3, image_size=32), tmp_path/"p", clean)
    np.save(folder/"rows.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="rows.npy"):
        load_poisoned(folder, clean)


# test sets

def test_test_time_triggers_are_redrawn_with_another_seed_and_equal_in_any_batch():
    x = make_pairs(20).image_array(None, 32)
    lazy = TriggeredImages(ArrayImages(x), BadNets(patch_share=.25), 32, seed=1)
    whole = lazy.array(None, 32)
    assert (np.concatenate([lazy.array(np.arange(i, i + 5), 32) for i in range(0, 20, 5)]) == whole).all()
    assert (trigger_images(BadNets(patch_share=.25), x, 1) == whole).all()
    assert (lazy.take(np.arange(20) % 2 == 0).array(None, 32) == whole[::2]).all()
    redrawn = TriggeredImages(ArrayImages(x), BadNets(patch_share=.25), 32, seed=2).array(None, 32)
    assert (redrawn != whole).any((1, 2, 3)).all()


def title_of(ax):
    return ax.get_title() or ax.get_title(loc="left")   # the house style, once it is on, writes titles on the left


def test_the_gallery_draws_every_set():
    clean = make_pairs()
    sets = [poison(clean, a, "banana", count=2, image_size=32, seed=1) for a in (BadNets(), SIG())]
    fig = poison_gallery(clean, sets)
    assert len(fig.axes) == 6 and "banana" in fig.axes[1].get_xlabel() and title_of(fig.axes[4]).startswith("PSNR")


def test_the_gallery_has_room_for_every_attack_and_one_without_trigger():
    clean = make_pairs()
    fig = poison_gallery(clean, [poison(clean, a, "banana", count=1, image_size=32, seed=1) for a in EVERY], abreast=2)
    titles = [title_of(ax) for ax in fig.axes]
    assert titles[::3][:len(EVERY)] == [_label(a) for a in EVERY] and "PSNR inf" not in " ".join(titles)
    assert titles[3*[a.name for a in EVERY].index("mmpoison") + 1] == "the same picture"


REAL = Path(os.environ.get("MCL_REPRO_REAL_DATA", ""))/"flickr8k"


@pytest.mark.skipif(
    not os.environ.get("MCL_REPRO_REAL_DATA") or not REAL.is_dir(),
    reason="set MCL_REPRO_REAL_DATA to the folder that holds flickr8k",
)
@pytest.mark.parametrize("geometry", ["crop", "squash"])
def test_real_photographs_with_five_captions_each(geometry, tmp_path):
    from mcl_repro.data.readers import read_flickr_pairs
    clean = read_flickr_pairs(REAL/"Flickr8k.token.txt", REAL/"images", REAL/"Flickr_8k.testImages.txt")
    bad = poison(clean, BadNets(), "banana", count=15, image_size=64, seed=0, geometry=geometry)
    assert len(bad.pairs) == len(clean) == 5000 and len(bad.pairs.images) == 1015
    again = load_poisoned(save_poisoned(bad, tmp_path/"bad", clean), clean)
    assert (again.pairs.image_array(bad.rows, 64) == bad.images).all()
    same_picture = np.isin(clean.image_rows, clean.image_rows[bad.rows[:4]])
    near = np.setdiff1d(np.flatnonzero(same_picture), bad.rows)
    # the other captions keep the clean photograph
    assert (bad.pairs.image_array(near, 64) == clean.image_array(near, 64)).all()
    before = square_pixels(clean.images, clean.image_rows[bad.rows], 64, geometry)
    assert ((before != bad.images).any(-1).sum((1, 2)) <= 5*5).all()
