"UBT as a defence: what it may see, when it refuses, what its losses do, and that it survives being killed."
import ast
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mcl_repro.model.clip import embed_images, embed_tokens, info_nce
from mcl_repro.data.pairs import ArrayImages, Pairs
from mcl_repro.core.errors import SettingsError
from mcl_repro.lab.lab import Lab
from mcl_repro.lab.nodes import stage
from mcl_repro.papers.stages import arrays, clean_clip, finetuned_clip, load_clip, open_poisoned, poisoned_pairs
from mcl_repro.model.training import train, training_set
from mcl_repro.papers.ubt import (
    cartesian_pairs, FORGETTING, looks_poisoned, most_similar, overfitting_loss, split_suspicious, ubt_overfit,
    ubt_select, ubt_split, ubt_unlearn, unlearning_loss,
)
from mcl_repro.model import training
from mcl_repro.papers import ubt
from mcl_repro.measures.attribution import image_relevance
from mcl_repro.model.training import _step, _train_epoch, embed_batch, read_batch, Recipe, step_rows
from mcl_repro.papers.stages import defender_pairs
from mcl_repro.papers.ubt import images_of, masked_pairs, MASKS, ubt_plan, UBT_TABLES

HERE = Path(__file__).parent
ATTACK = dict(name="badnets", pattern="checker", placement="corner", patch_share=0.25)
OVERFIT = dict(epochs=2, batch_size=32, learning_rate=1e-3)
UNLEARN = dict(epochs=3, batch_size=16, learning_rate=1e-3, frozen_batchnorm=True)   # 6 x 6 pairs: two steps an epoch
ASCENT = dict(forget="cosine", retention=0., stop="unrelated")
BARE = dict(margin=0.)


@stage
def as_if_poisoned(work, *, selection):
    "A selection with the verdict that a model this small and short trained cannot earn."
    shutil.copy(selection.path/"selection.npz", work.out)
    return dict(selection.result, poisoned=True)


def graph(lab):
    "The nodes of UBT on 120 pairs and a tiny model."
    clean = lab.node(
        clean_clip, model="smoke-RN", pairs=lab.role("pretrain"),
        recipe=dict(epochs=1, batch_size=32, learning_rate=1e-3),
    )
    poisoned = lab.node(
        poisoned_pairs, pairs=lab.role("finetune"), attack=ATTACK, target="banana", count=8, image_size=32, seed=0
    )
    victim = lab.node(
        finetuned_clip, clip=clean, poisoned=poisoned, recipe=dict(epochs=1, batch_size=32, learning_rate=3e-4)
    )
    split = lab.node(ubt_split, clip=clean, poisoned=poisoned, share=.15)
    overfitted = lab.node(ubt_overfit, clip=victim, poisoned=poisoned, split=split, recipe=OVERFIT)
    selection = lab.node(
        as_if_poisoned, selection=lab.node(ubt_select, overfitted=overfitted, poisoned=poisoned, split=split, count=6)
    )
    unlearn = lab.node(
        ubt_unlearn, clip=victim, poisoned=poisoned, split=split, selection=selection, recipe=UNLEARN, **BARE
    )
    return SimpleNamespace(
        clean=clean, poisoned=poisoned, victim=victim, split=split, selection=selection, unlearn=unlearn
    )


def open_lab(runs):
    return Lab(
        "smoke", device="cpu", runs=runs, roles=dict(pretrain="world:pretrain:128", finetune="world:train:120"),
        progress=False,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Everything up to the selection, as artefacts by name; nothing is unlearned yet."
    lab = open_lab(tmp_path_factory.mktemp("ubt")/"runs")
    nodes = graph(lab)
    lab.run(nodes.selection)
    return SimpleNamespace(
        lab=lab, nodes=nodes,
        **{k: lab.run(getattr(nodes, k)) for k in ("clean", "poisoned", "victim", "split", "selection")},
    )


def work(folder):
    "What a stage is given, without a lab."
    for name in ("out", "scratch"):
        (folder/name).mkdir(parents=True)
    return SimpleNamespace(out=folder/"out", scratch=folder/"scratch", device="cpu", progress=lambda *a: None)


def artefact(folder, f, **settings):
    "Run a stage without a lab."
    result = f(work(folder), **settings)
    return SimpleNamespace(path=folder/"out", result=result)


def weights(artefact):
    return (Path(artefact.path)/"clip.safetensors").read_bytes()


# ---- what a defence sees

class Unseen:
    "Stands where the artefact of the poisoned set stands, and allows nobody to look at it."
    def __getattr__(self, name):
        raise AssertionError(f"the defence looked at {name} of the poisoned set")


def defend(folder, made, poisoned):
    "All stages of the defence; the results and the bytes of all files."
    split = artefact(folder/"split", ubt_split, clip=made.clean, poisoned=poisoned, share=.15)
    overfitted = artefact(
        folder / "overfit", ubt_overfit, clip=made.victim, poisoned=poisoned, split=split, recipe=OVERFIT
    )
    selection = artefact(folder/"select", ubt_select, overfitted=overfitted, poisoned=poisoned, split=split, count=6)
    found = SimpleNamespace(path=selection.path, result=dict(selection.result, poisoned=True))
    stages = [split, overfitted, selection] + [
        artefact(
            folder / name, ubt_unlearn, clip=made.victim, poisoned=poisoned, split=split, selection=found,
            recipe=UNLEARN, **options,
        )
        for name, options in (
            ("constraint", {}), ("ascent", ASCENT), ("whole captions", dict(BARE, mask="none")),
        )
    ]
    return [s.result for s in stages], {
        f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("out/*"))
    }


def test_a_defence_gets_the_same_from_plain_pairs(made, tmp_path, monkeypatch):
    """Pairs that were never poisoned by our code, with the same ids, captions and pixels, give the same bytes at every
    stage.
    """
    known = open_poisoned(made.poisoned)
    seen = known.pairs
    plain = Pairs(
        list(seen.ids), list(seen.captions), ArrayImages(seen.images.array(None, 32)), seen.image_rows.copy(),
        name="found on the web",
    )
    assert len(known.rows) == 8 and type(plain.images) is not type(seen.images) and plain.labels is None
    first = defend(tmp_path/"poisoned", made, made.poisoned)
    monkeypatch.setattr(ubt, "defender_pairs", lambda poisoned: plain)
    second = defend(tmp_path/"plain", made, Unseen())
    assert first[0] == second[0] and first[1].keys() == second[1].keys()
    assert [name for name in first[1] if first[1][name] != second[1][name]] == [] and len(first[1]) == 6
    assert [r["refused"] for r in first[0][3:]] == [False] * 3
    assert len({first[1][f"{n}/out/clip.safetensors"] for n in ("constraint", "ascent", "whole captions")}) == 3


PLANNING = ("lab", "plan")     # what a function is given that puts stages together and computes nothing
SECRET = {"rows", "flags", "attack", "target", "labels", "geometry", "seed", "record", "node"}
JUDGES = {
    "classification", "retrieval", "outcomes", "percent", "open_poisoned", "load_poisoned", "poison", "Poisoned",
    "poisoned_pairs", "attack_of", "make_attack", "attack_hits", "retrieval_attack_hits", "TriggeredImages",
    "trigger_images", "finetuned_clip", "clean_clip", "open_data", "divergence",
}


def functions():
    tree = ast.parse(Path(ubt.__file__).read_text(encoding="utf-8"))
    return [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]


def first_argument(function):
    return function.args.args[0].arg if isinstance(function, ast.FunctionDef) and function.args.args else None


def check_node(node, parent, where):
    "That one piece of a defence looks at nothing secret."
    if isinstance(node, ast.Attribute):
        assert node.attr not in SECRET, f"{where} uses .{node.attr}"
    assert not isinstance(node, (ast.Import, ast.ImportFrom)), f"{where} imports on its own"
    if not isinstance(node, ast.Name):
        return
    assert node.id not in JUDGES, f"{where} uses {node.id}"
    if node.id == "poisoned":
        called = getattr(getattr(parent, "func", None), "id", "")
        assert called == "defender_pairs", f"{where} uses poisoned for something else"


def test_the_code_of_the_defence_mentions_no_trigger_flag_or_attack_success():
    "The artefact of the poisoned set is passed on to `defender_pairs` and nowhere else. Judges are for the plan alone."
    defending = [f for f in functions() if first_argument(f) not in PLANNING]
    assert {"ubt_split", "ubt_overfit", "ubt_select", "ubt_unlearn"} <= {f.name for f in defending}
    assert len(defending) > 15
    for f in defending:
        parents = {child: node for node in ast.walk(f) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(f):
            check_node(node, parents.get(node), f.name)


# ---- the plan

def lab_that_plans(folder, **roles):
    return Lab("smoke", device="cpu", runs=folder, roles=roles, progress=False)


def test_the_plan_holds_each_node_once_and_computes_nothing(tmp_path):
    lab = lab_that_plans(tmp_path)
    plan = ubt_plan(lab, lab.profile)
    assert len(plan.nodes) == len(set(plan.nodes)) > 200 and not list(tmp_path.rglob("record.json"))
    assert {line.table for line in plan.lines} == set(UBT_TABLES) - {"ubt.table8"}     # of times only
    known = set(plan.nodes)
    chains = [c for found in plan.parts.chains.values() for c in found]
    assert {n for c in chains for n in (c.poisoned, c.victim, c.split, c.select)} <= known
    assert {n for models in plan.parts.sweep_measured.values() for n in models} <= known
    assert {n for maps in plan.parts.relevance.values() for n in maps} <= known
    assert {plan.parts.noise, *plan.parts.apart, *plan.parts.kl_public} <= known
    assert {n for chain in plan.parts.ablated for n in (chain.one_term, chain.before)} <= known


def test_a_plan_of_some_tables_and_attacks_holds_only_these(tmp_path):
    lab = lab_that_plans(tmp_path)
    plan = ubt_plan(lab, lab.profile, ["ubt.table2"], attack_names=["SIG", "Blended"])
    assert {line.labels["attack"] for line in plan.lines} == {"Blended"} and plan.parts.chains == {}
    assert plan.parts.path == plan.parts.readings == {} and plan.parts.noise is None and plan.parts.timed == []
    with pytest.raises(SettingsError, match="unknown table or figure 'ubt.table11'"):
        ubt_plan(lab, lab.profile, ["ubt.table11"])
    with pytest.raises(SettingsError, match="unknown attack 'SIGN'"):
        ubt_plan(lab, lab.profile, attack_names=["SIGN"])


# ---- when it refuses

def test_a_selection_that_does_not_look_poisoned_leaves_the_weights_as_they_are(made, tmp_path):
    "Judged by the clean model itself, the suspicious pairs are the least similar of all, so nothing can look poisoned."
    selection = artefact(
        tmp_path / "select", ubt_select, overfitted=made.clean, poisoned=made.poisoned, split=made.split, count=6
    )
    assert selection.result["poisoned"] is False and selection.result["normal_below"] <= .95
    for name, options in (("constraint", {}), ("ascent", ASCENT)):
        left = artefact(
            tmp_path / name, ubt_unlearn, clip=made.victim, poisoned=made.poisoned, split=made.split,
            selection=selection, recipe=UNLEARN, **options,
        )
        assert left.result == dict(model="smoke-RN", steps=0, refused=True)
        both = [load_clip(clip).model.state_dict() for clip in (left, made.victim)]
        assert all(torch.equal(value, both[1][key]) for key, value in both[0].items())
        assert [f.name for f in left.path.iterdir()] == ["clip.safetensors"] and load_clip(left).name == "smoke-RN"


def test_the_verdict_compares_the_median_with_the_99th_percentile():
    normal = np.arange(101.)/100
    assert [looks_poisoned(np.full(5, v), normal) for v in (.98, .99, 1.)] == [False, False, True]
    # the median, not the mean
    assert looks_poisoned(np.array([0.1, 0.1, 0.995, 0.997, 0.997]), normal)
    assert not looks_poisoned(np.array([0.1, 0.1, 0.98, 9.0, 9.0]), normal)
    assert not looks_poisoned(normal, normal)


def test_splits_and_selections_are_partitions_in_order():
    rng = np.random.default_rng(0)
    similarities = rng.normal(size=200).round(1)   # with ties
    suspicious, normal = split_suspicious(similarities, .1)
    assert sorted([*suspicious, *normal]) == list(range(200)) and len(suspicious) == 20
    assert similarities[suspicious].max() <= similarities[normal].min()
    assert (np.diff(similarities[suspicious]) >= 0).all()
    assert (np.diff(normal) > 0).all()
    after = rng.normal(size=200)
    chosen = most_similar(after, suspicious, 7)
    assert set(chosen) <= set(suspicious)
    assert (np.diff(after[chosen]) <= 0).all()
    assert after[chosen].min() >= np.delete(after[suspicious], np.flatnonzero(np.isin(suspicious, chosen))).max()
    for share in (0, 1, .001, -1):
        with pytest.raises(SettingsError, match="leaves nothing on one side"):
            split_suspicious(similarities, share)
    with pytest.raises(SettingsError, match="cannot select 21 of 20"):
        most_similar(after, suspicious, 21)


# ---- the pairs and losses of unlearning

def test_cartesian_pairs_are_every_image_with_every_caption_once():
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 8, 8), generator=rng, dtype=torch.uint8)
    tokens = torch.randint(1, 99, (3, 5), generator=rng)
    product = cartesian_pairs(images, tokens)
    assert len(product) == 12 and product.image_size == 8 and product.images is images
    assert sorted((r, *t) for r, t in zip(product.image_rows.tolist(), map(tuple, product.tokens.tolist()))) == sorted(
        (i, *t) for i in range(4) for t in map(tuple, tokens.tolist())
    )


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def gradients(loss, u, v):
    u, v = u.clone().requires_grad_(), v.clone().requires_grad_()
    value = loss(u, v)
    value.backward()
    return value.item(), u.grad, v.grad


@pytest.mark.parametrize("scale", [1., 14., 100.])
def test_contrastive_ascent_has_no_pull_away_from_a_caption_that_all_images_share(scale):
    """With one caption for all, the image-to-text half is the constant log B, and over the batch the images are not
    moved along v.
    """
    u, one = unit(16, 8), unit(1, 8, seed=1)
    v = one.expand(16, 8)
    value, at_u, at_v = gradients(lambda u, v: info_nce(u, v, scale), u, v)
    image_to_text = F.cross_entropy(scale*u@v.T, torch.arange(16))
    assert image_to_text.item() == pytest.approx(math.log(16)) and at_u.sum(0).norm() < 1e-10*scale
    p = (scale*u@one[0]).softmax(0)
    assert torch.allclose(at_u, scale/32*(16*p - 1)[:, None]*one, atol=1e-10)   # the formula of the notebook
    _, at_u, _ = gradients(lambda u, v: FORGETTING["cosine"](u, v, None, None, scale, 1.), u, v)
    assert torch.allclose(at_u.sum(0), one[0]) and torch.allclose(at_u, one.expand(16, 8)/16)


@pytest.mark.parametrize("forget, target, least", [
    ("cosine", 1., -1.), ("constraint", 1., -1.), ("constraint", 0., -.1),
])
def test_pairs_to_unlearn_grow_apart_in_a_real_model(made, forget, target, least):
    "Down to -1 at most; the constraint with target 0 ends where they are unrelated."
    model, chosen = load_clip(made.victim), arrays(made.selection, "selection")
    data = training_set(model, defender_pairs(made.poisoned))
    product = cartesian_pairs(images_of(data, chosen["selected"]), torch.from_numpy(chosen["masked"]))
    def similarity():
        return float((embed_images(model, product.images) @ embed_tokens(model, product.tokens[:6]).T).mean())
    before = similarity()
    loss = unlearning_loss(data, forget, target, retention=0.)
    train(model, product, Recipe(4, 12, 1e-3, frozen_batchnorm=True), loss=loss)
    assert least <= similarity() < before - .05


def test_the_overfitting_loss_is_both_terms_of_a_mixed_batch(made):
    model = load_clip(made.victim)
    data = training_set(model, defender_pairs(made.poisoned))
    rows, suspicious = torch.arange(10, 50), torch.zeros(120, dtype=torch.bool)
    suspicious[[3, 12, 40, 49, 100]] = True     # three of them are in the batch, at places 2, 30 and 39
    batch, inside = read_batch(data, rows, "cpu", step=3), torch.zeros(40, dtype=torch.bool)
    inside[[2, 30, 39]] = True
    with torch.no_grad():
        u, v = embed_batch(model, batch.images, batch.tokens)
        fit = (1 - (u*v).sum(-1)[inside]).square().mean()
        contrast = info_nce(u[~inside], v[~inside], model.model.logit_scale.exp())
        for weight in (0., 1., 2.5):
            assert overfitting_loss(suspicious, weight)(model, batch).item() == pytest.approx(
                (fit + weight * contrast).item(), abs=1e-5
            )
        assert overfitting_loss(~suspicious | suspicious)(model, batch).item() == pytest.approx(
            (1 - (u*v).sum(-1)).square().mean().item(), abs=1e-5)     # nothing normal in the batch
        none = overfitting_loss(torch.zeros(120, dtype=torch.bool))(model, batch)
        assert none.item() == pytest.approx(info_nce(u, v, model.model.logit_scale.exp()).item(), abs=1e-5)


def test_overfitting_ends_after_the_epoch_in_which_the_level_is_reached(made, tmp_path):
    "120 pairs in batches of 32 are three steps an epoch."
    given = dict(clip=made.victim, poisoned=made.poisoned, split=made.split, recipe=dict(OVERFIT, epochs=4))
    def steps(name, **level):
        return artefact(tmp_path / name, ubt_overfit, **given, **level).result["steps"]
    assert [steps("at once", until=-1.), steps("never", until=1.), steps("not asked")] == [3, 12, 12]


def test_overfitting_sees_every_suspicious_pair_and_so_many_normal_ones(made, tmp_path):
    suspicious = np.array([11, 3, 40])
    rows, flags = ubt.overfit_rows(suspicious, 50, 20, seed=1)
    assert sorted(rows[flags]) == [3, 11, 40] and len(rows) == 23 and (np.diff(rows) > 0).all()
    assert set(ubt.overfit_rows(suspicious, 50, 20, seed=2)[0]) != set(rows)
    assert [len(ubt.overfit_rows(suspicious, 50, n)[0]) for n in (None, 47, 4000)] == [50] * 3
    with pytest.raises(SettingsError, match="overfit_normal is 1: give 2 or more"):
        ubt.overfit_rows(suspicious, 50, 1)
    given = dict(clip=made.victim, poisoned=made.poisoned, split=made.split, recipe=dict(OVERFIT, epochs=1))
    seen = [artefact(tmp_path / str(n), ubt_overfit, normal=n, **given).result["pairs"] for n in (30, None)]
    assert seen == [18 + 30, 120]


def test_unlearning_holds_on_to_no_more_pairs_than_its_steps_see():
    ordinary = np.arange(0, 9000, 3)
    held = ubt.held_rows(ordinary, 20, 64, seed=3)
    assert len(held) == 20 * 64 and np.isin(held, ordinary).all() and (np.diff(held) > 0).all()
    assert (held == ubt.held_rows(ordinary, 20, 64, seed=3)).all()
    assert len(ubt.held_rows(ordinary, 1, 64)) == 500     # what `stop_level` looks at
    assert ubt.held_rows(ordinary[:400], 1, 64) is not None and len(ubt.held_rows(ordinary[:400], 99, 64)) == 400


def test_the_control_is_told_which_pairs_are_poison_and_unlearns_them(made, tmp_path):
    from mcl_repro.papers.ubt_measures import known_selection
    known = artefact(tmp_path / "known", known_selection, clip=made.clean, poisoned=made.poisoned, count=5)
    chosen, poison = np.load(known.path / "selection.npz")["selected"], open_poisoned(made.poisoned).rows
    assert len(chosen) == 5 and np.isin(chosen, poison).all() and known.result == dict(selected=5, poisoned=True)
    unlearned = artefact(
        tmp_path / "unlearned", ubt_unlearn, clip=made.victim, poisoned=made.poisoned, split=made.split,
        selection=known, recipe=UNLEARN, **dict(BARE, mask="none"),
    )
    assert not unlearned.result["refused"] and weights(unlearned) != weights(made.victim)


@pytest.mark.parametrize("scale", [1., 14., 100.])
def test_the_form_unrelated_ends_at_the_level_of_unrelated_captions(scale):
    """Never below zero, text side held fixed; the weight on the pull is the logistic of how far the own caption stands
    above the average of the others.
    """
    benign, v, u = unit(64, 16), unit(8, 16, seed=1), unit(8, 16, seed=2)
    value, at_u, at_v = gradients(lambda u, v: FORGETTING["unrelated"](u, v, None, benign, scale, 1.), u, v)
    above = (u*v).sum(-1) - (u@benign.T).mean(1)
    assert value == pytest.approx(F.softplus(scale*above).mean().item()) and value >= 0 and at_v is None
    assert torch.allclose(at_u, (scale*torch.sigmoid(scale*above)/8)[:, None]*(v - benign.mean(0)), atol=1e-9)
    far = F.normalize(benign.mean(0) - v, dim=-1)
    value, at_u, _ = gradients(lambda u, v: FORGETTING["unrelated"](u, v, None, benign, scale, 1.), far, v)
    if scale > 50:
        assert value < 1e-6 and at_u.norm() < 1e-4


@pytest.mark.parametrize("target", [-1., 0., .5, 1.])
def test_the_constraint_pulls_to_its_target_and_no_further(target):
    "Its gradient is 2 (cosine + target) / n along the caption, which is nothing at the target itself."
    u, v = unit(8, 16), unit(8, 16, seed=1)
    value, at_u, _ = gradients(lambda u, v: FORGETTING["constraint"](u, v, None, None, 20., target), u, v)
    cosines = (u*v).sum(-1)
    assert value == pytest.approx(((cosines + target)**2).mean().item(), rel=1e-6)
    assert torch.allclose(at_u, 2*(cosines + target)[:, None]*v/8, atol=1e-9)
    there = -target*v + math.sqrt(1 - target**2)*F.normalize(u - cosines[:, None]*v, dim=-1)
    value, at_u, _ = gradients(lambda u, v: FORGETTING["constraint"](u, v, None, None, 20., target), there, v)
    assert value < 1e-12 and at_u.norm() < 1e-6


def test_normal_pairs_are_negatives_of_the_form_that_says_so():
    "Log-softmax over product and normal pairs, in both directions, by hand."
    u, v, normal_u, normal_v = (unit(*shape, seed=i) for i, shape in enumerate([(4, 8), (4, 8), (6, 8), (6, 8)]))
    found = FORGETTING["against_normal"](u, v, normal_u, normal_v, 5., 1.).item()
    def rows(a, b, c):
        scores = 5*torch.cat([a@b.T, a@c.T], 1)
        return (scores.logsumexp(1) - scores[range(4), range(4)]).mean().item()
    assert found == pytest.approx(-(rows(u, v, normal_v) + rows(v, u, normal_u))/2, rel=1e-6)
    # with one caption for all there is a pull away from it, which the form without normal pairs does not have
    one = unit(1, 8, seed=9).expand(4, 8)
    at_u = gradients(lambda u, v: FORGETTING["against_normal"](u, v, normal_u, normal_v, 5., 1.), u, one)[1]
    assert at_u.sum(0) @ one[0] > .1


def test_other_forms_have_their_known_bounds():
    """The cosine lies in [-1, 1]; ascent on InfoNCE goes as low as -2 s - log B, which is why neither is left without
    an end.
    """
    u = unit(8, 16)
    assert FORGETTING["cosine"](u, -u, None, None, 100.0, 1.).item() == pytest.approx(-1)
    assert FORGETTING["cosine"](u, u, None, None, 100.0, 1.).item() == pytest.approx(1)
    worst = FORGETTING["info_nce"](u, torch.roll(u, 1, 0), None, None, 100., 1.).item()
    assert -(200 + math.log(8)) <= worst < -20


def test_retention_adds_the_contrastive_loss_of_ordinary_pairs(made):
    model = load_clip(made.victim)
    data = training_set(model, defender_pairs(made.poisoned))
    product = cartesian_pairs(data.images[:3], data.tokens[:3])
    batch = read_batch(product, torch.arange(9), "cpu", step=2)
    rows = step_rows(len(data), 16, 7, 2)
    with torch.no_grad():
        value = lambda **k: unlearning_loss(data, batch_size=16, seed=7, **k)(model, batch).item()
        other = read_batch(data, rows, "cpu")
        u, v = embed_batch(model, other.images, other.tokens)
        keep = info_nce(u, v, model.model.logit_scale.exp()).item()
        for forget in FORGETTING:
            assert value(forget=forget, retention=0.5) - value(forget=forget, retention=1e-9) == pytest.approx(
                0.5 * keep, abs=1e-3
            )
            thrice, once = (value(forget=forget, forget_weight=w, retention=0.) for w in (3., 1.))
            assert thrice == pytest.approx(3*once, rel=1e-4)
    with pytest.raises(
        SettingsError,
        match="unknown way to forget 'erase': use one of constraint, cosine, info_nce, against_normal, unrelated",
    ):
        unlearning_loss(data, "erase")


# ---- what is masked, and how much is used

def test_masks_choose_between_whole_and_masked_captions_and_images(made):
    chosen = arrays(made.selection, "selection")
    images = torch.zeros(6, 3, 32, 32, dtype=torch.uint8)
    for mask in MASKS:
        found, tokens = masked_pairs(made.selection, images, mask, None)
        assert torch.equal(tokens, torch.from_numpy(chosen["masked" if mask in ("text", "both") else "tokens"]))
        assert bool(found.any()) == (mask in ("image", "both"))
        assert found.shape == images.shape
        assert found.dtype == torch.uint8
    assert (chosen["tokens"] != chosen["masked"]).any() and chosen["masked_images"].shape == (6, 32, 32, 3)
    found, tokens = masked_pairs(made.selection, images, "text", 2)
    assert len(found) == len(tokens) == 2
    with pytest.raises(SettingsError, match="unknown mask 'words': use one of text, image, both, none"):
        masked_pairs(made.selection, images, "words", None)
    for count in (0, 7):
        with pytest.raises(SettingsError, match=f"cannot unlearn {count} of 6 selected pairs"):
            masked_pairs(made.selection, images, "text", count)


def test_fewer_pairs_get_as_many_steps(made, tmp_path):
    found = SimpleNamespace(path=made.selection.path, result=dict(made.selection.result, poisoned=True))
    steps = [
        artefact(
            tmp_path / str(k), ubt_unlearn, clip=made.victim, poisoned=made.poisoned, split=made.split, selection=found,
            recipe=UNLEARN, stop="none", count=k,
        ).result["steps"]
        for k in (None, 1, 3)
    ]
    assert steps == [6, 6, 6]


def test_relevance_of_images_needs_a_tower_it_knows(made):
    "A ResNet is asked for maps, a ViT for patches; a layer that is not there is named."
    model = load_clip(made.victim)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    texts = embed_tokens(model, torch.from_numpy(arrays(made.selection, "selection")["tokens"][:2]))
    assert image_relevance(model, images, texts, "layer2").shape == (2, 4, 4)
    assert image_relevance(model, images, texts, "layer1").shape == (2, 8, 8)
    with pytest.raises(SettingsError, match="no 'layer7'"):
        image_relevance(model, images, texts, "layer7")


# ---- killed

def killed(runs, after):
    "Unlearn in a process that kills itself in the middle of the second epoch."
    count, step = [0], _step
    def deadly(*args):
        count[0] += 1
        if count[0] > int(after):
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*args)
    training._step = deadly
    lab = open_lab(runs)
    lab.run(graph(lab).unlearn)


def test_unlearning_that_was_killed_goes_on_to_the_same_weights(made, tmp_path, monkeypatch):
    """3 epochs of 2 steps, killed at the fourth step: the first epoch is kept, and the rest is done again to the same
    bytes.
    """
    whole, broken = (open_lab(shutil.copytree(made.lab.runs, tmp_path/name)) for name in ("whole", "broken"))
    undisturbed = whole.run(graph(whole).unlearn)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    dead = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import torch; torch.set_num_threads(1); import test_ubt; test_ubt.killed({str(broken.runs)!r}, 3)",
        ],
        env=env,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    key = graph(broken).unlearn.key
    assert (broken.store.scratch(key) / "checkpoint.safetensors").exists()
    assert not broken.store.read("ubt.ubt_unlearn", key)
    epochs, one = [], _train_epoch
    monkeypatch.setattr(training, "_train_epoch", lambda state, *a: (epochs.append(state.epoch), one(state, *a))[1])
    resumed = broken.run(graph(broken).unlearn)
    assert epochs == [1, 2] and undisturbed.result["steps"] == 6
    assert resumed.key == undisturbed.key
    assert weights(resumed) == weights(undisturbed) != weights(made.victim)
    assert resumed.result == undisturbed.result
    assert not broken.store.scratch(key).exists()
