"""Repairing a model of one's own: nothing long before what can be refused, nothing lost by a kill, nothing changed that
was given, nothing looked at that a defender does not have.
"""
import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from defenders import FORBIDDEN, public_images
from mcl_repro.attacks.base import Attack, make_attack, poison
from mcl_repro.core.errors import DataError, SettingsError, UserError
from mcl_repro.core.libraries import import_open_clip
from mcl_repro.data.pairs import LabelledImages
from mcl_repro.data.readers import read_csv_pairs
from mcl_repro.data.registry import open_data
from mcl_repro.model.clip import build_clip, embed_images, embed_texts, load_weights, save_clip, zero_shot_weights
from mcl_repro.model.training import Recipe, train, training_set
from mcl_repro.papers.cfbd import detect
from mcl_repro.papers.cleanclip import class_scores, load_head
from mcl_repro.tools import repairing
from mcl_repro.tools.cards import read_card
from mcl_repro.tools.inputs import as_clip, Cost, model_fingerprint
from mcl_repro.tools.repairing import INPUTS, Method, METHODS, repair, settle

PAIRS, TRUSTED, IMAGES = "world:train:64", "world:validation:60", "world:zeroshot_validation:200:1"
# so low a bar that any model looks poisoned
QUICK = dict(suspicious_share=.3, select=8, steps=6, verdict=1e-6, overfit=dict(epochs=1, batch_size=32))


class Letters(torch.nn.Module):
    "The smallest possible CLIP of somebody else's."
    def __init__(self, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.pixels, self.letters = torch.nn.Linear(3*16*16, width), torch.nn.EmbeddingBag(256, width)
    def encode_image(self, x):
        return self.pixels(torch.nn.functional.adaptive_avg_pool2d(x, 16).flatten(1))
    def encode_text(self, tokens):
        return self.letters(tokens)

def count_letters(captions):
    return torch.tensor([list(c.encode()[:32].ljust(32)) for c in captions])
def letters():
    return as_clip(Letters(), tokenizer=count_letters, image_size=32)

@pytest.fixture(scope="module")
def model():
    return as_clip("smoke-RN")

@pytest.fixture(scope="module")
def reference():
    return build_clip("smoke-RN", seed=1)

@pytest.fixture(scope="module")
def poisoned():
    return poison(open_data(PAIRS), make_attack("badnets"), "banana", count=8, image_size=32).pairs

@pytest.fixture
def no_work(monkeypatch):
    "Nothing that takes long may begin."
    def began(*args, **kwargs):
        raise AssertionError("long work began")
    for name in ("train", "readable_pairs", "training_set", "write_json"):
        monkeypatch.setattr(repairing, name, began)

def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


# ---- what is refused, and when

@pytest.mark.parametrize("change, says", [
    (dict(method="cleanclap"), "unknown method of repair 'cleanclap'; did you mean cleanclip"),
    (dict(method="ubt"), "ubt needs reference: a clean CLIP to compare with; give reference=, or take cleanclip"),
    (dict(method="cfbd", reference="smoke-RN"), "cfbd needs trusted: image-caption pairs that you trust"),
    (dict(method="supervised"), "supervised needs images: labelled images that you trust; give images="),
    (dict(method="cleanclip", pairs=None), "cleanclip needs pairs"),
    (dict(method="cleanclip", pairs=IMAGES), "has classes and no captions"),
    (dict(method="supervised", images=TRUSTED), "has no classes"),
    (dict(model="ViT-B-33"), "unknown model 'ViT-B-33'"),
    (dict(model=torch.nn.Linear(2, 2)), "has no encode_image"),
    (dict(model=Letters()), "comes without a tokenizer"),
    (dict(pairs="nowhere.csv"), "nowhere.csv"),
    (dict(tolerance=2.), "tolerance is the share"),
    (dict(device="tpu"), "device 'tpu' is not known"),
    (dict(settings=dict(policy=1)), "unknown setting 'policy'"),
    (dict(settings=dict(synonyms="thesaurus")), "unknown source of synonyms"),
    (dict(settings=dict(clip_weight=-1)), "CleanCLIP needs weights"),
    (dict(recipe=dict(epochs=0)), "epochs must be positive"),
    (dict(recipe=dict(rate=1)), "unknown setting of recipe 'rate'"),
    (dict(trusted=TRUSTED), "these are the very pairs"),
])
def test_what_cannot_work_is_refused_before_any_work(no_work, tmp_path, change, says):
    call = dict(dict(model="smoke-RN", pairs=TRUSTED, method="cleanclip"), **change)
    with pytest.raises(UserError) as e:
        repair(call.pop("model"), call.pop("pairs"), folder=tmp_path/"x", **call)
    assert says in str(e.value) and "\n" not in str(e.value) and not (tmp_path/"x").exists()

@pytest.mark.parametrize("settings, says", [
    (dict(mask="image"), "mask is text"),
    (dict(verdict=1.), "verdict is the share"),
    (dict(margin=-1.), "margin -1 leaves nothing"),
    (dict(reading="oral"), "unknown reading of Eq. 7"),
    (dict(suspicious_share=.01), "too few for ubt"),
    (dict(relevance_start_layer=7), "start_layer: 7"),
    (dict(overfit=dict(epochs=-1)), "epochs must be positive"),
])
def test_ubts_settings_are_looked_at_first(no_work, model, reference, settings, says):
    with pytest.raises(SettingsError, match=says):
        repair(model, PAIRS, "ubt", reference=reference, settings={"suspicious_share": .08, **settings})

def test_words_that_cannot_be_weighed_are_refused_with_a_remedy_that_works(monkeypatch, reference):
    with monkeypatch.context() as patch:
        patch.setattr(repairing, "train", None)
        with pytest.raises(SettingsError, match="mask='none'.*such as cleanclip"):
            repair(letters(), PAIRS, "ubt", reference=reference, settings=QUICK)
    done = repair(letters(), PAIRS, "ubt", reference=reference, settings=dict(QUICK, mask="none"))
    # a tokenizer that cannot tell
    assert done.facts["steps"] > 0 and len(done.selected) == 8 and set(done.selected["kept_words"]) == {""}

def test_a_head_of_the_models_own_is_not_replaced(model):
    headed = replace(model, model=copy.deepcopy(model.model))
    headed.model.head = torch.nn.Linear(2, 2)
    with pytest.raises(SettingsError, match="has a part called head already"):
        repair(headed, None, "supervised", images=IMAGES)

def test_a_class_without_pictures_is_named(model):
    data = open_data(IMAGES)
    some = data.select(np.flatnonzero(data.labels != 3))
    with pytest.raises(DataError, match=f"0 images of class '{data.classnames[3]}'"):
        repair(model, None, "supervised", images=some)

def test_tied_weights_are_refused_where_they_could_not_be_written(model, tmp_path):
    tied = letters()
    tied.model.module.more = torch.nn.Linear(768, 8)
    tied.model.module.more.weight = tied.model.module.pixels.weight
    with pytest.raises(SettingsError, match="share their memory"):
        repair(tied, TRUSTED, "finetune", folder=tmp_path/"x")
    assert repair(tied, TRUSTED, "finetune", recipe=dict(epochs=1)).facts["steps"] == 1

def test_a_handful_of_pairs_is_too_few(model):
    with pytest.raises(DataError, match="7 are too few to learn from"):
        repair(model, "world:validation:7", "finetune")
    with pytest.raises(DataError, match="1 are too few to learn from"):
        repair(model, open_data("world:validation:8").select([0]), "finetune")

@pytest.mark.parametrize("method, data", [
    ("finetune", dict(pairs=TRUSTED)),
    ("cleanclip", dict(pairs=TRUSTED)),
    ("supervised", dict(pairs=None, images=IMAGES)),
])
def test_batches_of_one_are_refused_by_name(no_work, method, data, model):
    with pytest.raises(SettingsError, match="batch_size: a pair alone has nothing to be compared with"):
        repair(model, method=method, recipe=dict(batch_size=1), **data)

def test_a_handful_that_can_be_read_is_too_few(model, tmp_path):
    for k in range(12):
        Image.fromarray(np.full((40, 40, 3), k, np.uint8)).save(tmp_path/f"{k}.png")
    for k in range(1, 12):
        (tmp_path/f"{k}.png").write_bytes(b"")
    (tmp_path/"pairs.csv").write_text("image,caption\n" + "".join(f"{k}.png,picture {k}\n" for k in range(12)))
    for method in ("finetune", "cleanclip"):
        with pytest.raises(DataError, match="1 are too few to learn from; give at least 8 that can be read"):
            repair(model, tmp_path/"pairs.csv", method, tolerance=.95, folder=tmp_path/"out")
    assert not (tmp_path/"out").exists()

@pytest.mark.parametrize("needs, given", [(("reference",), dict(reference="smoke-RN")), ((), {})])
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_method_that_was_given_nothing_to_learn_from(monkeypatch, no_work, model, needs, given, dry_run):
    monkeypatch.setitem(METHODS, "mine", Method(lambda clip, pairs, **other: {}, needs))
    with pytest.raises(SettingsError, match="mine has nothing to learn from: give pairs, trusted= or images="):
        repair(model, None, "mine", dry_run=dry_run, **given)

def test_a_model_that_cannot_be_copied(model):
    class Stiff(Letters):
        def __deepcopy__(self, memo):
            raise RuntimeError("no")
    with pytest.raises(SettingsError, match="Stiff cannot be copied"):
        repair(Stiff(), TRUSTED, "cleanclip")


# ---- bad pictures, odd captions

@pytest.fixture
def crawl(tmp_path):
    """Thirty pairs of mixed sizes; two pictures are broken, one caption is Russian, one has no letters, one stands
    there twice.
    """
    folder = tmp_path/"crawl"
    folder.mkdir()
    lines = ["image,caption"]
    for k in range(30):
        pixels = np.random.default_rng(k).integers(0, 256, (30 + k, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert("L" if k % 3 else "RGB").save(folder/f"{k}.png")
        lines.append(f"{k}.png," + {5: "собака бежит", 6: "2024"}.get(k, f"picture number {k}"))
    lines.append("7.png,picture number 7")
    (folder/"3.png").write_bytes(b"")
    (folder/"4.png").write_bytes((folder/"4.png").read_bytes()[:200])
    (folder/"pairs.csv").write_text("\n".join(lines), encoding="utf-8")
    return folder/"pairs.csv"

def test_broken_pictures_are_left_out_up_to_the_tolerance_and_said(crawl, model, tmp_path):
    with pytest.raises(DataError, match="2 of 31 pairs cannot be read"):
        repair(model, crawl, "cleanclip", folder=tmp_path/"x")
    # so that the call with a higher tolerance is no other repair
    assert not (tmp_path/"x").exists()
    done = repair(model, crawl, "cleanclip", folder=tmp_path/"x", tolerance=.1, recipe=dict(batch_size=16))
    notes = " ".join(done.card.notes)
    assert done.facts["unreadable"] == 2
    for said in (
        "pairs: 2 of 31 were left out, first 3.png#0",
        "pairs: 1 captions are mostly in letters other than Latin ones",
        "captions have no letters from a to z",
        "pairs: 1 repeat another",
    ):
        assert said in notes, said

def test_rows_of_selected_pairs_are_those_of_what_was_given(crawl, model, reference):
    given = read_csv_pairs(crawl)
    done = repair(model, given, "ubt", reference=reference, settings=QUICK, tolerance=.1)
    assert [given.ids[r] for r in done.selected["row"]] == list(done.selected["id"])
    assert [given.captions[r] for r in done.selected["row"]] == list(done.selected["caption"])
    assert not {3, 4} & set(done.selected["row"])


# ---- the model that was given, and the one that comes back

def test_nothing_is_claimed_about_clean_quality_that_nobody_watched(model, reference, poisoned):
    done = repair(model, poisoned, "ubt", reference=reference, settings=QUICK)
    assert "nobody watched" in done.card.outcome
    assert [r["what"] for r in done.card.measured] == [
        "cosine of the selected pairs",
        "weights moved, relative to their length",
    ]

def test_what_was_given_is_not_changed(model, reference, poisoned):
    given = replace(model, model=copy.deepcopy(model.model).train())
    for p in given.model.parameters():
        p.requires_grad_(False)                  # loaded for use
    before, other = model_fingerprint(given), model_fingerprint(reference)
    done = repair(given, poisoned, "ubt", reference=reference, settings=QUICK)
    assert (model_fingerprint(given), model_fingerprint(reference)) == (before, other)
    assert given.model.training
    assert not any(p.requires_grad for p in given.model.parameters())
    assert model_fingerprint(done.clip) != before and not done.clip.model.training and done.report.iloc[-1]["after"] > 0

@pytest.mark.parametrize("method", ["cleanclip", "finetune"])
def test_any_module_with_two_encoders(method, tmp_path):
    done = repair(letters(), TRUSTED, method, folder=tmp_path, recipe=dict(epochs=1, batch_size=16))
    again = load_weights(letters(), tmp_path/"clip.safetensors")
    assert torch.equal(embed_texts(again, ["a dog"]), embed_texts(done.clip, ["a dog"]))
    assert not torch.equal(embed_texts(letters(), ["a dog"]), embed_texts(done.clip, ["a dog"]))
    assert done.card.settings["profile"] == "paper" and not any("not known" in l["text"] for l in done.card.limits)

def test_open_clip_loads_what_was_written(tmp_path):
    "A public architecture, by open_clip's own factory."
    oc = import_open_clip()
    theirs = oc.create_model("ViT-S-32-alt")
    done = repair(
        as_clip(theirs, name="ViT-S-32-alt"), "world:validation:8", "finetune", recipe=dict(epochs=1, batch_size=8),
        folder=tmp_path,
    )
    loaded = oc.create_model("ViT-S-32-alt", pretrained=str(tmp_path/"clip.safetensors")).eval()
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    tokens = oc.get_tokenizer("ViT-S-32-alt")(["a dog"])
    with torch.no_grad():
        assert torch.equal(loaded.encode_image(pixels), done.clip.model.encode_image(pixels))
        assert torch.equal(loaded.encode_text(tokens), done.clip.model.encode_text(tokens))
        assert not torch.equal(loaded.encode_text(tokens), theirs.eval().encode_text(tokens))
    assert as_clip(tmp_path/"clip.safetensors").name == "ViT-S-32-alt"

def test_a_model_that_does_not_look_poisoned_is_left_as_it_is(model, reference, tmp_path):
    done = repair(model, PAIRS, "ubt", reference=reference, settings=dict(QUICK, verdict=.999), folder=tmp_path)
    assert "no proof" in done.card.outcome
    assert done.facts["refused"]
    assert not len(done.selected)
    assert "was left as it is by ubt" in done.card.outcome
    assert model_fingerprint(done.clip) == model_fingerprint(model)
    assert done.report.set_index("what")["after"]["weights moved, relative to their length"] == 0
    assert not (tmp_path/"selected.csv").exists()

def test_the_head_is_written_read_and_used(model, tmp_path):
    done = repair(model, None, "supervised", images=IMAGES, folder=tmp_path, recipe=dict(epochs=1))
    clip = as_clip(tmp_path/"clip.safetensors")
    assert load_head(type("", (), dict(path=tmp_path)), clip) == done.facts["classnames"]
    assert not hasattr(done.clip.model, "head")
    images = open_data(IMAGES).images.take(range(9))
    scores = class_scores(clip, images)
    done.clip.model.head = done.head
    assert torch.equal(scores, class_scores(done.clip, images))
    assert [r["what"] for r in done.card.measured][-1].startswith("weights moved")

def test_a_probe_changes_no_weight(model):
    done = repair(model, None, "supervised", images=IMAGES, settings=dict(head_only=True), recipe=dict(epochs=1))
    assert model_fingerprint(done.clip) == model_fingerprint(model)
    assert any("does not repair" in s or "not repair" in s for s in done.card.done)

def test_cfbd_trains_a_new_model_from_the_reference_or_leaves_the_old_one(model, monkeypatch):
    bigger, pairs = build_clip("mini-RN", seed=2), open_data("world:train:220")
    done = repair(
        model, pairs, "cfbd", reference=bigger, trusted=TRUSTED,
        settings=dict(mapping=dict(epochs=1), detect=dict(guard=False)), recipe=dict(epochs=1),
    )
    assert (done.clip.name == "mini-RN") == done.facts["poisoned"] == (not done.facts.get("refused"))
    def five_flagged(*args, **kwargs):
        return replace(detect(*args, **kwargs), attacked=True, flagged=np.arange(5))
    monkeypatch.setattr(repairing, "detect", five_flagged)
    done = repair(
        model, pairs, "cfbd", reference=bigger, trusted=TRUSTED, settings=dict(mapping=dict(epochs=1)),
        recipe=dict(epochs=1),
    )
    assert done.clip.name == "mini-RN"
    assert done.facts["pairs"] == 215
    assert list(done.selected["row"]) == list(range(5))
    assert "left out" in done.card.outcome
    assert "weights moved" not in " ".join(done.report["what"])               # of two architectures


# ---- resume

CALLS = {
    "cleanclip": lambda model, reference, pairs, **k: repair(
        model, TRUSTED, "cleanclip", recipe=dict(epochs=4, batch_size=16), **k
    ),
    "ubt": lambda model, reference, pairs, **k: repair(
        model, pairs, "ubt", reference=reference, trusted=TRUSTED, settings=QUICK, recipe=dict(epochs=3), **k
    ),
    "supervised": lambda model, reference, pairs, **k: repair(
        model, None, "supervised", images=IMAGES, recipe=dict(epochs=3), **k
    ),
}

@pytest.mark.parametrize("method", CALLS)
def test_a_repair_that_was_stopped_goes_on_to_the_same_bytes(method, model, reference, poisoned, tmp_path, monkeypatch):
    call = lambda folder, **k: CALLS[method](model, reference, poisoned, folder=tmp_path/folder, **k)
    call("whole")
    save, saved = train.__globals__["save_checkpoint"], []
    def dying(state, path):
        save(state, path)
        saved.append(Path(path).name)
        if saved[-1] == "checkpoint.safetensors" and state.epoch == 2:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setitem(train.__globals__, "save_checkpoint", dying)
        with pytest.raises(KeyboardInterrupt):
            call("killed")
    assert (tmp_path/"killed/unfinished/checkpoint.safetensors").exists()
    assert not (tmp_path/"killed/clip.safetensors").exists()
    steps = []
    monkeypatch.setitem(
        train.__globals__, "_step", lambda *a, real=train.__globals__["_step"]: steps.append(1) or real(*a)
    )
    resumed = call("killed")
    assert files(tmp_path/"killed") == files(tmp_path/"whole")
    # neither the overfitting nor the first epochs again
    assert 0 < len(steps) < resumed.facts["steps"]

def test_another_call_does_not_go_on_with_it(model, reference, poisoned, tmp_path, monkeypatch):
    def dying(*args, **kwargs):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(repairing, "train", dying)
        with pytest.raises(KeyboardInterrupt):
            CALLS["ubt"](model, reference, poisoned, folder=tmp_path)
    before = files(tmp_path)
    for change, says in [
        (dict(model=reference), "model: "), (dict(pairs=open_data(PAIRS)), "pairs: "),
        (dict(reference=model), "reference: "), (dict(seed=1), "seed: 0 there, 1 here"),
    ]:
        given = dict(model=model, reference=reference, pairs=poisoned)
        extra = {k: change.pop(k) for k in ("seed",) if k in change}
        with pytest.raises(SettingsError, match=f"holds another repair that was interrupted.*{says}"):
            CALLS["ubt"](**{**given, **change}, folder=tmp_path, **extra)
    with pytest.raises(SettingsError, match="method: ubt there, finetune here"):
        repair(model, poisoned, "finetune", folder=tmp_path)
    assert files(tmp_path) == before

def test_nothing_of_the_users_is_overwritten_or_removed(model, tmp_path):
    mine = tmp_path/"clip.safetensors"
    save_clip(model, mine)
    before = mine.read_bytes()
    with pytest.raises(SettingsError, match="holds a clip.safetensors already"):
        repair(mine, TRUSTED, "finetune", folder=tmp_path)
    assert mine.read_bytes() == before
    other = tmp_path/"a"
    (other/"unfinished").mkdir(parents=True)
    (other/"unfinished/thesis.txt").write_text("mine")
    with pytest.raises(SettingsError, match="holds files and no note"):
        repair(model, TRUSTED, "finetune", folder=other)
    link = tmp_path/"b"
    link.mkdir()
    (link/"unfinished").symlink_to(other, target_is_directory=True)
    with pytest.raises(SettingsError, match="is not a folder of its own"):
        repair(model, TRUSTED, "finetune", folder=link)
    assert (other/"unfinished/thesis.txt").read_text() == "mine"

@pytest.mark.parametrize("note", ["{", "[1, 2]", '"x"', "\0"])
def test_a_note_that_is_none_is_refused_in_one_line(note, model, tmp_path):
    (tmp_path/"unfinished").mkdir()
    (tmp_path/"unfinished/repair.json").write_text(note)
    with pytest.raises(UserError) as e:
        repair(model, TRUSTED, "finetune", folder=tmp_path)
    assert "\n" not in str(e.value)


# ---- what a defender does not have

@pytest.mark.parametrize("method", CALLS)
def test_nobody_looks_at_a_trigger_or_at_attack_success(method, model, reference, poisoned, monkeypatch):
    def shut(name):
        def refuse(*args, **kwargs):
            raise AssertionError(f"repair called {name}")
        return refuse
    for module in [m for n, m in list(sys.modules.items()) if n.startswith("mcl_repro.")]:
        for name in FORBIDDEN:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, shut(name))
    for name in ("apply", "describe", "paint", "captions", "geometry"):
        monkeypatch.setattr(Attack, name, shut(f"Attack.{name}"))
    done = CALLS[method](model, reference, replace(poisoned, images=public_images(poisoned.images)))
    assert done.facts["steps"] > 0


# ---- your own method, cards, cost

def halve(clip, pairs, *, recipe, settings, progress=None, checkpoint=None, **other):
    "Somebody's method: fine-tune, then shrink the last layer."
    history = train(clip, training_set(clip, pairs), Recipe(**recipe), checkpoint=checkpoint, progress=progress)
    with torch.no_grad():
        clip.model.text_projection *= settings["by"]
    return dict(
        steps=history[-1]["step"], found=np.float32(0.5), rows=np.arange(3),
        selected=dict(row=np.array([4, 2]), score=[0.9, 0.8]),
    )

def test_a_method_of_your_own(monkeypatch, model, tmp_path):
    defaults = dict(by=0.5, recipe=dict(epochs=1, batch_size=16, learning_rate=1e-4))
    monkeypatch.setitem(METHODS, "halve", Method(halve, ("pairs", "trusted"), "Shrink.", defaults))
    with pytest.raises(SettingsError, match="halve needs trusted"):
        repair(model, PAIRS, "halve")
    done = repair(model, PAIRS, "halve", trusted="world:validation:240", settings=dict(by=.25), folder=tmp_path)
    assert done.facts["rows"] == [0, 1, 2]
    assert done.facts["found"] == 0.5
    assert list(done.selected.columns) == ["row", "id", "caption", "score"]
    assert list(done.selected["row"]) == [4, 2]
    assert done.card.settings["settings"] == dict(by=0.25)
    assert "Shrink." in done.card.done[-1]
    assert any("halve" in l["text"] for l in done.card.limits)
    assert any("only 24 pairs" in n for n in done.card.notes)                   # a tenth of what it trusts
    assert repair(model, PAIRS, "halve", trusted=TRUSTED, dry_run=True).pairs == 64
    assert json.loads(json.dumps(done.facts)) == done.facts

def test_the_card_says_what_was_done_and_is_the_same_every_time(model, reference, poisoned, tmp_path):
    done = [CALLS["ubt"](model, reference, poisoned, folder=tmp_path/name) for name in "ab"]
    assert files(tmp_path/"a") == files(tmp_path/"b")
    assert sorted(files(tmp_path/"a")) == ["CARD.md", "clip.safetensors", "report.csv", "selected.csv"]
    card = read_card(tmp_path/"a/CARD.md")
    assert card == done[0].card and card.kind == "repaired model" and "only a trigger can tell" in card.outcome
    assert [i["what"] for i in card.inputs] == ["model", "pairs", "reference", "trusted"]
    assert all(len(i["fingerprint"]) == 64 for i in card.inputs)
    assert list(done[0].report.columns) == ["what", "before", "after", "unit"]
    assert done[0].report["what"].tolist() == [r["what"] for r in card.measured]

def test_a_fall_of_clean_quality_is_said_first(model, monkeypatch):
    "A method that ruins the model, on pictures that the model knows."
    def ruin(clip, pairs, **other):
        with torch.no_grad():
            clip.model.text_projection.zero_()
            clip.model.text_projection[0, 0] = 1.
    monkeypatch.setitem(METHODS, "ruin", Method(ruin, holds_out="pairs"))
    images = open_data(IMAGES)
    scores = embed_images(model, images.images) @ zero_shot_weights(model, images.classnames)
    known = LabelledImages(images.ids, images.images, scores.argmax(1).numpy(), images.classnames, "known")
    done = repair(model, PAIRS, "ruin", images=known)
    assert "Clean quality fell: accuracy, zero-shot from 100.0% to" in done.card.outcome and done.card.tone == "bad"

def test_settings_follow_the_architecture_and_the_number_of_pairs(model):
    public = replace(model, name="RN50")
    for clip, count, rate in ((public, 100_000, 1e-5), (model, 8000, 1e-3)):
        assert settle(METHODS["cleanclip"], clip, count).recipe["learning_rate"] == rate
    settings = settle(METHODS["ubt"], public, 500_000).settings
    assert (settings["select"], settings["steps"]) == (500, 19_530)
    few = settle(METHODS["supervised"], public, 900).recipe
    assert few["epochs"] == 40 and few["warmup_steps"] <= 40*(900 // 80) // 10

@pytest.mark.parametrize("method", METHODS)
def test_a_dry_run_writes_nothing_and_tells_the_cost(method, model, tmp_path):
    given = dict(reference="smoke-RN", trusted=TRUSTED, images=IMAGES, folder=tmp_path/"x")
    cost = repair(model, "world:train:220", method, **given, dry_run=True)
    assert isinstance(cost, Cost) and cost.seconds > 0 and cost.memory > 0 and not (tmp_path/"x").exists()
    assert set(METHODS[method].needs) <= set(INPUTS)
