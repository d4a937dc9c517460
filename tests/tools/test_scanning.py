"""Scanning sets of one's own: nothing computed is lost or trusted blindly, nothing unreadable is passed over, and the
same call writes the same bytes.
"""
import csv, html, json
from dataclasses import replace

import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from sklearn.base import clone

from mcl_repro.tools import scanning
from mcl_repro.tools.cards import read_card
from mcl_repro.papers.cfbd import load_mapping, MappingNetwork
from mcl_repro.model.clip import build_clip
from mcl_repro.data.pairs import ArrayImages, Pairs
from mcl_repro.data.readers import read_csv_pairs
from mcl_repro.core.errors import DataError, SettingsError, StoreError, UserError
from mcl_repro.tools.inputs import as_clip, Cost
from mcl_repro.tools.scanning import (
    COLUMNS, embed_stream, PoisonDetector, quality, Scan, scan, scan_figure, search,
)
from colour_clip import ColourClip, colour_clip, poisoned, read_words, squares


@pytest.fixture(scope="module")
def clip():
    return colour_clip()

@pytest.fixture(scope="module")
def suspect():
    return poisoned(squares(1200, 1))

@pytest.fixture(scope="module")
def found(clip, suspect):
    return scan(clip, suspect.pairs)

class Killed(Exception):
    pass

def killer(unit, at):
    def progress(done, total, what, note):
        if what == unit and done >= at:
            raise Killed
    return progress

def embedded(clip, pairs, folder, **options):
    "Both tables, and how many pictures and captions were embedded for them."
    before = clip.model.module.seen, clip.model.module.read
    got = embed_stream(clip, pairs, folder, block=256, **options)
    # one picture tells the width
    return (
        np.asarray(got.images[:]), np.asarray(got.texts[:]), clip.model.module.seen - before[0] - 1,
        clip.model.module.read - before[1],
    )


# ---- what is refused, before any work

@pytest.fixture
def no_work(monkeypatch):
    def began(*args, **kwargs):
        raise AssertionError("long work began")
    monkeypatch.setattr(scanning, "embed_stream", began)

@pytest.mark.parametrize("change, says", [
    (dict(method="cfdb"), "unknown method 'cfdb' of scanning: use one of contrast, cfbd"),
    (dict(model=torch.nn.Linear(2, 2)), "has no encode_image"),
    (dict(model=ColourClip()), "comes without a tokenizer"),
    (dict(pairs="world:zeroshot_test:200"), "has classes and no captions"),
    (dict(pairs="nowhere.csv"), "nowhere.csv"),
    (dict(pairs=squares(79, 0)), "79 pairs are too few to scan"),
    (dict(tolerance=1.5), "tolerance is the share"),
    (dict(mapping=MappingNetwork(64, 8)), "method contrast needs neither"),
    (dict(trusted=squares(80, 1)), "method contrast needs neither"),
    (dict(method="cfbd", trusted=squares(80, 1), mapping=MappingNetwork(64, 8)), "not both"),
    (dict(method="cfbd", mapping=MappingNetwork(32, 8)), "it maps embeddings of width 32, colours gives 64"),
    (dict(method="cfbd", mapping="nowhere.safetensors"), "nowhere.safetensors"),
    (dict(method="cfbd", trusted="nowhere.csv"), "nowhere.csv"),
    (dict(sizes=[500]), "a quarter of the set, 300, not 500"),
    (dict(sizes=[5]), "not 5"),
    (dict(sizes=[50.]), "not 50.0"),
    (dict(options=dict(margn=1)), "unknown option of contrast 'margn'; did you mean margin"),
    (dict(method="cfbd", options=dict(subsets=1)), "unknown option of cfbd"),
    (dict(pretrained="openai"), "pretrained: colours is a Clip"),
])
def test_what_cannot_work_is_refused_before_any_work(no_work, clip, suspect, tmp_path, change, says):
    call = dict(dict(model=clip, pairs=suspect.pairs), **change)
    with pytest.raises(UserError) as e:
        scan(call.pop("model"), call.pop("pairs"), folder=tmp_path/"x", **call)
    assert says in str(e.value) and "\n" not in str(e.value) and not (tmp_path/"x").exists()

def test_a_model_that_fails_on_some_pairs_is_named_with_the_first(suspect):
    class Odd(ColourClip):
        def encode_text(self, tokens):
            return super().encode_text(tokens) / (tokens != 4000)[:, :1]
    odd = as_clip(
        Odd(),
        tokenizer=lambda captions: torch.stack(
            [torch.full((16,), 4000) if "w7" in c else t for c, t in zip(captions, read_words(captions))]
        ),
        image_size=32,
    )
    with pytest.raises(SettingsError, match="numbers that are not finite for 1 pairs, first squares-9"):
        scan(odd, suspect.pairs.replace(captions={9: "w7"}))

def test_too_few_pairs_that_can_be_read(clip, tmp_path):
    pairs = stored(tmp_path, 85, broken=range(10))
    with pytest.raises(DataError, match="75 pairs are too few to scan"):
        scan(clip, pairs, tolerance=.5)

def test_a_full_disk_is_said_before_it_is_filled(clip, suspect, tmp_path, monkeypatch):
    monkeypatch.setattr(scanning.shutil, "disk_usage", lambda path: type("usage", (), dict(free=1000))())
    with pytest.raises(StoreError, match="make room or choose another folder"):
        embed_stream(clip, suspect.pairs, tmp_path)


# ---- pictures that cannot be read

def stored(folder, count, broken=(), missing=()):
    "Pairs as files of mixed modes; some are empty, cut off or not there."
    made = squares(count, 5)
    (folder/"images").mkdir(parents=True)
    lines = []
    for k in range(count):
        picture = Image.fromarray(made.image_array([k], 32)[0])
        path = folder/"images"/f"{k}.png"
        (picture.convert("RGBA") if k % 5 == 1 else picture.convert("P") if k % 5 == 2 else picture).save(path)
        if k in broken:
            path.write_bytes(b"" if k % 2 else path.read_bytes()[:300])
        lines.append((f"images/{k}.png", made.captions[k]))
    with open(folder/"pairs.csv", "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([("image", "caption"), *lines])
    pairs = read_csv_pairs(folder/"pairs.csv")
    for k in missing:
        (folder/"images"/f"{k}.png").unlink()
    return pairs

def test_what_cannot_be_read_is_listed_and_never_passed_over(clip, tmp_path):
    pairs = stored(tmp_path/"data", 400, broken=(3, 8), missing=(200,))
    done = scan(clip, pairs, tolerance=.02, folder=tmp_path/"work")
    done.write(tmp_path/"out")
    told = pd.read_csv(tmp_path/"out"/"scan.csv")
    assert list(told.columns) == list(COLUMNS)
    assert len(told) == 400
    assert list(told.index[told["verdict"] == "unreadable"]) == [3, 8, 200]
    assert told.loc[[3, 8, 200], ["score", "fit"]].isna().all().all() and told.drop([3, 8, 200])["fit"].notna().all()
    assert list(done.problems["id"]) == [pairs.ids[k] for k in (3, 8, 200)]
    assert done.facts["captions_cut"] == 0
    assert len(done.kept) <= 397
    card = read_card(tmp_path/"out"/"CARD.md")
    assert any("3 of 400 were left out" in n for n in card.notes)
    assert any("fewer than 1,000" in n for n in card.notes)
    assert "Pairs that could not be read" in (tmp_path / "out" / "scan.html").read_text()
    with pytest.raises(DataError, match="3 of 400 pairs cannot be read"):
        scan(clip, pairs, tolerance=0., folder=tmp_path/"work")      # what was embedded before does not hide them
    again = scan(clip, pairs, tolerance=.02, folder=tmp_path/"work")
    assert np.array_equal(again.score, done.score) and list(again.problems["id"]) == list(done.problems["id"])

def test_above_the_tolerance_it_stops_after_the_first_block(clip, tmp_path):
    pairs = stored(tmp_path/"data", 700, broken=range(0, 200, 4))
    before = (clip.model.module.seen, clip.model.module.read)
    seen = []
    with pytest.raises(DataError, match="50 of 700 pairs cannot be read, more than the tolerated 1.00%"):
        embed_stream(clip, pairs, tmp_path/"work", block=256, progress=lambda *told: seen.append(told))
    # the one picture that tells the width
    assert not seen and clip.model.module.seen - before[0] == 1 and clip.model.module.read == before[1]


# ---- interrupted, and gone on with

@pytest.mark.parametrize("unit, at, left", [
    ("pictures", 256, (944, 1200)),
    ("pictures", 1200, (0, 1200)),
    ("captions", 1200, (0, 0)),
])
def test_a_killed_scan_goes_on_to_the_same_numbers(clip, suspect, tmp_path, unit, at, left):
    whole = embedded(clip, suspect.pairs, tmp_path/"whole")
    with pytest.raises(Killed):
        embedded(clip, suspect.pairs, tmp_path/"part", progress=killer(unit, at))
    images, texts, *more = embedded(clip, suspect.pairs, tmp_path/"part")
    assert tuple(more) == left
    assert np.array_equal(images, whole[0])
    assert np.array_equal(texts, whole[1])
    assert whole[2:] == (1200, 1200)

def tear_state(folder):
    (folder/"state.json").write_text((folder/"state.json").read_text()[:40])
def empty_state(folder):
    (folder/"state.json").write_bytes(b"")
def list_state(folder):
    (folder/"state.json").write_text("[]")
def odd_state(folder):
    put(folder, images=-3)
def far_state(folder):
    put(folder, images=99999)
def odd_errors(folder):
    put(folder, errors=dict(x="y"))
def put(folder, **changes):
    (folder/"state.json").write_text(json.dumps(json.loads((folder/"state.json").read_text()) | changes))
def short_images(folder):
    np.save(folder/"images.npy", np.zeros((5, 64), np.float16))
def narrow_images(folder):
    np.save(folder/"images.npy", np.zeros((1200, 32), np.float16))
def wide_numbers(folder):
    np.save(folder/"images.npy", np.zeros((1200, 64), np.float32))
def no_images(folder):
    (folder/"images.npy").unlink()
def cut_images(folder):
    (folder/"images.npy").write_bytes((folder/"images.npy").read_bytes()[:5000])
def pickled_images(folder):
    np.save(folder/"images.npy", np.array([dict(a=1)], object), allow_pickle=True)

@pytest.mark.parametrize("damage", [
    tear_state, empty_state, list_state, odd_state, far_state, odd_errors, short_images, narrow_images, wide_numbers,
    no_images, cut_images, pickled_images,
])
def test_files_that_do_not_fit_are_not_trusted(clip, suspect, tmp_path, damage):
    whole = embedded(clip, suspect.pairs, tmp_path)
    damage(tmp_path)
    images, texts, seen, read = embedded(clip, suspect.pairs, tmp_path)
    assert seen == 1200 and np.array_equal(images, whole[0]) and np.array_equal(texts, whole[1])
    # captions whose table fits are kept
    assert read == (0 if damage.__name__.endswith(("images", "numbers")) or damage is far_state else 1200)

def test_a_damaged_table_of_captions_is_made_again(clip, suspect, tmp_path):
    whole = embedded(clip, suspect.pairs, tmp_path)
    np.save(tmp_path/"texts.npy", np.zeros((1200, 3), np.float16))
    images, texts, *more = embedded(clip, suspect.pairs, tmp_path)
    assert more == [0, 1200] and np.array_equal(texts, whole[1])

def test_another_model_or_other_pairs_begin_anew(clip, suspect, tmp_path):
    embedded(clip, suspect.pairs, tmp_path)
    other = colour_clip(things=("banana",))
    assert embedded(other, suspect.pairs, tmp_path)[2:] == (1200, 1200)
    changed = suspect.pairs.replace(captions={4: "a red square"})
    assert embedded(other, changed, tmp_path)[2:] == (1200, 1200) and embedded(other, changed, tmp_path)[2:] == (0, 0)


# ---- the same call, the same bytes

def test_the_same_scan_writes_the_same_bytes(clip, suspect, tmp_path):
    for name in ("one", "two"):
        scan(clip, suspect.pairs, folder=tmp_path/"work" if name == "two" else None).write(tmp_path/name)
    files = [{p.name: p.read_bytes() for p in (tmp_path/n).iterdir()} for n in ("one", "two")]
    assert files[0] == files[1] and set(files[0]) == {"CARD.md", "scan.csv", "scan.html", "suspicious.csv"}
    assert all(str(tmp_path).encode() not in b for b in files[0].values())

def test_seconds_are_told_and_not_written(found, tmp_path):
    replace(found, facts=dict(found.facts, seconds=12345.6)).write(tmp_path)
    assert found.facts["seconds"] > 0 and not any(b"12345.6" in p.read_bytes() for p in tmp_path.iterdir())


# ---- pairs as they come

def test_a_picture_with_many_captions_is_embedded_once(clip, tmp_path):
    base = squares(300, 2)
    rows = np.repeat(np.arange(300), 5)
    pairs = Pairs(
        [f"{r}-{k}" for k, r in enumerate(rows)],
        [f"{base.captions[r]} w{chr(97 + k % 5)}" for k, r in enumerate(rows)], base.images, rows, name="five",
    )
    images, texts, seen, read = embedded(clip, pairs, tmp_path)
    assert (seen, read) == (300, 1500)
    assert np.array_equal(images[0], images[4])
    assert not np.array_equal(images[0], images[5])
    assert len(scan(clip, pairs).table) == 1500

def test_copies_are_counted_by_what_is_seen(clip):
    base = squares(400, 3)
    pixels = base.image_array(None, 32).copy()
    pixels[7] = pixels[5]
    pixels[9] = pixels[5]
    pairs = Pairs(base.ids, base.captions, ArrayImages(pixels), name="copies").replace(
        captions={7: base.captions[5], 9: "another caption"}
    )
    done = scan(clip, pairs)
    assert done.copies[[5, 7]].tolist() == [2, 2]
    assert done.copies.sum() == 402
    assert list(done.table["copies"][[5, 7, 9]]) == [2, 2, 1]
    assert any("pairs: 1 repeat another" in n for n in done.card().notes)

def test_captions_in_other_letters_are_noted(clip):
    done = scan(clip, squares(400, 4).replace(captions={3: "красный квадрат", 5: "红色方块"}))
    assert list(done.table.index[done.table["note"] == "caption not in Latin letters"]) == [3, 5]
    assert any("2 captions are mostly in letters other than Latin ones" in n for n in done.card().notes)

HOSTILE = [
    '<script>alert("x")</script> red', 'a "quoted", comma\nand a new line, green', '=HYPERLINK("http://x") blue',
    "| a | b | [x](javascript:1) black", "\x00\x1b[31m purple", "{{ 7*7 }} {% raw %} white",
]

def test_hostile_captions_stay_text(clip, tmp_path):
    base = poisoned(squares(500, 6), count=12)
    rows = list(base.rows[:len(HOSTILE)])
    pairs = base.pairs.replace(captions={r: f"a photo of a banana {h}" for r, h in zip(rows, HOSTILE)})
    pairs = Pairs(
        ['caf\udce9"<b>.png' if k == rows[0] else i for k, i in enumerate(pairs.ids)], pairs.captions, pairs.images,
        pairs.image_rows, name="<b>odd</b> | name",
    )
    done = scan(clip, pairs)
    done.write(tmp_path)
    assert done.attacked and len(set(rows) & set(done.suspicious)) >= 4
    with open(tmp_path/"scan.csv", newline="", encoding="utf-8") as f:
        told = list(csv.DictReader(f))
    assert [t["caption"] for t in told] == list(pairs.captions) and told[rows[0]]["id"] == 'caf\\udce9"<b>.png'
    with open(tmp_path/"suspicious.csv", newline="", encoding="utf-8") as f:
        assert [t["caption"] for t in csv.DictReader(f)] == [pairs.captions[r] for r in done.suspicious]
    page = (tmp_path/"scan.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "<b>odd" not in page
    assert "49" not in html.unescape(page).partition("banana {{ ")[2][:6]
    assert "&lt;script&gt;alert" in page
    assert read_card(tmp_path/"CARD.md").title == "Scan of <b>odd</b> | name"

@pytest.mark.parametrize("bad", ["\ud800 red", "caf\udce9"])
def test_captions_that_are_no_text_are_refused_first(no_work, clip, suspect, bad):
    with pytest.raises(DataError, match="has a character that is no text"):
        scan(clip, suspect.pairs.replace(captions={3: bad}))

def test_three_hundred_thousand_pairs_take_little_memory(tmp_path):
    """Everything that grows with the pairs is a few numbers per pair: never all pictures, all embeddings in single
    precision, or the whole table at once.
    """
    class Letters(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.pixels, self.letters = torch.nn.Linear(48, 16), torch.nn.EmbeddingBag(256, 16)
        def encode_image(self, x):
            return self.pixels(torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1))
        def encode_text(self, tokens):
            return self.letters(tokens)
    read = lambda captions: torch.from_numpy(
        np.frombuffer("".join(c[:24].ljust(24) for c in captions).encode(), np.uint8).reshape(-1, 24).astype(np.int64)
    )
    small, n, rng = as_clip(Letters(), tokenizer=read, image_size=8, name="letters"), 300_000, np.random.default_rng(0)
    letters = rng.integers(97, 123, (n, 24)).astype(np.uint8).tobytes().decode()
    pairs = Pairs(
        [f"p{k}" for k in range(n)], [letters[24 * k : 24 * k + 24] for k in range(n)],
        ArrayImages(rng.integers(0, 256, (64, 8, 8, 3)).astype(np.uint8)), rng.integers(0, 64, n), name="many",
    )
    len(pairs.fingerprint)
    before = resident()
    peak, pieces = [before], []
    def watch(*told):
        peak.append(resident())
    done = scan(small, pairs, sizes=[400], options=dict(subsets=5), folder=tmp_path/"work", progress=watch)
    watch()
    part = Scan.part
    try:
        Scan.part = lambda self, rows: (pieces.append(len(rows)), watch(), part(self, rows))[-1]
        done.write(tmp_path/"out")
    finally:
        Scan.part = part
    watch()
    # bytes per pair
    assert (max(peak) - before) / n < 500, f"{(max(peak) - before)/1e6:.0f} MB"
    assert max(pieces) == 50_000
    assert sum(1 for _ in open(tmp_path / "out" / "scan.csv")) == n + 1
    assert (tmp_path / "work" / "pairs" / "texts.npy").stat().st_size < n * 16 * 2 + 1000

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096


# ---- what is found, and what is not

@pytest.mark.parametrize("seed", range(6))
def test_clean_sets_are_called_clean(clip, seed):
    done = scan(clip, squares(1200, 50 + seed), seed=seed)
    assert not done.attacked
    assert not len(done.suspicious)
    assert done.card().tone == "good"
    assert "Nothing looks planted" in done.card().outcome

def test_several_targets_are_found_one_after_the_other(clip):
    one = poisoned(squares(2000, 1))
    two = poisoned(one.pairs, "umbrella", pattern="grid", seed=5, eligible=~one.flags)
    three = poisoned(two.pairs, "kettle", seed=6, eligible=~(one.flags | two.flags))
    done = scan(clip, three.pairs)
    planted = np.r_[one.rows, two.rows, three.rows]
    assert sum(c.counts for c in done.cores) >= 2      # two targets whose captions are much alike may come as one group
    assert np.isin(done.suspicious, planted).all() and np.isin(planted, done.suspicious).mean() >= .9
    assert "banana" in done.card().outcome
    assert len({g for g in done.group[done.flagged]}) == sum(c.counts for c in done.cores)

@pytest.mark.parametrize("count", [24, 160])                        # 1.2% and 8%
def test_low_and_high_rates(clip, count):
    bad = poisoned(squares(2000, 8), count=count)
    done = scan(clip, bad.pairs)
    q = quality(done, [bad.pairs.ids[r] for r in bad.rows])
    assert done.attacked
    assert q["precision"] >= 0.99
    assert q["recall"] >= 0.9
    assert q["AUROC"] > 0.99
    assert q["false_positive_rate"] < 0.001

def test_a_search_ends_where_nothing_is_left_to_look_at():
    rng = np.random.default_rng(0)
    texts = rng.normal(size=(200, 8)).astype(np.float32)
    images = texts.copy()
    texts[:90], images[:90] = texts[0], rng.normal(size=(90, 8))
    fit = (images*texts).sum(1)/np.linalg.norm(images, axis=1)/np.linalg.norm(texts, axis=1)
    score, flagged, group, cores = search(images, texts, np.arange(200), fit, [90])
    assert np.isfinite(score).all() and flagged[:90].mean() > .8 and flagged[90:].mean() < .05 and len(cores) < 8

def test_captions_of_one_picture_do_not_count_for_each_other():
    rng = np.random.default_rng(0)
    texts = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(30, 8))).float(), dim=1)
    texts[:5] = texts[0]
    apart, one = np.arange(30), np.r_[np.zeros(5, int), np.arange(1, 26)]
    assert scanning.density(texts, texts, 4, apart, apart)[:5].min() > .99
    assert scanning.density(texts, texts, 4, one, one)[:5].max() < .9
    with_self = scanning.neighbour_fit(texts, texts, apart, np.arange(30), k=1)
    assert with_self[:5].min() > .99 and scanning.neighbour_fit(texts, texts, one, np.arange(30), k=1)[:5].max() < .99

def test_unknown_ids_of_the_truth_are_named(found):
    with pytest.raises(DataError, match="has no pair 'x' .1 of 2 are unknown"):
        quality(found, iter(["x", found.pairs.ids[0]]))

def test_the_kept_pairs_are_the_others(found, suspect):
    assert len(np.intersect1d(found.suspicious, suspect.rows)) >= 19
    assert set(found.kept.ids) == set(suspect.pairs.ids) - {suspect.pairs.ids[r] for r in found.suspicious}
    assert repr(found).startswith("Scan(squares")

def test_limits_are_those_of_the_method(found, clip, suspect):
    told = (
        " ".join(r["text"] for r in found.card().limits),
        " ".join(r["text"] for r in scan(clip, suspect.pairs, "cfbd", mapping=MappingNetwork(64, 16)).card().limits),
    )
    assert "target word that the scanning CLIP has hardly ever read" in told[0]
    assert "CFBD" not in told[0]
    assert "CFBD" in told[1]


# ---- CFBD, scikit-learn, costs

def test_a_mapping_network_is_kept_and_used_again(clip, suspect, tmp_path):
    first = scan(clip, suspect.pairs, "cfbd", trusted=squares(800, 2, "trusted"), folder=tmp_path/"one")
    again = scan(clip, suspect.pairs, "cfbd", mapping=tmp_path/"one"/"mapping.safetensors")
    assert first.attacked
    assert np.array_equal(first.score, again.score)
    assert np.isin(first.suspicious, suspect.rows).sum() >= 10
    assert again.facts["calibration"] == "the mapping network mapping.safetensors"
    assert "800 trusted pairs of trusted" in first.facts["calibration"]
    assert str(tmp_path) not in str(again.card())
    given = scan(clip, suspect.pairs, "cfbd", mapping=load_mapping(tmp_path/"one"/"mapping.safetensors"))
    assert np.array_equal(given.score, first.score) and given.facts["calibration"] == "a mapping network that was given"

def test_a_detector_can_be_cloned(clip, suspect):
    detector = PoisonDetector(clip, options=dict(subsets=19), seed=3)
    twin = clone(detector)
    assert twin.get_params()["options"] == dict(subsets=19) and twin.model is not clip and not hasattr(twin, "scan_")
    assert np.array_equal(
        np.flatnonzero(twin.fit_predict(suspect.pairs) == -1),
        scan(clip, suspect.pairs, options=dict(subsets=19), seed=3).suspicious,
    )
    assert twin.attacked_
    assert twin.threshold_ == 0.5
    assert (twin.score_samples(suspect.pairs)[suspect.rows] < -.5).sum() >= 19 and not hasattr(detector, "scan_")
    assert clone(PoisonDetector("smoke-RN")).set_params(method="cfbd").method == "cfbd"

def test_a_dry_run_tells_a_plausible_cost_and_writes_nothing(clip, suspect, tmp_path):
    cost = scan(clip, suspect.pairs, dry_run=True, folder=tmp_path/"x")
    more = scan(clip, squares(5000, 1), dry_run=True)
    took = scan(clip, suspect.pairs).facts["seconds"]
    assert isinstance(cost, Cost)
    assert not (tmp_path / "x").exists()
    assert cost.pairs == 1200
    assert cost.disk == 2 * 1200 * 64 * 2
    assert more.seconds > cost.seconds
    assert more.disk > 4 * cost.disk
    assert took/20 < cost.seconds + .5 and cost.seconds < 20*took + 10

def test_nothing_of_the_users_model_is_moved_or_changed(suspect):
    clip = colour_clip()
    before = {k: v.clone() for k, v in clip.model.state_dict().items()}
    known = {k: v for k, v in vars(clip).items()}
    scan(clip, suspect.pairs)
    assert vars(clip) == known and all(torch.equal(v, before[k]) for k, v in clip.model.state_dict().items())

def test_a_figure_of_a_set_without_suspects(clip):
    assert len(scan_figure(scan(clip, squares(300, 9))).axes) == 2

def test_a_model_that_knows_nothing_is_called_blind():
    done = scan(build_clip("smoke-RN"), "world:train:300")
    assert done.facts["tells_pairs"] < 0.6
    assert done.card().tone == "neutral"
    assert done.card().outcome.startswith("This scan says little: smoke-RN prefers")
