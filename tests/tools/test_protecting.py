"Protecting somebody's photos: bad files, kills at every point, other people's folders, and what the card may say."
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from mcl_repro.tools import protecting
from mcl_repro.tools.cards import read_card
from mcl_repro.model.clip import save_clip
from mcl_repro.data.readers import read_csv_pairs
from mcl_repro.data.registry import open_data
from mcl_repro.core.errors import DataError, SettingsError
from mcl_repro.tools.inputs import as_clip, Cost, model_fingerprint
from mcl_repro.papers.mem import Search
from mcl_repro.tools.protecting import (
    enlarge_noise, numbers_of, pair_facts, protect, training_recipe, UNTESTED, verify,
)
from mcl_repro.model.training import Recipe
from mcl_repro.attacks.protection import write_published

QUICK = dict(search=dict(noise_steps=2, candidates=2, length=2), recipe=dict(epochs=2), round_steps=3)
TEST = "world:retrieval_flickr8k:15"

@pytest.fixture(scope="module")
def pairs():
    return open_data("world:train:24")

@pytest.fixture(scope="module")
def done(tmp_path_factory, pairs):
    folder = tmp_path_factory.mktemp("done")/"photos"
    return protect(pairs, "smoke-RN", folder, **QUICK)

@pytest.fixture
def copied(done, tmp_path):
    return Path(shutil.copytree(done.folder, tmp_path/"photos"))

def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}

def photo_folder(folder, damaged=()):
    "Photos of all modes and sizes; `damaged` may be 'empty', 'half', 'note'."
    rng, names = np.random.default_rng(0), []
    for k, mode in enumerate(["RGB", "L", "RGBA", "P", "CMYK", "1", "LA"]):
        name = f"{k}.{'jpg' if mode in ('RGB', 'L', 'CMYK') else 'png'}"
        Image.fromarray(rng.integers(0, 256, (40 + 17*k, 90 - 8*k, 3)).astype(np.uint8)).convert(mode).save(folder/name)
        names.append(name)
    Image.fromarray(rng.integers(0, 256, (20, 24, 3)).astype(np.uint8)).save(folder/"small.png")
    names.append("small.png")
    if "empty" in damaged:
        (folder/"empty.jpg").write_bytes(b"")
        names.append("empty.jpg")
    if "half" in damaged:
        (folder/"half.png").write_bytes((folder/"3.png").read_bytes()[:300])
        names.append("half.png")
    if "note" in damaged:
        Image.new("RGB", (50, 40), "red").save(folder/"note.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\xff")
        names.append("note.jpg")
    rows = "".join(f"{n},picture number {i}\n" for i, n in enumerate(names))
    (folder/"pairs.csv").write_text(f"image,caption\n{rows}")
    return folder/"pairs.csv"

# ---- the same call gives the same bytes, whatever happened on the way

def test_two_runs_leave_the_same_files(done, tmp_path, pairs):
    again = protect(pairs, "smoke-RN", tmp_path/"other", **QUICK)
    assert files(again.folder) == files(done.folder)
    free = protect(pairs, "smoke-RN", **QUICK)
    assert (free.folder, free.card, free.table.to_csv()) == (None, done.card, done.table.to_csv())
    assert free.protection.noise.tobytes() == done.protection.noise.tobytes()
    assert not isinstance(free.protection.noise, np.memmap)

@pytest.mark.parametrize("unit, at", [("batches", 1), ("batches", 2), ("pairs", 24)])
def test_a_killed_call_goes_on_to_the_same_files(done, tmp_path, pairs, unit, at):
    seen = []
    def kill(done_, total, what="", note=""):
        seen.append(what)
        if what == unit and seen.count(unit) == (at if unit == "batches" else 1):
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        protect(pairs, "smoke-RN", tmp_path/"photos", progress=kill, **QUICK)
    assert not (tmp_path/"photos"/"CARD.md").exists()
    again = protect(pairs, "smoke-RN", tmp_path/"photos", **QUICK)
    assert files(again.folder) == files(done.folder)

def test_a_failed_publication_loses_nothing(done, tmp_path, pairs, monkeypatch):
    folder, real = tmp_path/"photos", write_published
    def full_disk(published, part, format):
        real(published.select(range(3)), part, format)
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(protecting, "write_published", full_disk)
    with pytest.raises(OSError):
        protect(pairs, "smoke-RN", folder, **QUICK)
    assert not (folder/"published").exists() and (folder/"search.json").is_file()
    monkeypatch.setattr(protecting, "write_published", real)
    monkeypatch.setattr(protecting, "protect_pairs", lambda *a, **k: pytest.fail("searched twice"))
    again = protect(pairs, "smoke-RN", folder, format="coco", **QUICK)          # another format may be the way out
    assert len(again.pairs) == 24 and again.check["exact_pixels"] == 1
    assert files(folder/"protection") == files(done.folder/"protection") and not (folder/"published.part").exists()

@pytest.mark.parametrize("format", ["flickr", "coco", "webdataset"])
def test_every_format_carries_the_same_pairs(done, copied, pairs, format):
    shutil.rmtree(copied/"published")
    made = protect(pairs, "smoke-RN", copied, format=format, **QUICK)
    assert made.pairs.ids == pairs.ids and made.pairs.captions == done.pairs.captions
    assert (made.check["exact_pixels"], made.check["exact_captions"]) == (1, done.check["exact_captions"])
    assert (made.pairs.image_array(None, 32) == done.pairs.image_array(None, 32)).all()

# ---- the surrogate

def test_the_given_surrogate_stays_as_it_is(pairs):
    clip = as_clip("smoke-RN")
    clip.model.train()
    before, flags = model_fingerprint(clip), [p.requires_grad for p in clip.model.parameters()]
    protect(pairs, clip, **QUICK)
    assert model_fingerprint(clip) == before
    assert clip.model.training
    assert [p.requires_grad for p in clip.model.parameters()] == flags
    assert all(p.grad is None for p in clip.model.parameters())

def test_a_checkpoint_is_another_surrogate_than_an_untrained_one(copied, pairs, tmp_path):
    other = as_clip("smoke-RN")
    with torch.no_grad():
        other.model.logit_scale += .1
    save_clip(other, tmp_path/"mine.safetensors")
    with pytest.raises(SettingsError, match="surrogate: .* there, .* here"):
        protect(pairs, tmp_path/"mine.safetensors", copied, **QUICK)
    with pytest.raises(DataError, match="no checkpoint at"):
        protect(pairs, tmp_path/"none.safetensors", **QUICK)

def test_numbers_may_be_given_as_objects(pairs):
    clip, recipe = as_clip("smoke-RN"), Recipe(4, 500, 1e-3)
    found = numbers_of(clip, 24, search=Search(bound=3), recipe=recipe)
    assert (found.search, found.recipe) == (Search(bound=3), Recipe(4, 24, 1e-3))
    with pytest.raises(SettingsError, match="recipe has no setting 'rounds'"):
        numbers_of(clip, 24, recipe=dict(rounds=2))
    with pytest.raises(SettingsError, match="bound must be at least 1"):
        numbers_of(clip, 24, search=dict(bound=0))

def test_two_pairs_are_enough(pairs):
    made = protect(pairs.select([0, 1]), "smoke-RN", **QUICK)
    assert len(made.table) == 2 and np.abs(made.protection.noise).max() > 0

# ---- bad input

def test_unreadable_photos_are_listed_and_left_out(tmp_path):
    source = photo_folder(tmp_path, ("empty", "half", "note"))
    with pytest.raises(DataError, match="2 of 11 pairs cannot be read, more than the tolerated 1.00%"):
        protect(source, "smoke-RN", tmp_path/"out", **QUICK)
    assert not (tmp_path/"out").exists()
    made = protect(source, "smoke-RN", tmp_path/"out", tolerance=.2, **QUICK)
    listed = pd.read_csv(tmp_path/"out"/"left_out.csv")
    assert list(listed["id"]) == ["empty.jpg#0", "half.png#0"]
    assert listed["problem"].str.contains("empty.jpg|half.png").all()
    assert len(read_csv_pairs(tmp_path/"out"/"published"/"pairs.csv")) == 9
    assert any("pairs: 2 of 11 were left out" in n for n in made.card.notes)

def test_long_captions_are_named_before_any_work(pairs, tmp_path, monkeypatch):
    wordy = pairs.replace(captions={k: "a dog " * 40 for k in (2, 3, 5, 7)})
    monkeypatch.setattr(protecting, "readable_pairs", lambda *a, **k: pytest.fail("pictures were read"))
    with pytest.raises(DataError, match=f"the caption of {pairs.ids[2]} has 82 tokens .* and 1 more. Shorten them"):
        protect(wordy, "smoke-RN", tmp_path/"out", **QUICK)
    with pytest.raises(SettingsError, match="triggers of 99 tokens leave no room"):
        protect(pairs, "smoke-RN", search=dict(length=99))

@pytest.mark.parametrize("settings, message", [
    (dict(format="zip"), "'zip' is none of csv, flickr, coco, webdataset"),
    (dict(format="coco", keep_size=True), "published as csv, not as coco"),
    (dict(method="MEM"), "'MEM' is none of"),
    (dict(tolerance=2.), "tolerance is the share"),
    (dict(search=dict(words="poems")), "poems"),
    (dict(speed=3), "protect has no setting 'speed'"),
])
def test_settings_that_cannot_work_are_refused_before_any_work(pairs, tmp_path, settings, message):
    with pytest.raises(SettingsError, match=message):
        protect(pairs, "smoke-RN", tmp_path/"out", **{**QUICK, **settings})
    assert not (tmp_path/"out"/"protection").exists()

def test_a_line_break_stops_a_flickr_file_before_any_work(pairs, tmp_path):
    with pytest.raises(DataError, match="has a line break, which a Flickr file cannot hold.*--format csv"):
        protect(pairs.replace(captions={2: "two\nlines"}), "smoke-RN", tmp_path/"out", format="flickr", **QUICK)
    assert not (tmp_path/"out").exists()

def test_other_peoples_folders_are_left_alone(pairs, tmp_path):
    (tmp_path/"mine").mkdir()
    (tmp_path/"mine"/"letter.txt").write_text("dear")
    with pytest.raises(SettingsError, match="holds other things"):
        protect(pairs, "smoke-RN", tmp_path/"mine", **QUICK)
    with pytest.raises(SettingsError, match="is a file"):
        protect(pairs, "smoke-RN", tmp_path/"mine"/"letter.txt", **QUICK)
    assert files(tmp_path/"mine") == {"letter.txt": b"dear"}

def test_remarks_on_pairs_that_are_not_what_they_seem(pairs):
    rows = [4 if k == 5 else k for k in range(24)]
    odd = pairs.replace(captions={3: "собака бежит", 5: pairs.captions[4]}, image_rows=rows)
    notes = " ".join(protect(odd, "smoke-RN", **QUICK).card.notes)
    assert "1 captions are mostly in letters other than Latin ones" in notes
    assert "1 pairs share their picture" in notes
    assert "1 pairs are the same picture and caption" in notes

# ---- what was published

def test_changed_files_are_noticed(copied, pairs):
    picture = copied/"published"/"images"/"000003.png"
    pixels = np.asarray(Image.open(picture)).copy()
    pixels[:4] ^= 64
    Image.fromarray(pixels).save(picture)
    made = protect(pairs, "smoke-RN", copied, **QUICK)
    assert made.card.tone == "bad"
    assert made.card.outcome.startswith("4.2% of the published pictures are not as they were made")

def test_missing_and_escaping_rows_are_refused(copied, pairs):
    table = copied/"published"/"pairs.csv"
    lines = table.read_text().splitlines(True)
    table.write_text("".join(lines[:-1]))
    with pytest.raises(DataError, match=f"{pairs.ids[-1]} is missing from what was published"):
        protect(pairs, "smoke-RN", copied, **QUICK)
    table.write_text("".join([lines[0], *(l.replace("images/", "../../../") for l in lines[1:])]))
    with pytest.raises(DataError, match="outside the data folder"):
        protect(pairs, "smoke-RN", copied, **QUICK)

def test_damaged_notes_and_noise_are_named(copied, pairs):
    (copied/"protect.json").write_text("{")
    with pytest.raises(DataError, match="protect.json"):
        protect(pairs, "smoke-RN", copied, **QUICK)
    shutil.rmtree(copied)

def test_noise_of_others_is_refused(copied, pairs):
    noise = np.load(copied/"protection"/"noise.npy")
    noise[0, 0, 0, 0] ^= 1
    np.save(copied/"protection"/"noise.npy", noise)
    with pytest.raises(DataError, match="another SHA-256"):
        protect(pairs, "smoke-RN", copied, **QUICK)

def test_the_card_on_disk_is_the_card(done):
    assert read_card(done.folder/"CARD.md") == done.card
    assert UNTESTED in done.card.outcome and done.card.tone == "neutral" and done.card.kind == "protected pairs"
    assert any("32 x 32 pixels" in l["text"] for l in done.card.limits) and "32 x 32 pixels" in done.card.outcome
    assert {r["what"] for r in done.card.measured} >= {
        "PSNR of published pictures", "noise that is left, after jpeg_75", "noise that is left, after resize",
    }
    report = pd.read_csv(done.folder/"report.csv", keep_default_na=False)
    assert list(report["id"]) == done.pairs.ids
    assert (report["linf"] <= 8).all()
    assert list(report["caption"]) == done.pairs.captions
    published = {p.name for p in (done.folder/"published").rglob("*")}
    assert not published & {"CARD.md", "report.csv", "noise.npy", "triggers.npy"}

def test_a_page_is_one_file(done, tmp_path):
    text = done.page(tmp_path/"page.html").read_text()
    assert text.lstrip().lower().startswith("<!doctype html") and "data:image/" in text and "The first 20 of 24" in text

# ---- photos at their own size

def test_whole_photos_keep_size_and_bound(tmp_path):
    source = photo_folder(tmp_path)
    made = protect(source, "smoke-RN", tmp_path/"out", keep_size=True, **QUICK)
    given = read_csv_pairs(source)
    assert [made.pairs[k].image.size for k in range(8)] == [given[k].image.size for k in range(8)]
    assert made.table["linf"].between(1, 8).all()
    assert any("1 photos are smaller than the 32 pixels" in n for n in made.card.notes)
    large = made.table[np.minimum(made.table["width"], made.table["height"]) > 40]
    assert (large["cosine_published"] > .6).all() and (made.table["kept_published"] > 0).all()
    assert "at their own size" in made.card.outcome
    again = protect(source, "smoke-RN", tmp_path/"out", keep_size=True, **QUICK)
    assert again.card == made.card
    with pytest.raises(SettingsError, match="keep_size: True there, False here"):
        protect(source, "smoke-RN", tmp_path/"out", **QUICK)

@pytest.mark.parametrize("size", [(32, 32), (33, 32), (40, 90), (90, 40), (31, 77), (12, 12), (640, 427)])
def test_enlarged_noise_stays_in_its_bound_and_square(size):
    noise = np.random.default_rng(0).integers(-8, 9, (32, 32, 3)).astype(np.int8)
    large = enlarge_noise(noise, size)
    assert large.shape == (size[1], size[0], 3) and np.abs(large).max() <= 8
    if size == (32, 32):
        assert (large == noise).all()
    width, height = size
    edge = (max(size) - min(size))//2 - 2
    outside = large[:, :edge] if width > height else large[:edge]
    if edge > 0:
        assert (outside == 0).all()

def test_facts_of_a_picture_that_did_not_change():
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    told = pair_facts(picture, picture, np.zeros((32, 32, 3), np.int8))
    assert (told["psnr"], told["linf"], told["kept_published"], told["cosine_jpeg_75"]) == (np.inf, 0, 0, 0)

def test_published_photos_look_as_the_given_ones_did_and_are_not_turned_twice(tmp_path):
    source, exif = photo_folder(tmp_path, ("note",)), Image.Exif()
    exif[0x0112] = 6
    lying = np.asarray(Image.linear_gradient("L").resize((60, 90)).convert("RGB"))
    Image.fromarray(lying).save(tmp_path/"0.jpg", exif=exif)
    clear = Image.fromarray(lying).convert("RGBA")
    clear.putalpha(0)
    clear.save(tmp_path/"2.png")
    made = protect(source, "smoke-RN", tmp_path/"out", keep_size=True, **QUICK)
    written = [Image.open(tmp_path/"out/published"/name) for name in made.pairs.images.names]
    assert made.pairs[0].image.size == written[0].size == (90, 60)
    assert all(picture.getexif().get(0x0112, 1) == 1 for picture in written)
    shown = np.rot90(lying, -1).astype(int)
    assert np.abs(np.asarray(written[0]) - shown).max() <= 8 + 16        # the noise, and JPEG
    assert np.asarray(written[2].convert("RGB")).min() >= 255 - 8
    assert made.pairs[8].image.size == (50, 40)                        # a note that cannot be read is no note

@pytest.mark.parametrize("size", [(3, 50), (50, 3), (1, 40), (7, 61), (61, 7), (31, 200)])
def test_noise_of_a_thin_photo_is_that_of_the_whole(size):
    noise = np.random.default_rng(0).integers(1, 9, (32, 32, 3)).astype(np.int8)
    (width, height), scaled = size, int(32*max(size)/min(size))
    w, h = (32, scaled) if width <= height else (scaled, 32)
    left, top = int(round((w - 32)/2)), int(round((h - 32)/2))
    canvas = np.full((h, w, 3), 128, np.uint8)
    canvas[top:top + 32, left:left + 32] = noise.astype(np.int16) + 128
    whole = np.asarray(Image.fromarray(canvas).resize(size, Image.Resampling.BOX)).astype(int) - 128
    thin = enlarge_noise(noise, size)
    assert thin.shape == whole.shape and np.abs(thin - whole).max() <= 1 and thin.any()

@pytest.mark.parametrize("shape", [(6000, 1), (3, 5000)])
def test_thin_photos_take_no_memory(shape, monkeypatch):
    largest = [0]
    for name in ("full", "pad"):
        real = getattr(np, name)
        def watched(*args, real=real, **options):
            made = real(*args, **options)
            largest[0] = max(largest[0], made.size)
            return made
        monkeypatch.setattr(np, name, watched)
    noise = np.random.default_rng(0).choice([-8, 8], (32, 32, 3)).astype(np.int8)
    before = np.full((*shape, 3), 128, np.uint8)
    after = (before + enlarge_noise(noise, shape[::-1])).astype(np.uint8)
    told = pair_facts(before, after, noise)
    assert (told["width"], told["height"]) == shape[::-1] and told["linf"] <= 8
    assert 0 < largest[0] <= 50_000

# ---- cost

def test_a_dry_run_leaves_nothing(pairs, tmp_path):
    cost = protect(pairs, "smoke-RN", tmp_path/"out", dry_run=True, **QUICK)
    assert isinstance(cost, Cost) and cost.pairs == 24 and min(cost.seconds, cost.memory, cost.disk) > 0
    assert not (tmp_path/"out").exists()
    more = protect(pairs, "smoke-RN", dry_run=True, **{**QUICK, "round_steps": 3000})
    assert more.seconds > 10*cost.seconds

# ---- did it work?

def test_a_verdict_is_found_once_and_kept(copied, pairs, monkeypatch):
    made = protect(pairs, "smoke-RN", copied, **QUICK)
    tested = verify(made, TEST, recipe=dict(epochs=2))
    assert read_card(copied/"CARD.md") == tested.card and UNTESTED not in tested.card.outcome
    assert set(tested.verified["trained_on"]) == {"nothing", "clean", "protected"} and not (copied/"verify").exists()
    monkeypatch.setattr(protecting, "train", lambda *a, **k: pytest.fail("trained twice"))
    assert verify(made, TEST, recipe=dict(epochs=2)).card == tested.card
    assert protect(pairs, "smoke-RN", copied, **QUICK).card == tested.card
    shutil.rmtree(copied/"published")
    other = protect(pairs, "smoke-RN", copied, format="coco", **QUICK)
    assert other.verified is None and UNTESTED in other.card.outcome           # other files: nothing is known of these

def test_a_killed_verification_goes_on_to_the_same_numbers(copied, done, pairs):
    made, recipe = protect(pairs, "smoke-RN", copied, **QUICK), dict(epochs=5, batch_size=8)
    def kill(*told):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        verify(made, TEST, "smoke-RN", recipe, progress=kill)
    kept = list((copied/"verify").glob("*-clean.safetensors"))
    assert len(kept) == 1
    went_on = verify(made, TEST, "smoke-RN", recipe)
    straight = verify(protecting.replace(done, folder=None), TEST, "smoke-RN", recipe)
    assert went_on.verified.equals(straight.verified) and not kept[0].exists()

def test_a_model_of_another_size_reads_the_published_squares(done):
    class Wide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.pixels, self.words = torch.nn.Linear(3*8*8, 8), torch.nn.EmbeddingBag(256, 8)
        def encode_image(self, x):
            return self.pixels(torch.nn.functional.adaptive_avg_pool2d(x, 8).flatten(1))
        def encode_text(self, tokens):
            return self.words(tokens)
    def count_letters(captions):
        return torch.tensor([list(c.encode()[:40].ljust(40)) for c in captions])
    wide = as_clip(Wide(), tokenizer=count_letters, image_size=48)
    free = protecting.replace(done, folder=None)
    assert len(verify(free, TEST, wide, dict(epochs=1)).verified) == 12
    assert verify(free, TEST, wide, dict(epochs=1), change="jpeg_50").card.settings["verified"]["change"] == "jpeg_50"

def test_few_pairs_are_trained_on_more_often():
    recipe = dict(epochs=6, batch_size=128)
    assert training_recipe(recipe, 100_000) == recipe
    few = training_recipe(recipe, 300)
    assert few["batch_size"] == 37 and few["epochs"]*(300//37) >= 150
    assert training_recipe(recipe, 2)["batch_size"] == 16
