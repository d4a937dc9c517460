"Models and pairs from anywhere: what is given stays as it was, and what cannot work is named in one line."
import copy
from dataclasses import replace

import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from safetensors.torch import save_file

from mcl_repro.model.clip import build_clip, save_clip
from mcl_repro.data.pairs import Pairs
from mcl_repro.data.readers import read_csv_pairs
from mcl_repro.core.errors import DataError, SettingsError, UserError
from mcl_repro.tools import inputs
from mcl_repro.tools.inputs import (
    as_clip, as_labelled, as_pairs, check_tolerance, Cost, differing, foreign_captions, input_row, Meter,
    model_fingerprint, model_title, no_problems, pair_remarks, Readable, readable_pairs,
)
from colour_clip import ColourClip, colour_clip, read_words, squares


class Placed(ColourClip):
    "Tells where it was sent."
    def __init__(self):
        super().__init__()
        self.sent, self.logit_scale = [], torch.nn.Parameter(torch.tensor(2.))
    def to(self, *args, **kwargs):
        self.sent.append(args)
        return super().to(*args, **kwargs)

SEES = dict(tokenizer=read_words, image_size=32)


# ---- a model

@pytest.mark.parametrize("device, sent", [(None, []), ("cpu", [("cpu",)])])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_stays_where_it_lives_unless_a_place_is_named(device, sent, wrapped):
    model = Placed()
    given = as_clip(model, **SEES) if wrapped else model
    model.sent.clear()
    got = as_clip(given, device=device, **({} if wrapped else SEES))
    assert model.sent == sent and got.model is model and not model.training

def test_a_clip_comes_back_as_it_was_but_for_evaluation_mode():
    own = replace(build_clip("smoke-RN"), mean=(.5, .5, .5), std=(.25, .25, .25), name="mine")
    own.model.train()
    known, weights = dict(vars(own)), {k: v.clone() for k, v in own.model.state_dict().items()}
    got = as_clip(own)
    assert got is own and vars(own) == known and not own.model.training
    # running means of BatchNorm, too
    assert all(torch.equal(v, weights[k]) for k, v in own.model.state_dict().items())

def test_a_module_is_not_changed_by_the_temperature_it_lacks():
    module = ColourClip()
    before = set(module.state_dict())
    assert "logit_scale" in as_clip(module, **SEES).model.state_dict()
    assert set(module.state_dict()) == before
    assert not hasattr(module, "logit_scale")

@pytest.mark.parametrize("change, says", [
    (dict(mean=(0, 0, 0)), "mean: colours is a Clip"),
    (dict(tokenizer=len), "tokenizer: colours is a Clip"),
    (dict(pretrained="openai"), "pretrained: colours is a Clip"),
    (dict(name="x"), "name: colours is a Clip"),
    (dict(model="smoke-RN", tokenizer=len), "tokenizer: it is for a torch module"),
    (dict(model="smoke-RN", image_size=64), "image_size: it is for a torch module"),
    (dict(model=ColourClip(), pretrained="openai", **SEES), "pretrained: it goes with the name of an architecture"),
    (dict(model=ColourClip(), image_size=32), "comes without a tokenizer: give tokenizer="),
    (dict(model=ColourClip(), tokenizer=read_words), "does not tell the size of its pictures"),
    (dict(model=ColourClip(), tokenizer=lambda c: c, image_size=32), "cannot embed captions"),
    (dict(model=ColourClip(), tokenizer=lambda c: read_words(c)[:1], image_size=32), "of shape [1, 64]"),
    (dict(model=3), "not int"),
    (dict(model=None), "not NoneType"),
    (dict(model="ViT-B-33"), "unknown model"),
    (dict(model="nowhere.safetensors"), "no checkpoint at"),
    (dict(model="mine.safetensors", pretrained="openai"), "is a checkpoint already"),
])
def test_what_is_missing_or_not_used_is_named(change, says):
    call = dict(dict(model=colour_clip()), **change)
    with pytest.raises(UserError) as e:
        as_clip(call.pop("model"), **call)
    assert says in str(e.value) and "\n" not in str(e.value)

class Wide(ColourClip):
    def encode_text(self, tokens):
        return super().encode_text(tokens)[:, :32]

def test_towers_of_two_widths_are_refused():
    with pytest.raises(SettingsError, match=r"pictures of shape \[2, 64\] and captions of shape \[2, 32\]"):
        as_clip(Wide(), **SEES)

def test_weights_that_are_no_numbers_are_refused(tmp_path):
    damaged = ColourClip()
    with torch.no_grad():
        damaged.words[:] = float("nan")
    with pytest.raises(SettingsError, match="the weights .*words are not finite"):
        as_clip(damaged, **SEES)
    clip = build_clip("smoke-RN")
    with torch.no_grad():
        next(clip.model.visual.parameters())[0] = float("inf")
    save_clip(clip, tmp_path/"bad.safetensors")
    with pytest.raises(SettingsError, match="smoke-RN: the weights visual.* are not finite"):
        as_clip(tmp_path/"bad.safetensors")

def test_files_that_are_no_checkpoint(tmp_path):
    for name, content in (
        ("empty.safetensors", b""), ("torn.safetensors", b"\x08\0\0\0\0\0\0\0{"), ("text.safetensors", b"hello " * 100),
    ):
        (tmp_path/name).write_bytes(content)
        with pytest.raises(UserError) as e:
            as_clip(tmp_path/name)
        assert name in str(e.value) and "\n" not in str(e.value)

def test_a_fingerprint_is_of_weights_size_and_normalisation():
    clip = colour_clip()
    first = model_fingerprint(clip)
    assert model_fingerprint(replace(clip, model=copy.deepcopy(clip.model), name="other")) == first
    others = replace(clip, image_size=64), replace(clip, mean=(0.5, 0, 0))
    assert len({first, *map(model_fingerprint, others)}) == 3
    with torch.no_grad():
        clip.model.module.palette[0, 0] += 1e-6
    assert model_fingerprint(clip) != first

def test_titles_show_no_folder(tmp_path):
    assert model_title(colour_clip(), tmp_path/"secret"/"mine.safetensors") == "colours (mine.safetensors)"


# ---- pairs

@pytest.fixture
def crawl(tmp_path):
    "Twelve pictures of many modes and sizes, and four that cannot be read: empty, cut off, no picture, not there."
    lines = ["image,caption"]
    for k, mode in enumerate(["RGB", "L", "RGBA", "P", "CMYK", "1", "LA", "I;16", "RGB", "RGB", "L", "RGB"]):
        pixels = Image.fromarray(np.random.default_rng(k).integers(0, 256, (3 + 31*k, 40, 3), dtype=np.uint8))
        name = f"{k}.{'tif' if mode == 'CMYK' else 'png'}"
        lines.append(f"{name},picture {k}")
        (Image.fromarray(np.full((30, 40), 999 * k, np.uint16)) if mode == "I;16" else pixels.convert(mode)).save(
            tmp_path / name
        )
    (tmp_path/"empty.png").touch()
    (tmp_path/"half.png").write_bytes((tmp_path/"11.png").read_bytes()[:900])
    (tmp_path/"text.png").write_text("no picture")
    Image.new("RGB", (9, 9)).save(tmp_path/"gone.png")
    lines += [f"{n}.png,a {n} one" for n in ("empty", "half", "text", "gone", "gone")]
    (tmp_path/"pairs.csv").write_text("\n".join(lines))
    found = read_csv_pairs(tmp_path/"pairs.csv")
    (tmp_path/"gone.png").unlink()
    return found

def test_every_unreadable_pair_is_listed(crawl):
    seen = []
    found = readable_pairs(crawl, .5, lambda *told: seen.append(told))
    assert len(found.pairs) == 12
    assert found.problems["id"].str.split(".").str[0].tolist() == ["empty", "half", "text", "gone", "gone"]
    assert list(found.rows) == list(range(12))
    assert seen[-1][0] == seen[-1][1]
    assert all(i.split("#")[0] in p for i, p in zip(found.problems["id"], found.problems["problem"]))
    with pytest.raises(DataError, match="5 of 17 pairs cannot be read, more than the tolerated 20.00%") as e:
        readable_pairs(crawl, .2)
    assert "\n" not in str(e.value)
    with pytest.raises(DataError, match="5 of 5 pairs"):
        readable_pairs(crawl.select(range(12, 17)), 1.)                  # nothing is left, whatever is tolerated

def test_labelled_images_are_read_in_the_same_way(tmp_path):
    for c in ("cat", "dog"):
        (tmp_path/c).mkdir()
        for k in range(3):
            Image.new("RGB", (20, 20), (k, 9, 9)).save(tmp_path/c/f"{k}.png")
    (tmp_path/"dog"/"1.png").write_bytes(b"")
    images = as_labelled(str(tmp_path))
    found = readable_pairs(images, .5)
    assert type(found.pairs) is type(images)
    assert list(found.pairs.labels) == [0, 0, 0, 1, 1]
    assert len(found.problems) == 1
    assert pair_remarks(found, "images")[0].startswith("images: 1 of 6 were left out, first ")
    assert pair_remarks(found, "images")[1:] == (
        "images: no classnames.txt beside them, so classes are called by their folders.",)

@pytest.mark.parametrize("tolerance", [-.1, 1.1, float("nan")])
def test_a_tolerance_that_is_no_share(tolerance):
    with pytest.raises(SettingsError, match="tolerance is the share"):
        check_tolerance(no_problems(), 10, tolerance, "x")

@pytest.mark.parametrize("given, says", [
    ("world:zeroshot_test:20", "has classes and no captions"),
    ("nowhere.csv", "nowhere.csv"),
    (42, "int is not a set of pairs"),
    (None, "NoneType is not a set of pairs"),
    ("world:train:0", ""),
])
def test_what_are_no_pairs(given, says):
    with pytest.raises(UserError) as e:
        as_pairs(given)
    assert says in str(e.value) and "\n" not in str(e.value)

@pytest.mark.parametrize("bad", ["caf\udce9", "\ud800", "ok until here \udfff"])
def test_captions_that_are_no_text_are_refused_by_name(bad):
    with pytest.raises(DataError, match="caption of squares-2 in squares has a character that is no text") as e:
        as_pairs(squares(4, 0).replace(captions={2: bad}))
    # and can be printed
    str(e.value).encode("utf-8")

def test_ids_of_old_file_names_are_no_problem():
    pairs = squares(3, 0)
    assert len(as_pairs(Pairs(["a", "caf\udce9.png", "c"], pairs.captions, pairs.images)).fingerprint) == 64

def test_letters_of_other_scripts():
    said = ["a dog", "naïve café", "чёрный кот", "黒い猫", "قطة سوداء", "🐈🐈", "", "№ 7", "чёрный black cat"]
    assert list(foreign_captions(said)) == [False, False, True, True, True, False, False, False, False]


# ---- what reports say

def test_remarks_count_what_a_reader_should_know():
    pairs = squares(6, 0).replace(captions={1: "красный квадрат", 3: "same", 4: "same"}, image_rows=[0, 1, 2, 3, 3, 5])
    left = pd.DataFrame(dict(id=["x"], problem=["x.png is empty"]))
    said = pair_remarks(Readable(pairs, np.arange(6), left), "trusted")
    assert [s.split(",")[0].split(";")[0] for s in said] == [
        "trusted: 1 of 7 were left out", "trusted: 1 captions are mostly in letters other than Latin ones",
        "trusted: 1 repeat another",
    ]
    assert "first x: x.png is empty." in said[0]
    assert pair_remarks(Readable(squares(6, 0), np.arange(6), no_problems())) == ()
    assert "repeat" not in " ".join(pair_remarks(Readable(pairs, np.arange(6), left), repeated=0))
    assert "9 repeat" in pair_remarks(Readable(pairs, np.arange(6), left), repeated=9)[-1]

def test_rows_of_inputs_say_where_they_are_from():
    row = input_row("pairs", squares(3, 0))
    assert (row["what"], row["name"], row["licence"]) == ("pairs", "squares", "not stated")
    assert len(row["fingerprint"]) == 64
    assert input_row("model", colour_clip(), "x/mine.safetensors", "ab") == dict(
        what="model", name="colours (mine.safetensors)", licence="not stated", fingerprint="ab"
    )

def test_differences_are_named_with_their_place():
    known = dict(seed=0, model="a"*64, search=dict(length=3, pools=[1, 2]))
    assert differing(known, dict(known, search=dict(length=3, pools=(1, 2)))) == []
    assert differing(known, dict(known, model="b"*64)) == ["model: aaaaaaaaaaaa there, bbbbbbbbbbbb here"]
    lost = ["search.length: 3 there, None here", "search.pools: [1, 2] there, None here"]
    assert differing(known, dict(seed=0, model="a" * 64)) == lost
    assert len(differing(None, known)) == 4

def test_progress_without_a_terminal_is_lines_now_and_then(capsys):
    meter = Meter(every=0.)
    meter(1, 10, "pairs", "reading")
    meter(5, 10, "pairs", "reading")
    meter(10, 10, "pairs")
    meter(0, 3)
    told = capsys.readouterr().err.splitlines()
    assert "reading: 5 of 10 pairs, about" in told[1] and told[-1].startswith("0 of 3 steps")
    quiet = Meter()
    quiet(1, 10)
    quiet(2, 10)
    assert capsys.readouterr().err == ""

def test_costs_are_said_in_units_one_can_grasp():
    assert [str(Cost(1, s, 0, 2e9, "x")).split(", ")[0] for s in (3, 300, 9000)] == [
        "1 pairs: about 3 seconds", "1 pairs: about 5 minutes", "1 pairs: about 2.5 hours",
    ]


@pytest.mark.parametrize("noted", ["hf-hub:attacker/model", "local-dir:other/model", "hf-hub:a/b" + "c"*5000])
def test_a_file_names_no_hub_and_no_folder(tmp_path, monkeypatch, noted):
    "What stands in a stranger's file must not make this machine ask a hub or look into another folder."
    path = tmp_path/"clip.safetensors"
    save_file({"a": torch.zeros(1)}, str(path), metadata=dict(model=noted))
    monkeypatch.setattr(inputs, "build_clip", lambda *args, **options: pytest.fail("it was built"))
    with pytest.raises(SettingsError, match="only you may name a hub or a folder") as told:
        as_clip(str(path))
    assert len(str(told.value)) < 500
