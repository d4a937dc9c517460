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
from mcl_repro.model.training import _step, _train_epoch, embed_batch, read_batch, Recipe, rows_of, step_rows
from mcl_repro.papers.stages import defender_pairs
from mcl_repro.papers.ubt import images_of, masked_pairs, MASKS, ubt_plan, UBT_TABLES

HERE = Path(__file__).parent
ATTACK = dict(name="badnets", pattern="checker", placement="corner", patch_share=0.25)
OVERFIT = dict(epochs=2, batch_size=32, learning_rate=1e-3)
UNLEARN = dict(epochs=3, batch_size=16, learning_rate=1e-3, frozen_batchnorm=True)   # 6 x 6 pairs: two steps an epoch
RETENTION = dict(forget="preference", forget_weight=4., retention=1., stop="none")


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
        ubt_unlearn, clip=victim, poisoned=poisoned, split=split, selection=selection, recipe=UNLEARN, **RETENTION
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
            ("printed", {}), ("retention", RETENTION), ("whole captions", dict(RETENTION, mask="none")),
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
    assert len({first[1][f"{n}/out/clip.safetensors"] for n in ("printed", "retention", "whole captions")}) == 3


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
    assert plan.parts.ascent == {} and plan.parts.noise is None and plan.parts.timed == []
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
    for name, options in (("printed", {}), ("retention", RETENTION)):
        left = artefact(
            tmp_path / name, ubt_unlearn, clip=made.victim, poisoned=made.poisoned, split=made.split,
            selection=selection, recipe=UNLEARN, **options,
        )
        assert left.result == dict(model="smoke-RN", steps=0, refused=True)
        both = [load_clip(clip).model.state_dict() for clip in (left, made.victim)]
        assert all(torch.equal(value, both[1][key]) for key, value in both[0].items())
        assert [f.name for f in left.path.iterdir()] == ["clip.safetensors"] and load_clip(left).name == "smoke-RN"


def test_the_verdict_compares_the_median_with_the_95th_percentile():
    normal = np.arange(101.)/100
    assert [looks_poisoned(np.full(5, v), normal) for v in (.94, .95, .96)] == [False, False, True]
    # the median, not the mean
    assert looks_poisoned(np.array([0.1, 0.1, 0.96, 0.97, 0.97]), normal)
    assert not looks_poisoned(np.array([0.1, 0.1, 0.9, 9.0, 9.0]), normal)
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
    _, at_u, _ = gradients(lambda u, v: FORGETTING["cosine"](u, v, None, None, scale), u, v)
    assert torch.allclose(at_u.sum(0), one[0]) and torch.allclose(at_u, one.expand(16, 8)/16)


def test_the_cosine_form_lowers_the_similarity_of_a_real_model(made):
    model, chosen = load_clip(made.victim), arrays(made.selection, "selection")
    data = training_set(model, defender_pairs(made.poisoned))
    product = cartesian_pairs(images_of(data, chosen["selected"]), torch.from_numpy(chosen["masked"]))
    def similarity():
        return float((embed_images(model, product.images) @ embed_tokens(model, product.tokens[:6]).T).mean())
    before = similarity()
    train(model, product, Recipe(1, 12, 1e-3, frozen_batchnorm=True), loss=unlearning_loss(data))
    assert similarity() < before - .05


def test_the_overfitting_loss_is_both_terms(made):
    model = load_clip(made.victim)
    data = training_set(model, defender_pairs(made.poisoned))
    rows = torch.arange(40)
    batch, suspicious = read_batch(data, rows, "cpu", step=3), rows_of(data, range(100, 120))
    with torch.no_grad():
        u, v = embed_batch(model, batch.images, batch.tokens)
        other = read_batch(suspicious, step_rows(20, 8, 5, 3), "cpu")
        a, b = embed_batch(model, other.images, other.tokens)
        fit, contrast = -(a*b).sum(-1).mean(), info_nce(u, v, model.model.logit_scale.exp())
        for weight in (0., 1., 2.5):
            assert overfitting_loss(suspicious, weight, 8, seed=5)(model, batch).item() == pytest.approx(
                (fit + weight * contrast).item(), abs=1e-4
            )


@pytest.mark.parametrize("scale", [1., 14., 100.])
@pytest.mark.parametrize("seed", range(3))
def test_the_bounded_form_is_bounded_and_lets_go(scale, seed):
    """Never below zero, finite everywhere, monotone in the own similarity, and without gradient once the own caption is
    not preferred.
    """
    benign, v = unit(64, 16, seed=seed), unit(8, 16, seed=seed + 10)
    preference = lambda u, v: FORGETTING["preference"](u, v, None, benign, scale)
    values = []
    for share in (-1., -.5, 0., .5, 1.):
        u = F.normalize(share*v + (1 - abs(share))*unit(8, 16, seed=seed + 20), dim=-1)
        value, at_u, at_v = gradients(preference, u, v)
        values.append(value)
        # the text side is held fixed
        assert value >= 0 and math.isfinite(value) and torch.isfinite(at_u).all() and at_v is None
    assert values == sorted(values)
    p = (
        torch.cat([(unit(8, 16, seed=seed + 20) * v).sum(-1, keepdim=True), unit(8, 16, seed=seed + 20) @ benign.T], 1)
        .mul(scale)
        .softmax(1)[:, 0]
    )
    assert values[2] == pytest.approx(-(1 - p).log().mean().item(), rel=1e-4)   # as printed in the notebook
    value, at_u, at_v = gradients(preference, benign[:8], -benign[:8])          # the caption's opposite is liked best
    if scale > 10:
        assert value < 1e-6 and at_u.norm() < 1e-4


@pytest.mark.parametrize("scale", [1., 14., 100.])
def test_the_form_unrelated_ends_at_the_level_of_unrelated_captions(scale):
    """Never below zero, text side held fixed; the weight on the pull is the logistic of how far the own caption stands
    above the average of the others.
    """
    benign, v, u = unit(64, 16), unit(8, 16, seed=1), unit(8, 16, seed=2)
    value, at_u, at_v = gradients(lambda u, v: FORGETTING["unrelated"](u, v, None, benign, scale), u, v)
    above = (u*v).sum(-1) - (u@benign.T).mean(1)
    assert value == pytest.approx(F.softplus(scale*above).mean().item()) and value >= 0 and at_v is None
    assert torch.allclose(at_u, (scale*torch.sigmoid(scale*above)/8)[:, None]*(v - benign.mean(0)), atol=1e-9)
    far = F.normalize(benign.mean(0) - v, dim=-1)
    value, at_u, _ = gradients(lambda u, v: FORGETTING["unrelated"](u, v, None, benign, scale), far, v)
    if scale > 50:
        assert value < 1e-6 and at_u.norm() < 1e-4


@pytest.mark.parametrize("scale", [50., 100.])
def test_the_bounded_form_pulls_hardest_where_the_backdoor_is_strongest(scale):
    "At a temperature as CLIP's, a backdoored pair is preferred by far; there the loss must be steep and not flat."
    benign, v = unit(64, 32), unit(8, 32, seed=1)
    u = F.normalize(.9*v + .1*unit(8, 32, seed=2), dim=-1)
    value, at_u, _ = gradients(lambda u, v: FORGETTING["preference"](u, v, None, benign, scale), u, v)
    own = scale*(u*v).sum(-1)
    exact = F.softplus(own - (scale*u@benign.T).logsumexp(1)).mean().item()
    assert at_u.norm() > 1 and value == pytest.approx(exact, rel=1e-6)


def test_other_forms_have_their_known_bounds():
    """The cosine lies in [-1, 1]; ascent on InfoNCE goes as low as -2 s - log B, which is why neither is left without
    an end.
    """
    u = unit(8, 16)
    assert FORGETTING["cosine"](u, -u, None, None, 100.0).item() == pytest.approx(-1)
    assert FORGETTING["cosine"](u, u, None, None, 100.0).item() == pytest.approx(1)
    worst = FORGETTING["info_nce"](u, torch.roll(u, 1, 0), None, None, 100.).item()
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
            assert value(forget=forget, forget_weight=3.) == pytest.approx(3*value(forget=forget), rel=1e-4)
    with pytest.raises(
        SettingsError, match="unknown way to forget 'erase': use one of cosine, info_nce, preference, unrelated"
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
