"Attack and measure: bad input, hostile folders, killed runs, the same bytes, the same numbers as the papers' stages."
import csv
import json
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mcl_repro.tools import measuring as M
from mcl_repro.papers import stages
from mcl_repro.attacks.base import BadNets, load_poisoned, MmPoison, SSBA, TrojVQA
from mcl_repro.tools.cards import card_text, read_card
from mcl_repro.model.clip import save_clip
from mcl_repro.data.pairs import ArrayImages, Pairs
from mcl_repro.data.readers import read_csv_pairs
from mcl_repro.data.registry import open_data
from mcl_repro.core.errors import DataError, SettingsError, StoreError, UserError
from mcl_repro.tools.inputs import as_clip, Cost, model_fingerprint
from mcl_repro.attacks.steganography import build_steganography, encoder_array

CHECKER = dict(pattern="checker", placement="corner", patch_share=.25)


@pytest.fixture(scope="module")
def pairs():
    return open_data("world:train:120")

@pytest.fixture(scope="module")
def images():
    return open_data("world:zeroshot_test:80")

@pytest.fixture(scope="module")
def clip():
    return as_clip("smoke-RN")

def several(n=24, each=3):
    "Pictures with several captions each, some of which say banana."
    pixels = np.random.default_rng(1).integers(0, 256, (n, 32, 32, 3)).astype(np.uint8)
    rows = np.repeat(np.arange(n), each)
    return Pairs(
        [f"p{i}" for i in range(n * each)],
        [f"a banana {i}" if i < 2 * each else f"thing number {i}" for i in range(n * each)], ArrayImages(pixels), rows,
        name="several",
    )

def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

def broken(folder, n=10):
    "A CSV of n good pictures, an empty file and half a file."
    rng = np.random.default_rng(0)
    for k in range(n):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3)).astype(np.uint8)).save(folder/f"{k}.png")
    (folder/"empty.png").write_bytes(b"")
    (folder/"half.png").write_bytes((folder/"0.png").read_bytes()[:700])
    names = [f"{k}.png" for k in range(n)] + ["empty.png", "half.png"]
    (folder/"list.csv").write_text("image,caption\n" + "".join(f"{f},a view {f}\n" for f in names))
    return folder/"list.csv"


# the same numbers as the papers' stages

@pytest.mark.parametrize("attack", [
    BadNets(**CHECKER),
    BadNets(),
    TrojVQA(),
], ids=["checker", "random noise", "trojvqa"])
def test_outcomes_are_those_of_the_stages(clip, images, tmp_path, attack):
    save_clip(clip, tmp_path/"clip.safetensors")
    artefact = SimpleNamespace(path=tmp_path, result=dict(model=clip.name))
    work, settings = SimpleNamespace(out=tmp_path, device="cpu"), {k: v for k, v in attack.describe().items()}
    stages.classification(work, clip=artefact, test="world:zeroshot_test:80", attack=settings, target="banana", seed=3)
    ours = M.measure(clip, images=images, attack=attack, target="banana", seed=3)
    theirs = stages.arrays(artefact, "outcomes")
    assert (ours.items["CA"].outcomes == theirs["clean"]).all()
    assert (ours.items["ASR"].outcomes == theirs["attacked"]).all()
    stages.retrieval(
        work, clip=artefact, test="world:retrieval_flickr8k:20", attack=settings, target_caption="a photo of banana",
        target="banana", seed=3,
    )
    ours = M.measure(clip, pairs="world:retrieval_flickr8k:20", attack=attack, target="banana", seed=3)
    theirs = stages.arrays(artefact, "outcomes")
    for way in ("image to text", "text to image"):
        assert (ours.items[f"MedR, {way}"].outcomes == theirs[way.replace(" ", "_")]).all()
    assert (ours.items["retrieval ASR@1"].outcomes == theirs["attacked"]).all()
    assert (ours.items["retrieval ASR@10"].outcomes == theirs["attacked_at_10"]).all()


# attack on disk

def test_the_same_call_writes_the_same_bytes_and_another_seed_does_not(pairs, tmp_path):
    for name, seed in (("a", 4), ("b", 4), ("c", 5)):
        M.attack(pairs, "badnets", "banana", count=6, image_size=32, seed=seed, folder=tmp_path/name)
    a, b, c = (files(tmp_path/n) for n in "abc")
    assert a == b and a.keys() == c.keys() and a["pairs.csv"] != c["pairs.csv"]
    assert not list(tmp_path.glob(".*"))

def test_nothing_in_the_defenders_view_tells_poison_apart(tmp_path):
    source = broken(tmp_path)
    out = tmp_path/"out"
    done = M.attack(source, "badnets", "banana", count=4, image_size=32, settings=CHECKER, folder=out, tolerance=.2)
    with open(out/"pairs.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0]) == ["id", "image", "caption"] and [r["id"] for r in rows] == done.clean.ids
    # in the order of the pairs
    assert [r["image"] for r in rows] == [f"images/{k:06d}.png" for k in range(10)]
    for r in rows:
        with Image.open(out/r["image"]) as picture:
            assert (picture.format, picture.mode, picture.size, picture.info) == ("PNG", "RGB", (32, 32), {})
    assert not any("banana" in p.name or "poison" in p.name for p in (out/"images").iterdir())

def test_pictures_with_several_captions_are_said_in_the_card(tmp_path):
    done = M.attack(several(), "badnets", "banana", count=5, image_size=32, folder=tmp_path/"out")
    assert any("5 poisoned pairs had a picture that other pairs have" in n for n in done.card.notes)
    seen = open_data(str(tmp_path/"out"))
    assert seen.ids == done.pairs.ids and (seen.image_array(None, 32) == done.pairs.image_array(None, 32)).all()
    assert len(list((tmp_path/"out"/"images").iterdir())) == 24 + 5

def test_the_truth_opens_again(pairs, tmp_path):
    # with an array among its settings
    attack = SSBA(encoder_array(build_steganography(8)[0]), 8)
    done = M.attack(pairs, attack, "banana", count=3, image_size=32, seed=2, folder=tmp_path/"out")
    again, target, seed = M.load_attack(tmp_path/"out")
    assert again.describe(32) == attack.describe(32) and (target, seed) == ("banana", 2)
    assert M.load_attack(tmp_path/"out"/"truth")[1:] == ("banana", 2)
    assert load_poisoned(tmp_path/"out"/"truth", pairs).pairs.fingerprint == done.pairs.fingerprint
    assert read_card(tmp_path/"out"/"CARD.md") == done.card

def test_captions_that_a_csv_must_quote_come_back(tmp_path):
    strange = several(8, 1).replace(
        captions=["a, b", 'say "cheese"', "two\nlines", "ends \\", "= 1 + 1", "собака", "a;b\tc", "plain"]
    )
    done = M.attack(strange, "badnets", "banana", count=1, image_size=32, folder=tmp_path/"out")
    assert read_csv_pairs(tmp_path/"out"/"pairs.csv").captions == done.pairs.captions
    assert any("1 captions are mostly in letters other than Latin ones" in n for n in done.card.notes)

KILLED = """
import os, signal, sys
from mcl_repro.tools.measuring import attack
def progress(done, total, unit, note):
    if note == 'writing' and done > 60: os.kill(os.getpid(), signal.SIGKILL)
attack('world:train:120', 'badnets', 'banana', count=6, image_size=32, folder=sys.argv[1], progress=progress)
"""

def test_a_killed_run_leaves_nothing_that_looks_whole_and_the_next_one_is_as_if_undisturbed(pairs, tmp_path):
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path/"out")], capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not (tmp_path/"out").exists() and len(list(tmp_path.iterdir())) == 1
    M.attack(pairs, "badnets", "banana", count=6, image_size=32, folder=tmp_path/"out")
    M.attack(pairs, "badnets", "banana", count=6, image_size=32, folder=tmp_path/"calm")
    assert files(tmp_path/"out") == files(tmp_path/"calm") and not list(tmp_path.glob(".*"))

def test_a_folder_with_something_in_it_is_refused_and_left_alone(pairs, tmp_path):
    (tmp_path/"mine.txt").write_text("mine")
    with pytest.raises(DataError, match="mine.txt is there already"):
        M.attack(pairs, "badnets", "banana", count=6, image_size=32, folder=tmp_path)
    with pytest.raises(DataError, match="is a file"):
        M.attack(pairs, "badnets", "banana", count=6, image_size=32, folder=tmp_path/"mine.txt")
    assert files(tmp_path) == {"mine.txt": b"mine"}
    (tmp_path/"empty").mkdir()
    M.attack(pairs, "badnets", "banana", count=6, image_size=32, folder=tmp_path/"empty")
    assert (tmp_path/"empty"/"pairs.csv").is_file()

def test_a_disk_that_cannot_be_written_is_one_line(pairs, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(M, "write_csv_pairs", full)
    with pytest.raises(StoreError, match="No space left on device.*make room"):
        M.attack(pairs, "badnets", "banana", count=6, image_size=32, folder=tmp_path/"out")
    assert not (tmp_path/"out").exists()


# what is wrong is said before anything is written

@pytest.mark.parametrize("options, words", [
    (dict(name="badnet", count=1), "'badnet' is none of"),
    (dict(name=7, count=1), "an attack is a name"),
    (dict(settings=dict(alpha=1), count=1), "no setting 'alpha'"),
    (dict(), "give either count or rate"),
    (dict(count=1, rate=.1), "give either count or rate"),
    (dict(rate=0.), "poison rate"),
    (dict(rate=1.5), "poison rate"),
    (dict(count=0), "at least 1"),
    (dict(count=500), "more than the"),
    (dict(count=1, target=""), "target: must be the name"),
    (dict(count=1, image_size=0), "image_size"),
    (dict(count=1, image_size=32.), "image_size"),
    (dict(count=1, settings=dict(patch_share=.01), image_size=32), "less than one pixel"),
    (dict(count=1, tolerance=-1), "tolerance"),
    (dict(name="mmpoison", settings=dict(source="banana"), count=1), "is the target itself"),
    (dict(name="ssba", count=1), "needs the setting 'encoder'"),
])
def test_bad_settings_are_one_line_and_nothing_is_written(pairs, tmp_path, options, words):
    options = dict(name="badnets", target="banana", image_size=32) | options
    with pytest.raises(UserError, match=words):
        M.attack(pairs, folder=tmp_path/"out", **options)
    assert not list(tmp_path.iterdir())

def test_pictures_that_cannot_be_read_are_listed_or_refused(tmp_path):
    source = broken(tmp_path)
    with pytest.raises(DataError, match="2 of 12 pairs cannot be read"):
        M.attack(source, "badnets", "banana", count=2, image_size=32, folder=tmp_path/"out")
    assert not (tmp_path/"out").exists()
    done = M.attack(source, "badnets", "banana", count=2, image_size=32, tolerance=.2)
    assert len(done.pairs) == 10 and any("2 of 12 were left out, first empty.png" in n for n in done.card.notes)

def test_an_attack_that_fails_the_conformance_check_is_refused_unless_it_is_waived(pairs):
    class Marks(BadNets):
        name = "marks"
        def paint(self, images, rng):
            images[:] = np.random.default_rng().integers(0, 256, images.shape)
            return images
    with pytest.raises(
        SettingsError, match="marks does not pass the conformance check: the same rng gave different pixels"
    ):
        M.attack(pairs, Marks(), "banana", count=2, image_size=32)
    assert len(M.attack(pairs, Marks(), "banana", count=2, image_size=32, check=False).table) == 2

def test_a_dry_run_writes_nothing(pairs, clip, images, tmp_path):
    cost = M.attack(pairs, "badnets", "banana", rate=.1, image_size=64, folder=tmp_path/"out", dry_run=True)
    assert isinstance(cost, Cost) and cost.pairs == 120 and cost.seconds > 0 and not list(tmp_path.iterdir())
    done = M.attack(pairs, "badnets", "banana", rate=.1, image_size=64, folder=tmp_path/"out")
    used = sum(len(b) for b in files(tmp_path/"out").values())
    assert .5*used < cost.disk < 2*used and len(done.table) == 12
    assert M.measure(clip, images=images, attack="badnets", target="banana", dry_run=True).seconds > 0

def test_a_dry_run_on_broken_pictures_measures_those_that_can_be_read(tmp_path):
    assert M.attack(broken(tmp_path), "badnets", "banana", count=2, image_size=32, dry_run=True).measured.startswith(
        "10 pictures"
    )
    for k in range(10):
        (tmp_path/f"{k}.png").write_bytes(b"")
    with pytest.raises(DataError, match="can be read"):
        M.attack(tmp_path/"list.csv", "badnets", "banana", count=2, image_size=32, dry_run=True)


# a folder from somebody else

@pytest.mark.parametrize("change, words", [
    (lambda a: [a], "not what attack"),
    (lambda a: a | dict(seed="0"), "not what attack"),
    (lambda a: a | dict(settings=None), "not what attack"),
    (lambda a: {k: v for k, v in a.items() if k != "target"}, "not what attack"),
    (lambda a: a | dict(attack="mine"), "if it is your own, register it first"),
    (lambda a: a | dict(settings=dict(exec="print(1)")), "no setting 'exec'"),
    (lambda a: a | dict(settings=dict(pattern=dict(array="../../secret.npy"))), "not a readable array"),
    (lambda a: a | dict(settings=dict(pattern=dict(array="pickle.npy"))), "not a readable array"),
    (lambda a: a | dict(settings=dict(pattern=dict(array=["x"]))), "not a readable array"),
])
def test_a_hostile_folder_is_refused(pairs, clip, images, tmp_path, change, words):
    M.attack(pairs, "badnets", "banana", count=2, image_size=32, folder=tmp_path/"a"/"out")
    truth = tmp_path/"a"/"out"/"truth"
    np.save(tmp_path/"secret.npy", np.zeros((8, 8, 3), np.uint8))
    np.save(tmp_path/"a"/"secret.npy", np.zeros((8, 8, 3), np.uint8))
    np.save(truth/"pickle.npy", np.array([print], object), allow_pickle=True)
    (truth/"poison.json").write_text(json.dumps(change(json.loads((truth/"poison.json").read_text()))))
    with pytest.raises(UserError, match=words):
        M.measure(clip, images=images, attack=tmp_path/"a"/"out")

def test_a_damaged_or_missing_record_is_one_line(tmp_path):
    with pytest.raises(DataError, match="no attack was written there"):
        M.load_attack(tmp_path)
    (tmp_path/"truth").mkdir()
    (tmp_path/"truth"/"poison.json").write_bytes(b"{\xff")
    with pytest.raises(DataError, match="make the poisoned set again"):
        M.load_attack(tmp_path)


# measure

@pytest.mark.parametrize("options, words", [
    (dict(), "nothing to measure"),
    (dict(images="world:train:20"), "has no classes"),
    (dict(pairs="world:zeroshot_test:40"), "has classes and no captions"),
    (dict(images="world:zeroshot_test:40", target="banana"), "without an attack"),
    (dict(images="world:zeroshot_test:40", attack="badnets"), "attack without a target"),
    (dict(images="world:zeroshot_test:40", attack="badnet", target="banana"), "none of"),
    (dict(images="world:zeroshot_test:40", attack="some/where", target="banana"), "no attack was written there"),
    (
        dict(images="world:zeroshot_test:40", attack=BadNets(), settings=dict(alpha=1), target="banana"),
        "settings belong to the name",
    ),
    (dict(images="nowhere.csv"), "no such file"),
    (dict(images="world:zeroshot_test:40", reference="RN-51"), "unknown model"),
    (dict(images="world:zeroshot_test:40", reference=torch.nn.Linear(2, 2)), "has no encode_image"),
])
def test_bad_questions_are_one_line(clip, options, words):
    with pytest.raises(UserError, match=words):
        M.measure(clip, **options)

def test_no_model_is_not_the_reference(clip):
    with pytest.raises(SettingsError, match="not NoneType"):
        M.measure(None, reference=clip, images="world:zeroshot_test:40")

def test_the_model_and_the_random_state_are_left_as_they_were(clip, images):
    before, torch_state, numpy_state = model_fingerprint(clip), torch.get_rng_state(), np.random.get_state()[1].copy()
    one, two = (M.measure(clip, images=images, pairs=several(), attack="badnets", target="banana") for _ in range(2))
    assert model_fingerprint(clip) == before
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert one.table.equals(two.table) and card_text(one.card) == card_text(two.card)

def test_a_reference_is_measured_on_the_same_items(clip, images):
    other = as_clip("mini-RN")                                                                # of another width
    found = M.measure(
        clip, images=images, pairs=several(), attack="badnets", target="banana", reference=other
    ).table.set_index("what")
    alone = M.measure(other, images=images, pairs=several(), attack="badnets", target="banana").table.set_index("what")
    assert (found.before == alone.value).all() and np.allclose(found.difference, found.value - alone.value, atol=1e-3)
    itself = M.measure(clip, images=images, reference=clip).table
    assert (itself.difference == 0).all() and (itself.difference_low == 0).all() and (itself.difference_high == 0).all()

def test_intervals_hold_the_number_and_are_per_cent(clip, images):
    t = M.measure(clip, images=images, pairs=several(), attack="badnets", target="banana").table
    assert (t.ci_low <= t.value).all() and (t.value <= t.ci_high).all() and set(t.unit) == {"%", "rank"}
    shares = t[t.unit == "%"]
    assert shares.value.between(0, 100).all() and (shares.ci_low >= 0).all() and (shares.ci_high <= 100).all()
    assert t.set_index("what").loc["Hit@1, text to image", "items"] == 72

def test_what_cannot_be_attacked_is_said(clip, images):
    rows = np.flatnonzero(images.labels == images.classnames.index("banana"))
    bananas = images.select(rows)
    found = M.measure(clip, images=bananas, attack="badnets", target="banana")
    assert list(found.table.what) == ["CA"] and "nothing is left to attack" in found.card.notes[0]
    found = M.measure(clip, images=images, pairs=several(), attack=MmPoison(), target="banana")
    assert not any("ASR" in w for w in found.table.what) and sum("no trigger" in n for n in found.card.notes) == 1
    all_named = several(4, 1).replace(captions=["a banana", "bananas", "one banana", "two bananas"])
    found = M.measure(clip, pairs=all_named, attack="badnets", target="banana")
    assert not any("ASR" in w for w in found.table.what) and "has a caption that names 'banana'" in found.card.notes[0]

def test_one_item_is_enough(clip, images):
    assert M.measure(clip, images=images.select([0]), attack="badnets", target="umbrella")["ASR"] in (0, 100)
    assert M.measure(clip, pairs=several(1, 1))["Hit@1, image to text"] == 100

def test_labelled_pictures_that_cannot_be_read_are_listed_or_refused(clip, tmp_path):
    rng = np.random.default_rng(0)
    for k in range(8):
        (tmp_path/"cat dog".split()[k % 2]).mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + k, 40, 3)).astype(np.uint8)).convert(
            "RGB L RGBA P".split()[k % 4]
        ).save(tmp_path / "cat dog".split()[k % 2] / f"{k}.png")
    (tmp_path/"cat"/"9.png").write_bytes(b"")
    with pytest.raises(DataError, match="1 of 9 pairs cannot be read"):
        M.measure(clip, images=tmp_path)
    found = M.measure(clip, images=tmp_path, tolerance=.2)
    assert found.table["items"].tolist() == [8] and any("1 of 9 were left out" in n for n in found.card.notes)

def test_the_words_of_a_card_name_no_place_of_this_machine(clip, pairs, images, tmp_path):
    save_clip(clip, tmp_path/"suspicious.safetensors")
    done = M.attack(pairs, "badnets", "banana", count=2, image_size=32, folder=tmp_path/"out")
    text = card_text(
        M.measure(tmp_path / "suspicious.safetensors", images=images, attack=tmp_path / "out").card
    ) + card_text(done.card)
    assert "smoke-RN (suspicious.safetensors), measured" in text and str(tmp_path) not in text

def test_a_model_of_ones_own_and_a_tokenizer_of_ones_own(images):
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.pixels, self.letters = torch.nn.Linear(3*16*16, 8), torch.nn.EmbeddingBag(256, 8)
        def encode_image(self, x):
            return self.pixels(torch.nn.functional.adaptive_avg_pool2d(x, 16).flatten(1))
        def encode_text(self, tokens):
            return self.letters(tokens)
    own = as_clip(
        Own(), tokenizer=lambda captions: torch.tensor([list(c.encode()[:32].ljust(32)) for c in captions]),
        image_size=32,
    )
    found = M.measure(own, images=images, pairs=several(), attack="trojvqa", target="banana")
    assert {"CA", "ASR", "retrieval ASR@10"} <= set(found.table.what) and found.table.value.notna().all()

def test_progress_counts_every_picture(clip, images):
    told = []
    M.measure(clip, images=images, attack="badnets", target="banana", progress=lambda *a: told.append(a))
    assert told[0] == (80, 80, "pictures", "embedding")
    assert told[-1] == (80, 80, "pictures", "embedding with the trigger")
