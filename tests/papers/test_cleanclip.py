"""CleanCLIP: its loss against a plain formula, what goes through the model, its variants, supervised fine-tuning, and
what they refuse.
"""
import copy, inspect
from collections import Counter
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from mcl_repro.papers import cleanclip
from mcl_repro.attacks.base import make_attack
from mcl_repro.model.augmentation import augment_captions, augment_images
from mcl_repro.papers.cleanclip import (
    attach_head, balanced_pairs, caption_views, carry_moments, class_scores, CLEANCLIP_FIGURES, cleanclip_loss,
    CLEANCLIP_OUTPUTS, cleanclip_plan, CLEANCLIP_TABLES, cleaned_clip, columns_of, load_head, save_head, scratch_clip,
    self_supervised_loss, STARTS, supervised_clip, supervised_loss,
)
from mcl_repro.papers.cleanclip_study import structured_picture
from mcl_repro.model.clip import build_clip, load_weights, read_tensors, save_clip, to_pixels
from mcl_repro.data.labelled import read_csv_labels
from mcl_repro.data.registry import open_data, resolve
from mcl_repro.core.errors import DataError, SettingsError
from mcl_repro.lab.lab import Lab
from mcl_repro.lab.profiles import load_profile
from mcl_repro.papers.stages import load_clip
from mcl_repro.core.seeds import seeded
from mcl_repro.model.training import learning_rate_at, read_batch, Recipe, train, training_set
from mcl_repro.model import training
from mcl_repro.model.training import (
    _start, contrastive_loss, epoch_batches, load_checkpoint, parameter_groups, save_checkpoint,
)

RECIPE = dict(epochs=1, batch_size=16, learning_rate=1e-3)


@pytest.fixture(scope="module")
def clip():
    return build_clip("smoke-RN")


@pytest.fixture(scope="module")
def pairs():
    return open_data("world:validation:32")


@pytest.fixture
def batch(clip, pairs):
    return read_batch(training_set(clip, pairs), torch.arange(8, 20), "cpu", step=5)


def unit(n, seed):
    return F.normalize(torch.randn(n, 16, generator=torch.Generator().manual_seed(seed)), dim=-1)


def naive_cross_entropy(a, b, scale):
    "Mean of -log softmax of the diagonal, in numpy, row by row."
    logits = scale * a.double().numpy() @ b.double().numpy().T
    return float(np.mean([-logits[k, k] + np.log(np.exp(logits[k]).sum()) for k in range(len(logits))]))


# ---- the loss

@pytest.mark.parametrize("scale", [1., 14.3, 100.])
def test_the_self_supervised_loss_is_the_formula_and_has_one_direction(scale):
    i, ai, t, at = (unit(9, k) for k in range(4))
    loss = self_supervised_loss(i, ai, t, at, scale).item()
    assert loss == pytest.approx((naive_cross_entropy(i, ai, scale) + naive_cross_entropy(t, at, scale)) / 2, rel=1e-5)
    assert loss != pytest.approx((naive_cross_entropy(ai, i, scale) + naive_cross_entropy(at, t, scale)) / 2, rel=1e-4)


def test_the_whole_objective_is_its_parts_in_one_forward_pass(clip, pairs, batch):
    "Embeddings are computed here by the model itself, originals and augmentations in one batch of 2B."
    captions = list(pairs.captions)
    loss = cleanclip_loss(caption_views(clip, captions, seed=3), .5, 2., seed=3)(clip, batch).item()
    views = augment_captions(captions, seeded(3, 5, 5))[8:20]
    images = torch.cat([batch.images, augment_images(batch.images, "autoaugment", seeded(3, 4, 5))])
    u = F.normalize(clip.model.encode_image(to_pixels(clip, images)), dim=-1).detach()
    v = F.normalize(clip.model.encode_text(clip.tokenizer([*captions[8:20], *views])), dim=-1).detach()
    s, (i, ai), (t, at) = clip.model.logit_scale.exp().item(), u.chunk(2), v.chunk(2)
    parts = [naive_cross_entropy(a, b, s) for a, b in ((i, t), (t, i), (i, ai), (t, at))]
    assert loss == pytest.approx(.5 * sum(parts[:2]) / 2 + 2. * sum(parts[2:]) / 2, rel=1e-4)


def test_one_forward_pass_of_both_halves(clip, batch, pairs):
    seen = []
    hook = clip.model.visual.register_forward_hook(lambda m, given, out: seen.append(len(given[0])))
    for weight in (1., 0.):
        cleanclip_loss(caption_views(clip, list(pairs.captions)), 1., weight)(clip, batch)
    hook.remove()
    assert seen == [24, 12]      # without the self-supervised term nothing is augmented


def test_the_scale_is_shared_and_learns_from_both_terms(clip, batch, pairs):
    gradients = []
    for weights in ((1., 0.), (0., 1.), (1., 1.)):
        clip.model.zero_grad()
        cleanclip_loss(caption_views(clip, list(pairs.captions)), *weights)(clip, batch).backward()
        gradients.append(clip.model.logit_scale.grad.item())
    assert 0 not in gradients and len(set(gradients)) == 3


def test_the_loss_depends_on_seed_and_step_only(clip, batch, pairs):
    captions, later = list(pairs.captions), SimpleNamespace(**vars(batch) | dict(step=6))
    value = lambda b, **kwargs: cleanclip_loss(
        caption_views(clip, captions, **kwargs), **{k: v for k, v in kwargs.items() if k == "seed"}
    )(clip, b).item()
    torch.rand(5)
    assert value(batch) == value(batch) and len({value(batch), value(later), value(batch, seed=1)}) == 3


def test_frozen_captions_never_change(clip, batch, pairs):
    later = SimpleNamespace(**vars(batch) | dict(step=99))
    for frozen, same in ((True, True), (False, False)):
        views = caption_views(clip, list(pairs.captions), frozen=frozen)
        assert torch.equal(views(batch), views(later)) is same and views(batch).shape == batch.tokens.shape


@pytest.mark.parametrize("weights", [(0., 0.), (-1., 1.), (1., -.1)])
def test_weights_that_leave_nothing_to_minimise(weights):
    with pytest.raises(SettingsError, match="weights of at least 0"):
        cleanclip_loss(None, *weights)


# ---- the stage

def run(folder, f, **settings):
    "One stage, without a lab; in a folder that is there already, a second attempt."
    for name in ("out", "scratch"):
        (folder/name).mkdir(parents=True, exist_ok=True)
    return f(
        SimpleNamespace(out=folder / "out", scratch=folder / "scratch", device="cpu", progress=lambda *a: None),
        **settings,
    )


def clean(folder, start, **changes):
    "Result and weights of CleanCLIP's stage."
    return run(folder, cleaned_clip, **dict(clip=start, pairs="world:validation:32", recipe=RECIPE) | changes), (
        folder / "out/clip.safetensors"
    ).read_bytes()


class Killed(Exception):
    "Stands for a process that was killed."


@pytest.fixture
def killed_after_an_epoch(monkeypatch):
    "A function that runs a training up to its first restart point."
    def attempt(f, *args, **settings):
        save = save_checkpoint
        def stop(*given):
            save(*given)
            raise Killed
        with monkeypatch.context() as m, pytest.raises(Killed):
            m.setattr(training, "save_checkpoint", stop)
            f(*args, **settings)
    return attempt


@pytest.fixture
def start(tmp_path, clip):
    save_clip(clip, tmp_path/"clip.safetensors")
    return SimpleNamespace(path=tmp_path, result=dict(model="smoke-RN"))


def test_the_stage_gives_the_same_bytes_twice_and_others_for_other_settings(tmp_path, start):
    changes = [
        {}, {}, dict(frozen_captions=True), dict(self_supervised_weight=0.0), dict(clip_weight=0.0),
        dict(recipe=dict(RECIPE, seed=1)), dict(image_policy="roclip"),
    ]
    torch.rand(3)
    done = [clean(tmp_path/str(k), start, **change) for k, change in enumerate(changes)]
    assert done[0] == done[1] and len({weights for _, weights in done}) == len(changes) - 1
    result = done[0][0]
    assert (result["pairs"], result["steps"], result["synonyms"], result["frozen_captions"]) == (
        32, 2, "builtin", False,
    )
    assert done[2][0]["frozen_captions"] is True
    load_weights(build_clip("smoke-RN", seed=5), tmp_path/"0/out/clip.safetensors")


def test_bad_input_is_refused_before_training(tmp_path, start, monkeypatch):
    monkeypatch.setattr(cleanclip, "train_and_save", lambda *a, **k: pytest.fail("it trained"))
    with pytest.raises(SettingsError, match="synonyms auto means another thing on every machine"):
        clean(tmp_path/"a", start, synonyms="auto")
    with pytest.raises(SettingsError, match="unknown source of synonyms 'roget'"):
        clean(tmp_path/"b", start, synonyms="roget")
    with pytest.raises(SettingsError, match="one of them above"):
        clean(tmp_path/"c", start, clip_weight=0., self_supervised_weight=0.)
    (tmp_path/"pairs.csv").write_text("image,caption\nx.png,a dog\nx.png,2024\n")
    Image.new("RGB", (32, 32)).save(tmp_path/"x.png")
    with pytest.raises(DataError, match="row 1 has no letters: '2024'"):
        clean(tmp_path/"d", start, pairs=str(tmp_path/"pairs.csv"))


def test_a_late_schedule_is_the_same_one_epoch_on():
    """CleanCLIP's public code counts epochs from 1: written out here as it is there, with the last epoch on the rise
    again.
    """
    recipe, per_epoch = Recipe(epochs=3, batch_size=1, learning_rate=2., warmup_steps=5, schedule="cosine_late"), 4
    def public(step):
        return 2.*(step + 1)/5 if step < 5 else 2.*.5*(1 + np.cos(np.pi*(step - 5)/(12 - 5)))
    rates = [learning_rate_at(step, 12, recipe) for step in range(12)]
    assert rates == pytest.approx(
        [public(per_epoch * epoch + index) for epoch in (1, 2, 3) for index in range(per_epoch)]
    )
    assert rates[0] == 2. and rates[8] == pytest.approx(0) and rates[-1] > rates[-2] > rates[-3]


def test_a_late_schedule_trains_otherwise(tmp_path, start):
    recipe = dict(RECIPE, epochs=2)
    done = [
        clean(tmp_path / schedule, start, recipe=dict(recipe, schedule=schedule))[1]
        for schedule in ("cosine", "cosine_late")
    ]
    assert done[0] != done[1]


# ---- the optimiser's memory

@pytest.fixture(scope="module")
def poisoning(tmp_path_factory, pairs):
    "An artefact with the weights and the checkpoint of an earlier training."
    folder, clip = tmp_path_factory.mktemp("poisoning"), build_clip("smoke-RN")
    train(clip, training_set(clip, pairs), Recipe(**RECIPE), checkpoint=folder/"checkpoint.safetensors")
    save_clip(clip, folder/"clip.safetensors")
    return SimpleNamespace(path=folder, result=dict(model="smoke-RN"))


def test_moments_are_those_of_the_checkpoint_and_weights_and_clock_are_not(tmp_path, poisoning):
    other, made = build_clip("smoke-RN", seed=7), tmp_path/"start.safetensors"
    carry_moments(poisoning.path/"checkpoint.safetensors", other, made)
    was, found = read_tensors(poisoning.path/"checkpoint.safetensors"), read_tensors(made)
    assert found.keys() == was.keys()
    moments = [k for k in found if k.startswith("optimizer.")]
    assert moments
    assert all(torch.equal(found[k], was[k]) for k in moments)
    assert {found[k].item() for k in moments if k.endswith(".step")} == {2.0}
    assert all(torch.equal(found[f"model.{k}"], v) for k, v in other.model.state_dict().items())
    assert not torch.equal(found["model.visual.conv1.weight"], was["model.visual.conv1.weight"])
    state = _start(build_clip("smoke-RN"), range(32), Recipe(**RECIPE))
    assert load_checkpoint(state, made) and (state.epoch, state.step, state.history, state.stop) == (0, 0, [], False)
    assert torch.equal(state.clip.model.visual.conv1.weight, other.model.visual.conv1.weight)


def test_moments_change_what_comes_out_and_come_out_the_same_twice(tmp_path, poisoning):
    plain = clean(tmp_path/"plain", poisoning)
    carried = [clean(tmp_path/name, poisoning, moments=poisoning) for name in "ab"]
    assert carried[0] == carried[1] and carried[0][1] != plain[1] and carried[0][0]["steps"] == plain[0]["steps"] == 2


def of_all_rows(optimizer):
    "The state of an optimiser as torch's AdamW has it: moments of rows that no caption used are zero."
    table, found = optimizer.lazy.table.weight, {}
    for number, held in optimizer.state_dict()["state"].items():
        found[number] = {name: held[name] for name in ("step", "exp_avg", "exp_avg_sq")}
        if "rows" in held:
            nothing = torch.zeros_like(table).detach()
            for name in ("exp_avg", "exp_avg_sq"):
                found[number][name] = nothing.index_copy(0, held["rows"], held[name])
    return found


def test_training_with_moments_is_adamw_going_on(poisoning, pairs, tmp_path):
    "The first step, by hand: a fresh AdamW that is given the moments by torch's own means."
    recipe = Recipe(**dict(RECIPE, batch_size=32))
    clean(tmp_path/"stage", poisoning, recipe=vars(recipe), moments=poisoning, self_supervised_weight=0.)
    state = _start(load_clip(poisoning), range(32), recipe)
    assert load_checkpoint(state, poisoning.path/"checkpoint.safetensors")
    by_hand = load_clip(poisoning)
    optimizer = torch.optim.AdamW(parameter_groups(by_hand.model, .1), lr=1e-3, betas=(.9, .999), eps=1e-8)
    optimizer.load_state_dict(dict(optimizer.state_dict(), state=of_all_rows(state.optimizer)))
    by_hand.model.train()
    contrastive_loss(
        by_hand, read_batch(training_set(by_hand, pairs), epoch_batches(32, recipe, 0)[0], "cpu")
    ).backward()
    optimizer.step()
    found = read_tensors(tmp_path/"stage/out/clip.safetensors")
    assert all(torch.allclose(found[k], v, atol=1e-6) for k, v in by_hand.model.state_dict().items())


def test_a_killed_run_goes_on_from_its_own_checkpoint_and_not_from_the_moments(
    tmp_path, poisoning, killed_after_an_epoch
):
    settings = dict(moments=poisoning, recipe=dict(RECIPE, epochs=2))
    whole = clean(tmp_path/"whole", poisoning, **settings)
    killed_after_an_epoch(clean, tmp_path/"broken", poisoning, **settings)
    own = tmp_path/"broken/scratch/checkpoint.safetensors"
    before = read_tensors(own)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(cleanclip, "carry_moments", lambda *a: pytest.fail("it started over"))
        assert clean(tmp_path/"broken", poisoning, **settings) == whole
    # two steps of the poisoning, two of its own
    assert {before[k].item() for k in before if k.endswith(".step")} == {4.}


@pytest.mark.parametrize("what", ["architecture", "head", "weights only"])
def test_moments_of_another_architecture(tmp_path, poisoning, clip, monkeypatch, what):
    monkeypatch.setattr(cleanclip, "train_and_save", lambda *a, **k: pytest.fail("it trained"))
    folder = tmp_path/"other"
    folder.mkdir()
    own = {f"model.{k}": v for k, v in clip.model.state_dict().items()}
    tensors = {
        "architecture": {f"model.{k}": v for k, v in build_clip("mini-RN").model.state_dict().items()},
        "head": own | {"model.head.weight": torch.zeros(3, 32)}, "weights only": clip.model.state_dict(),
    }[what]
    save_file({k: v.contiguous() for k, v in tensors.items()}, str(folder/"checkpoint.safetensors"))
    says = (
        r"other/checkpoint.safetensors are of another architecture than smoke-RN: \d+ tensors differ, first "
        r".*; give the checkpoint of this model"
    )
    with pytest.raises(DataError, match=says) as e:
        clean(tmp_path/"run", poisoning, moments=SimpleNamespace(path=folder))
    assert "\n" not in str(e.value)
    assert not list((tmp_path / "run/out").iterdir())
    assert not (tmp_path / "run/scratch/checkpoint.safetensors").exists()
    if what == "head":
        assert "1 tensors differ, first 'head.weight'" in str(e.value)


def test_moments_that_are_not_there(tmp_path, start):
    with pytest.raises(DataError, match="no checkpoint at .*checkpoint.safetensors"):
        clean(tmp_path/"run", start, moments=SimpleNamespace(path=tmp_path))


# ---- a head

CLASSES = 40      # of the embedded world
LABELLED = "world:zeroshot_validation:80"


@pytest.fixture(scope="module")
def labelled():
    return open_data(LABELLED)


@pytest.fixture
def headed():
    clip = build_clip("smoke-RN")
    attach_head(clip, 5, seed=3)
    return clip


def naive_scores(clip, pixels):
    "Scores of the head with its matrix written out; embeddings are not normalised."
    with torch.no_grad():
        embedded = clip.model.eval().encode_image(to_pixels(clip, pixels)).double().numpy()
    return (
        embedded @ clip.model.head.weight.detach().double().numpy().T + clip.model.head.bias.detach().double().numpy()
    )


def test_a_head_fits_the_embeddings_and_depends_on_its_seed_only(headed):
    again, other = build_clip("smoke-RN"), build_clip("smoke-RN")
    torch.rand(3)
    before = torch.get_rng_state()
    attach_head(again, 5, seed=3)
    attach_head(other, 5, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert headed.model.head.weight.shape == (5, 32)
    assert torch.equal(headed.model.head.weight, again.model.head.weight)
    assert not torch.equal(headed.model.head.weight, other.model.head.weight)
    plain = build_clip("smoke-RN").model.state_dict()
    assert all(torch.equal(v, plain[k]) for k, v in headed.model.state_dict().items() if not k.startswith("head."))


def test_scores_are_of_every_class_in_the_order_of_the_images(headed, labelled):
    images = labelled.images.take(np.arange(7))
    scores = class_scores(headed, images)
    assert scores.shape == (7, 5) and scores.dtype == torch.float32 and not scores.requires_grad
    assert scores.numpy() == pytest.approx(naive_scores(headed, images.array(np.arange(7), 32)), abs=1e-5)
    for size in (1, 3, 7):
        assert torch.allclose(class_scores(headed, images, size), scores, atol=1e-6)


def test_scores_leave_the_running_statistics_alone(headed, labelled):
    headed.model.train()
    before = {k: v.clone() for k, v in headed.model.state_dict().items()}
    class_scores(headed, labelled.images.take(np.arange(5)))
    assert all(torch.equal(v, before[k]) for k, v in headed.model.state_dict().items())


def test_the_supervised_loss_is_the_formula(headed, labelled):
    labels, rows = np.array([4, 0, 3, 3, 1, 2, 0, 4]), torch.tensor([6, 1, 2, 7])
    data = training_set(headed, balanced_pairs(labelled, 1))
    batch = read_batch(data, rows, "cpu")
    scores = naive_scores(headed, batch.images)
    naive = np.mean([np.log(np.exp(s).sum()) - s[labels[row]] for s, row in zip(scores, rows)])
    loss = supervised_loss(torch.from_numpy(labels))(headed, batch)
    assert loss.item() == pytest.approx(naive, rel=1e-5)
    loss.backward()
    touched = {k for k, p in headed.model.named_parameters() if p.grad is not None}
    assert {k.split(".")[0] for k in touched} == {"head", "visual"}


# ---- labelled images

def test_as_many_images_of_every_class_and_which_depends_on_the_seed(labelled):
    pairs = [balanced_pairs(labelled, 1, seed) for seed in (0, 0, 1)]
    assert all(np.bincount(p.labels, minlength=CLASSES).tolist() == [1] * CLASSES for p in pairs)
    assert pairs[0].ids == pairs[1].ids != pairs[2].ids
    chosen, of = pairs[0], dict(zip(labelled.ids, range(80)))
    rows = [of[i] for i in chosen.ids]
    assert len(set(rows)) == CLASSES
    assert (labelled.labels[rows] == chosen.labels).all()
    assert chosen.captions == [labelled.classnames[c] for c in chosen.labels]
    assert (chosen.images.array(None, 32) == labelled.images.array(np.array(rows), 32)).all()
    assert np.bincount(balanced_pairs(labelled, 2).labels).tolist() == [2]*CLASSES


def test_a_class_with_too_few_images_is_named(labelled):
    short = labelled.select(np.delete(np.arange(80), np.flatnonzero(labelled.labels == 7)[:1]))
    with pytest.raises(
        DataError,
        match=f"1 images of class '{labelled.classnames[7]}', 2 are needed; lower per_class or give more images",
    ):
        balanced_pairs(short, 2)
    none = labelled.select(np.flatnonzero(labelled.labels != 39))
    with pytest.raises(DataError, match=f"0 images of class '{labelled.classnames[39]}', 1 are needed"):
        balanced_pairs(none, 1)


# ---- a head that is stored

def test_a_head_comes_back_with_its_names_and_leaves_a_plain_clip(tmp_path, headed):
    weight, bias = headed.model.head.weight.clone(), headed.model.head.bias.clone()
    save_head(headed, tmp_path/"head.safetensors", ["a", "b", "c, d", "é", '"'])
    assert not hasattr(headed.model, "head")
    assert headed.model.state_dict().keys() == build_clip("smoke-RN").model.state_dict().keys()
    assert load_head(SimpleNamespace(path=tmp_path), headed) == ["a", "b", "c, d", "é", '"']
    assert torch.equal(headed.model.head.weight, weight) and torch.equal(headed.model.head.bias, bias)


def test_a_head_of_another_width(tmp_path, headed):
    save_head(headed, tmp_path/"head.safetensors", list("abcde"))
    with pytest.raises(
        DataError, match="takes embeddings of width 32, mini-RN gives 128: load the model it was trained with"
    ):
        load_head(SimpleNamespace(path=tmp_path), build_clip("mini-RN"))


def test_classes_of_one_name_are_told_apart_by_their_order():
    "ImageNet has two classes called missile and two called sunglasses."
    names = ["missile", "cat", "missile", "sunglasses"]
    assert columns_of(names, names) == [0, 1, 2, 3]
    assert columns_of(names, ["missile", "missile", "cat"]) == [0, 2, 1]
    assert columns_of(names, ["missile"]) == [0]


@pytest.mark.parametrize("count", [0, -1])
def test_less_than_one_image_of_a_class(labelled, count):
    with pytest.raises(SettingsError, match=f"at least 1, not {count}"):
        balanced_pairs(labelled, count)


def test_columns_are_found_by_name():
    known = ["dog", "cat", "ape"]
    assert columns_of(known, ["ape", "dog"]) == [2, 0] and columns_of(known, known) == [0, 1, 2]
    with pytest.raises(
        DataError,
        match=r"the labelled images name no class 'gnu' \(2 of the test set's 3 are missing\): label images of all "
        r"classes",
    ):
        columns_of(known, ["gnu", "cat", "Dog"])


# ---- the supervised stage

SUPERVISED = dict(images=resolve(LABELLED), recipe=RECIPE, per_class=1)


def supervise(folder, start, **changes):
    "Result, weights and head of the supervised stage."
    result = run(folder, supervised_clip, **dict(SUPERVISED, clip=start) | changes)
    return result, *((folder/f"out/{name}.safetensors").read_bytes() for name in ("clip", "head"))


def test_supervised_fine_tuning_gives_the_same_bytes_twice_and_others_for_other_settings(tmp_path, start):
    changes = [{}, {}, dict(recipe=dict(RECIPE, seed=1)), dict(per_class=2), dict(head_only=True)]
    torch.rand(3)
    done = [supervise(tmp_path/str(k), start, **change) for k, change in enumerate(changes)]
    assert done[0] == done[1]
    assert len({clip for _, clip, _ in done}) == len({head for *_, head in done}) == len(changes) - 1
    assert [(r["pairs"], r["steps"], r["classes"], r["head_only"]) for r, *_ in done[2:]] == [
        (40, 2, CLASSES, False), (80, 5, CLASSES, False), (40, 2, CLASSES, True),
    ]
    assert {p.name for p in (tmp_path/"0/out").iterdir()} == {"clip.safetensors", "head.safetensors"}


def test_the_image_tower_learns_and_the_text_tower_stays_to_the_bit(tmp_path, start, labelled):
    supervise(tmp_path/"a", start)
    before, after = read_tensors(start.path/"clip.safetensors"), read_tensors(tmp_path/"a/out/clip.safetensors")
    assert before.keys() == after.keys()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert {k.split(".")[0] for k in changed} == {"visual"}
    assert {"visual.conv1.weight", "visual.bn1.running_mean", "visual.attnpool.c_proj.weight"} <= changed
    clip = load_clip(SimpleNamespace(path=tmp_path/"a/out", result=dict(model="smoke-RN")))
    assert load_head(SimpleNamespace(path=tmp_path / "a/out"), clip) == labelled.classnames
    assert class_scores(clip, labelled.images).shape == (80, CLASSES)


def test_a_head_alone_leaves_the_whole_clip_to_the_bit(tmp_path, start):
    _, weights, _ = supervise(tmp_path/"a", start, head_only=True, recipe=dict(RECIPE, epochs=2))
    assert weights == (start.path/"clip.safetensors").read_bytes()      # running statistics too
    attach_head(fresh := build_clip("smoke-RN"), CLASSES)
    load_head(SimpleNamespace(path=tmp_path/"a/out"), trained := build_clip("smoke-RN"))
    assert not torch.equal(fresh.model.head.weight, trained.model.head.weight)
    assert not torch.equal(fresh.model.head.bias, trained.model.head.bias)


def test_a_trained_head_knows_its_images(tmp_path, start):
    "Three classes that nobody can take for each other, learnt by heart."
    (tmp_path / "labels.csv").write_text(
        "image,label\n" + "".join(f"{k}.png,{'red green blue'.split()[k % 3]}\n" for k in range(12))
    )
    for k in range(12):
        picture = np.random.default_rng(k).integers(0, 60, (32, 32, 3), dtype=np.uint8)
        picture[..., k % 3] += 180
        Image.fromarray(picture).save(tmp_path/f"{k}.png")
    source = resolve(str(tmp_path/"labels.csv"))
    supervise(
        tmp_path / "a", start, images=source, per_class=4,
        recipe=dict(RECIPE, epochs=40, batch_size=12, learning_rate=3e-3),
    )
    clip = load_clip(SimpleNamespace(path=tmp_path/"a/out", result=dict(model="smoke-RN")))
    names, data = load_head(SimpleNamespace(path=tmp_path/"a/out"), clip), open_data(source)
    assert names == ["blue", "green", "red"]
    assert (class_scores(clip, data.images).argmax(1).numpy() == data.labels).all()


@pytest.mark.parametrize("head_only", [False, True])
def test_killed_supervised_fine_tuning_goes_on(tmp_path, start, killed_after_an_epoch, head_only):
    settings = dict(recipe=dict(RECIPE, epochs=2), head_only=head_only)
    whole = supervise(tmp_path/"whole", start, **settings)
    killed_after_an_epoch(supervise, tmp_path/"broken", start, **settings)
    assert not list((tmp_path/"broken/out").iterdir()) and supervise(tmp_path/"broken", start, **settings) == whole


def test_captions_are_no_labels(tmp_path, start, monkeypatch):
    monkeypatch.setattr(training, "_step", lambda *a: pytest.fail("it trained"))
    with pytest.raises(
        SettingsError, match="needs labelled images, and world:validation:24 has captions: give a set with classes"
    ):
        supervise(tmp_path/"a", start, images=resolve("world:validation:24"))
    with pytest.raises(DataError, match="2 images of class .*, 3 are needed"):
        supervise(tmp_path/"b", start, per_class=3)
    assert not list((tmp_path/"a/out").iterdir()) and not list((tmp_path/"b/out").iterdir())


def test_numbers_without_class_names(tmp_path, start, monkeypatch):
    monkeypatch.setattr(training, "_step", lambda *a: pytest.fail("it trained"))
    (tmp_path/"labels.csv").write_text("image,label\n0.png,0\n1.png,1\n")
    for k in range(2):
        Image.new("RGB", (32, 32)).save(tmp_path/f"{k}.png")
    says = "classes are numbers without names; write them into .*classnames.txt, one per line"
    with pytest.raises(DataError, match=says):
        read_csv_labels(tmp_path/"labels.csv")
    with pytest.raises(DataError, match=says):
        supervise(tmp_path/"a", start, images=str(tmp_path/"labels.csv"))
    (tmp_path/"classnames.txt").write_text("cat\n")
    with pytest.raises(DataError, match="labels run from 0 to 1 but there are 1 class names"):
        supervise(tmp_path/"b", start, images=str(tmp_path/"labels.csv"))


def test_weights_of_another_architecture(tmp_path, start):
    save_clip(build_clip("mini-RN"), tmp_path/"other.safetensors")
    with pytest.raises(
        DataError,
        match=r"other.safetensors does not fit smoke-RN: \d+ tensors differ, first '.*'.*; build the model it was "
        r"saved from",
    ):
        load_weights(build_clip("smoke-RN"), tmp_path/"other.safetensors")
    wrong = SimpleNamespace(path=start.path, result=dict(model="mini-RN"))
    for name, f, given in (
        ("a", cleaned_clip, dict(pairs="world:validation:24")),
        ("b", supervised_clip, dict(images=resolve(LABELLED))),
    ):
        with pytest.raises(DataError, match="clip.safetensors does not fit mini-RN"):
            run(tmp_path/name, f, clip=wrong, recipe=RECIPE, **given)


@pytest.mark.parametrize("defence, given", [
    (cleaned_clip, {"clip", "pairs", "recipe"}),
    (supervised_clip, {"clip", "images", "recipe"}),
])
def test_the_stages_are_told_nothing_of_the_attack(defence, given):
    told = set(inspect.signature(defence).parameters)
    assert given <= told and not told & {"attack", "target", "poisoned", "trigger", "test"}


class Peeked(AssertionError):
    "A defence looked at what a defender does not have."


def refused(name):
    "A property that nobody may read."
    def read(self):
        raise Peeked(f"the defence read {name}")
    return property(read)


def sealed(data):
    "The same data, which raise when somebody asks which of them are poisoned, how and for what target."
    doors = {name: refused(name) for name in ("flags", "poisoned", "attack", "trigger", "target", "describe")}
    same = copy.copy(data)
    object.__setattr__(same, "__class__", type("Sealed", (type(data),), doors))  # data classes are frozen
    return same


class SealedArtefact:
    "The weights of a model and its name; whatever else is asked for, such as how it was made, raises."
    def __init__(self, artefact):
        self.path, self.result = artefact.path, dict(model=artefact.result["model"])

    def __getattr__(self, name):
        raise Peeked(f"the defence read {name}")


JUDGES = "TriggeredImages", "attack_of", "attack_hits", "alignment", "classification", "head_classification"
DEFENCES = {
    "CleanCLIP": (cleaned_clip, dict(pairs="world:validation:32")),
    "carried-over moments": (cleaned_clip, dict(pairs="world:validation:32", moments=True)),
    "supervised": (supervised_clip, dict(images=resolve(LABELLED), per_class=1)),
    "linear probe": (supervised_clip, dict(images=resolve(LABELLED), per_class=1, head_only=True)),
}


@pytest.mark.parametrize("name", DEFENCES)
def test_a_defence_never_sees_triggers_or_flags(tmp_path, poisoning, monkeypatch, name):
    "It works on sealed models and data as it does on open ones: nothing that a seal covers was read."
    defence, settings = DEFENCES[name]

    def repaired(folder, artefact):
        given = dict(settings, moments=artefact) if "moments" in settings else settings
        result = run(folder, defence, clip=artefact, recipe=RECIPE, **given)
        return result, (folder/"out/clip.safetensors").read_bytes()

    in_the_open = repaired(tmp_path/"open", poisoning)

    def judge(*args, **kwargs):
        raise Peeked("the defence asked the judge")
    for known in JUDGES:
        assert hasattr(cleanclip, known), known
        monkeypatch.setattr(cleanclip, known, judge)
    monkeypatch.setattr(cleanclip, "open_data", lambda source: sealed(open_data(source)))
    assert repaired(tmp_path/"sealed", SealedArtefact(poisoning)) == in_the_open


def test_a_seal_is_one(poisoning, pairs):
    "What the test above rests on: to read a flag, an attack or a record raises; to read a caption does not."
    shut = sealed(pairs)
    assert list(shut.captions) == list(pairs.captions) and isinstance(shut, type(pairs))
    for thing, name in ((shut, "flags"), (shut, "attack"), (SealedArtefact(poisoning), "record")):
        with pytest.raises(Peeked, match=name):
            getattr(thing, name)


# ---- the plan

@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab("smoke", device="cpu", runs=tmp_path_factory.mktemp("plan")/"runs", progress=False,
               module="mcl_repro.papers.cleanclip")


def stages_of(nodes):
    return Counter(node.stage.name.rpartition(".")[2] for node in nodes)


def test_the_plan_computes_nothing_and_holds_every_table_and_figure(lab, monkeypatch):
    monkeypatch.setattr(lab, "run", lambda *a: pytest.fail("it computed"))
    plan = cleanclip_plan(lab, lab.profile)
    assert {line.table for line in plan.lines} == set(CLEANCLIP_TABLES)
    shown = [output for output in CLEANCLIP_OUTPUTS if output != "cleanclip.framework"]
    assert [*plan.readers] == ["cleanclip.preconditions", *shown]
    parts, nodes = plan.parts, set(plan.nodes)
    clouds = [node for found in parts.clouds.values() for node in found.values()]
    shown = [*parts.rates.values(), *parts.untouched.values(), *parts.watched.values(), *parts.released.values()]
    assert {*clouds, *shown, parts.before, parts.undefended, parts.views} <= nodes and len(nodes) == len(plan.nodes)
    assert list(parts.released) == ["Public CLIP", "No defense", "CleanCLIP"] and parts.tried == {}
    assert {(attack, name) for attack, name in parts.watched} == {
        ("BadNet", "poisoning"), ("BadNet", "Contrastive only"), ("BadNet", "CleanCLIP")}


def all_of(nodes):
    "Nodes and all that they start from."
    todo, found = list(nodes), set()
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.inputs.values()
    return found


def asked(output):
    return dict(figures=[output]) if output in CLEANCLIP_FIGURES else dict(tables=[output])


def test_each_output_is_read_by_itself_and_all_of_them_are_the_whole_plan(lab):
    whole, keys = cleanclip_plan(lab, lab.profile).readers, lambda nodes: {node.key for node in nodes}
    for output in CLEANCLIP_OUTPUTS:
        alone = cleanclip_plan(lab, lab.profile, **asked(output)).readers
        assert set(alone) == {output} & set(whole)
        # but for poisoned sets: a trigger is described by that of the first line that has it
        measured = [
            {node for node in found.get(output, ()) if "poisoned_pairs" not in node.stage.name}
            for found in (alone, whole)
        ]
        assert keys(measured[0]) == keys(measured[1]), output


@pytest.mark.parametrize("output, needed, spared", [
    ("main", {"scratch_clip", "finetuned_clip", "cleaned_clip", "supervised_clip", "released_evaluation"},
     {"watched_training", "triggered_clouds", "second_views"}),
    ("pretrained", {"scratch_clip", "finetuned_clip", "cleaned_clip"}, {"supervised_clip", "watched_training"}),
    ("variants", {"watched_training", "cleaned_clip"}, {"supervised_clip", "scratch_clip"}),
    ("curves", {"scratch_clip", "head_classification", "classification", "cleaned_clip"},
     {"finetuned_clip", "clean_clip", "released_evaluation"}),
    ("lambda", {"scratch_clip", "cleaned_clip", "classification"}, {"finetuned_clip", "clean_clip", "supervised_clip"}),
    ("data_size", {"scratch_clip", "finetuned_clip", "cleaned_clip"}, {"supervised_clip", "watched_training"}),
    ("objective", {"scratch_clip", "cleaned_clip"}, {"finetuned_clip", "supervised_clip"}),
    ("tsne", {"scratch_clip", "triggered_clouds", "supervised_clip", "cleaned_clip"},
     {"finetuned_clip", "classification", "head_classification"}),
    ("alignment", {"watched_training", "finetuned_clip"}, {"cleaned_clip", "classification"}),
    ("views", {"second_views"}, {"clean_clip", "poisoned_pairs"}),
    ("triggers", {"structured_pattern"}, {"clean_clip", "poisoned_pairs"}),
    ("framework", set(), {"clean_clip", "second_views", "poisoned_pairs"}),
])
def test_one_table_or_figure_needs_no_more_than_it_reads(lab, output, needed, spared):
    kinds = set(stages_of(all_of(cleanclip_plan(lab, lab.profile, **asked(f"cleanclip.{output}")).nodes)))
    assert needed <= kinds and not spared & kinds


def test_only_the_headline_table_repeats_over_seeds_unless_all_are_asked_to(tmp_path):
    for seed_all, repeated in ((False, {"cleanclip.main"}), (True, set(CLEANCLIP_TABLES))):
        lab = Lab("smoke", device="cpu", runs=tmp_path, progress=False, seeds=2, seed_all=seed_all)
        plan = cleanclip_plan(lab, lab.profile)
        assert {line.table for line in plan.lines if len(line.chains) == 2} == repeated
        assert {seed for *_, seed in plan.parts.rates} == ({0, 1} if seed_all else {0})


def test_a_training_that_is_watched_gives_the_moments(lab):
    plan = cleanclip_plan(lab, lab.profile)
    carried = {n.settings["moments"] for n in all_of(plan.nodes) if n.settings.get("moments") is not None}
    assert carried == {plan.parts.watched["BadNet", "poisoning"]}
    keeps = {name: node.settings["keep_moments"] for (_, name), node in plan.parts.watched.items()}
    assert keeps == {"poisoning": True, "Contrastive only": False, "CleanCLIP": False}


def test_what_is_no_repair_is_tried_where_embeddings_are_drawn(lab):
    lines = cleanclip_plan(lab, lab.profile, tables=["cleanclip.finetune_ablation"]).lines
    attacks = {}
    for line in lines:
        attacks.setdefault((line.labels["start"], line.defence), []).append(line.labels["attack"])
    assert attacks.pop(("from scratch", "Self-supervised only")) == list(lab.profile.cleaning.tsne.attacks)
    repairs = ("No defense", "Contrastive only", "CleanCLIP")
    assert set(attacks) == {(start, repair) for start in ("from scratch", "fine-tuned") for repair in repairs}
    for (start, _), found in attacks.items():
        assert found == list(lab.profile.cleaning[{"from scratch": "attacks", "fine-tuned": "fine_tuned"}[start]])


def test_models_from_scratch_come_first_and_are_cleaned_as_the_paper_does(lab):
    "Their own number of poisoned pairs, clean pairs and passes; a victim by fine-tuning keeps those of UBT and CFBD."
    plan, cleaning = cleanclip_plan(lab, lab.profile, tables=["cleanclip.main"]), lab.profile.cleaning
    starts = [line.labels["start"] for line in plan.lines]
    assert starts == sorted(starts, key=["from scratch", "fine-tuned"].index)
    made = {(line.labels["start"], line.labels["attack"], line.defence): line for line in plan.lines}
    kinds = {"from scratch": "scratch_clip", "fine-tuned": "finetuned_clip"}
    roles = {"from scratch": "clean_pairs_scratch", "fine-tuned": "clean_pairs"}
    for (start, attack, defence), line in made.items():
        (chain,), (model,) = line.chains, line.models
        assert [*stages_of([chain.victim])] == [kinds[start]]
        if start == "from scratch":
            expected = cleaning.scratch.counts.get(attack, cleaning.scratch.count)
            assert chain.poisoned.settings["count"] == expected
        if defence == "CleanCLIP":
            assert model.settings["pairs"] == lab.role(roles[start]) and model.settings["clip"] == chain.victim
    asked = {start: made[start, "BadNet", "CleanCLIP"].models[0].settings["recipe"] for start in roles}
    own = cleaning.scratch.cleanclip.recipe
    assert asked["from scratch"] == {**lab.profile.cleanclip.recipe, **own, "seed": 0}
    assert asked["fine-tuned"] == {**lab.profile.cleanclip.recipe, "seed": 0}


def test_what_a_profile_makes_on_request_only(tmp_path):
    later = ["cleanclip.objective", "cleanclip.variants"]
    changed = Lab("smoke", device="cpu", runs=tmp_path, progress=False, settings={"cleaning.on_request": later})
    usual = cleanclip_plan(changed, changed.profile)
    assert set(CLEANCLIP_OUTPUTS) - set(usual.wanted) == set(later)
    assert {line.table for line in usual.lines} == set(CLEANCLIP_TABLES) - set(later)
    asked_for = cleanclip_plan(changed, changed.profile, tables=later)
    assert asked_for.wanted == [output for output in CLEANCLIP_OUTPUTS if output in later]
    assert {line.table for line in asked_for.lines} == set(later)


def test_clean_sets_of_each_start(lab):
    "A set that is null is left out; a change of the recipe reaches the training."
    plan = cleanclip_plan(lab, lab.profile, tables=["cleanclip.data_size"])
    found = {(line.labels["start"], line.labels["clean_pairs"]): line.models[0] for line in plan.lines}
    sets = lab.profile.cleaning.sweeps.clean_sets
    assert len(found) == 2 + sum(change is not None for start in sets.values() for change in start.values())
    more = found["from scratch", "five times as many, in 2 passes: 200 pairs"]
    assert more.settings["recipe"]["epochs"] == 2 and more.settings["pairs"] == lab.role("clean_pairs")
    half = found["from scratch", "half: 50 pairs"]
    assert half.settings["recipe"]["epochs"] == lab.profile.cleaning.scratch.cleanclip.recipe.epochs
    without = Lab("smoke", device="cpu", runs=lab.folder.parent, progress=False)
    without.profile.cleaning.sweeps.clean_sets["fine-tuned"]["half"] = None
    left = [line.labels["clean_pairs"] for line in cleanclip_plan(without, without.profile,
                                                                  tables=["cleanclip.data_size"]).lines]
    assert len(left) == len(found) - 1 and left.count("half: 150 pairs") == 0


def test_models_with_a_head_are_measured_by_their_head(lab):
    plan = cleanclip_plan(lab, lab.profile, tables=["cleanclip.main"])
    measured = {line.defence: stages_of(line.found) for line in plan.lines}
    plan = cleanclip_plan(lab, lab.profile, figures=["cleanclip.curves"])
    by_head, by_prompts = Counter(head_classification=1), Counter(classification=1)
    assert measured == {
        "No defense": by_prompts, "CleanCLIP": by_prompts, "Supervised": by_head, "Linear probe": by_head,
    }
    assert [n.stage.name for (_, method, *_), n in plan.parts.rates.items() if method == "Supervised"] == [
        "cleanclip.head_classification"]


def test_a_table_alone_has_its_own_lines_and_no_figures(lab):
    plan = cleanclip_plan(lab, lab.profile, tables=["cleanclip.lambda"])
    weights = [line.labels["lambda"] for line in plan.lines]
    assert weights == list(lab.profile.cleaning.sweeps.weights) and not plan.parts.rates and not plan.parts.clouds
    assert stages_of(plan.nodes)["cleaned_clip"] == len(weights)
    assert {line.chains[0].attack for line in plan.lines} == {lab.profile.cleaning.sweeps.weight_attack}


def test_attacks_that_are_named_are_those_of_the_main_tables(lab):
    plan = cleanclip_plan(lab, lab.profile, attack_names=["WaNet"])
    of = lambda table: {line.labels["attack"] for line in plan.lines if line.table == table}
    assert of("cleanclip.main") == of("cleanclip.finetune_ablation") == {"WaNet"} and not plan.whole
    assert "BadNet" in of("cleanclip.structured")      # sweeps have attacks of their own
    assert plan.parts.clouds == {} and plan.parts.released == {}


def test_names_that_the_plan_does_not_have(lab):
    with pytest.raises(SettingsError, match="unknown attack 'SIG' in attack_names; profile smoke has BadNet, Blended"):
        cleanclip_plan(lab, lab.profile, attack_names=["SIG"])
    with pytest.raises(SettingsError, match="unknown table or figure 'cleanclip.nu'"):
        cleanclip_plan(lab, lab.profile, tables=["cleanclip.nu"])
    says = "unknown method 'UBT' in learning_rates: use CleanCLIP, Contrastive only, Supervised, Linear probe"
    with pytest.raises(SettingsError, match=says):
        cleanclip_plan(lab, lab.profile, learning_rates=dict(UBT=[1e-4]))


def test_learning_rates_are_tried_by_clean_accuracy_alone(lab):
    rates = {"CleanCLIP": [1e-4, 3e-4], "Linear probe": [1e-3]}
    plan = cleanclip_plan(lab, lab.profile, tables=["cleanclip.lambda"], learning_rates=rates)
    tried = plan.parts.tried
    names = ["poisoned model", "CleanCLIP 0.0001", "CleanCLIP 0.0003", "Linear probe 0.001"]
    assert list(tried) == [f"{start}: {name}" for start in ("from scratch", "fine-tuned") for name in names]
    assert {node.settings["attack"] for node in tried.values()} == {None} and set(tried.values()) <= set(plan.nodes)
    assert stages_of(tried.values()) == Counter(classification=6, head_classification=2)


# ---- profiles

@pytest.mark.parametrize("profile", ["smoke", "mini", "paper"])
def test_profiles_give_what_the_stages_take(profile):
    settings, known = load_profile(profile), {f.name for f in fields(Recipe)}
    takes, supervised, scratch = (
        set(inspect.signature(f).parameters) - {"work"} for f in (cleaned_clip, supervised_clip, scratch_clip)
    )
    assert set(settings.cleanclip) <= takes and settings.cleanclip.synonyms != "auto" and settings.roles.clean_pairs
    cleaning = settings.cleaning
    for block in (cleaning.supervised, cleaning.probe):
        assert set(block) <= supervised and set(block.recipe) <= known and Recipe(**block.recipe)
    assert cleaning.probe.head_only and not cleaning.supervised.get("head_only") and settings.roles.labelled_images
    sets = cleaning.sweeps.clean_sets
    changes = [change for start in STARTS for change in sets[start].values() if change is not None]
    assert changes and {change["pairs"] for change in changes if "pairs" in change} <= set(settings.roles)
    assert set(cleaning.fine_tuned) <= set(cleaning.attacks) and set(cleaning.on_request) <= set(CLEANCLIP_OUTPUTS)
    assert set(STARTS.values()) | {"clean_pairs_scratch", "clean_pairs"} <= set(settings.roles)
    assert Recipe(**{**settings.cleanclip.recipe, **cleaning.scratch.cleanclip.recipe})
    for name, changes in cleaning.sweeps.variants.items():
        assert (
            set(changes) <= takes
            and Recipe(**{**settings.cleanclip.recipe, **changes.get("recipe", {})})
            and changes.get("moments", True) is True
        ), name
    of_the_plan = {"count", "counts", "few", "cleanclip"}
    assert set(cleaning.scratch) - of_the_plan <= scratch and Recipe(**cleaning.scratch.recipe)
    for entry in cleaning.structured.attacks.values():
        drawn = entry.pattern if isinstance(entry.pattern, str) else structured_picture(size=8, **entry.pattern)
        assert make_attack(**{**entry, "pattern": drawn})


def test_the_paper_profile_is_the_public_codes():
    settings = load_profile("paper")
    recipe, supervised = settings.cleanclip.recipe, settings.cleaning.supervised.recipe
    assert (
        recipe.epochs, recipe.batch_size, recipe.learning_rate, recipe.warmup_steps, settings.cleanclip.synonyms,
    ) == (10, 64, 1e-5, 50, "wordnet")
    assert (
        supervised.epochs, supervised.batch_size, supervised.learning_rate, supervised.weight_decay,
        supervised.warmup_steps,
    ) == (10, 80, 1e-4, 0.01, 500)
    probe = settings.cleaning.probe.recipe
    assert (probe.epochs, probe.batch_size, probe.learning_rate, probe.weight_decay) == (10, 128, 5e-3, 0.01)
    assert Recipe(**probe).warmup_steps == 0 and Recipe(**probe).schedule == "cosine"
    trained = settings.finetune, recipe, settings.cleaning.scratch.recipe
    assert {r.decay for r in trained} == {"public_code"} and {supervised.decay, probe.decay} == {"all_but_biases"}
    scratch = settings.cleaning.scratch
    cleaned = {**recipe, **scratch.cleanclip.recipe}
    assert (cleaned["epochs"], cleaned["batch_size"], cleaned["learning_rate"]) == (10, 64, 1e-5)
    assert (scratch.count, scratch.few[0], scratch.recipe.epochs) == (1500, 75, 64)
    assert settings.cleaning.on_request == [] and list(settings.cleaning.fine_tuned) == list(settings.cleaning.attacks)
    assert settings.cleanclip.image_policy == "autoaugment_pil"
    assert load_profile("mini").cleanclip.image_policy == "autoaugment"
