"""ABL and RoCLIP: what is isolated, what is matched, against plain formulas; who learns when; and that a pool survives
being killed.
"""
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mcl_repro.papers import baselines
from mcl_repro.papers.baselines import (
    abl, ascent_loss, attach_pool, BASELINES_OUTPUTS, baselines_plan, constraint_loss, detach_pool, isolate, matches,
    nearest_captions, noise_losses, push_captions, roclip, roclip_loss, UNLEARNING,
)
from mcl_repro.model.clip import build_clip, embed_images, embed_tokens, read_tensors, save_clip
from mcl_repro.data.registry import open_data, resolve
from mcl_repro.core.errors import SettingsError, TrainingError
from mcl_repro.lab.lab import Lab
from mcl_repro.lab.status import with_inputs
from mcl_repro.papers.cfbd_study import cfbd_plan
from mcl_repro.papers.stages import arrays, load_clip
from mcl_repro.papers.ubt import ubt_plan
from mcl_repro.model.training import read_batch, rows_of, step_rows, training_set
from mcl_repro.model import training
from mcl_repro.model.training import _step, _train_epoch

ABL = dict(epochs=2, batch_size=16, learning_rate=1e-3, seed=3)
ROCLIP = dict(epochs=4, batch_size=16, learning_rate=1e-3, warmup_steps=2, seed=3)   # 60 pairs: three steps an epoch


@pytest.fixture(scope="module")
def pairs():
    return open_data("world:train:60")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    "An artefact with an untrained CLIP whose image and text side agree a little, by the luck of its seed."
    folder = tmp_path_factory.mktemp("clip")
    save_clip(build_clip("smoke-RN", seed=1), folder/"clip.safetensors")
    return SimpleNamespace(path=folder, result=dict(model="smoke-RN"))


@pytest.fixture
def artefact(monkeypatch, pairs, clip):
    "Runs a stage on the pairs, without a lab; the same folder again is the same stage going on."
    monkeypatch.setattr(baselines, "defender_pairs", lambda poisoned: pairs)
    def run(folder, f, **settings):
        for name in ("out", "scratch"):
            (folder/name).mkdir(parents=True, exist_ok=True)
        work = SimpleNamespace(out=folder/"out", scratch=folder/"scratch", device="cpu", progress=lambda *a: None)
        return SimpleNamespace(path=folder/"out", result=f(work, clip=clip, poisoned=None, **settings))
    return run


def files(artefact):
    return {f.name: f.read_bytes() for f in Path(artefact.path).iterdir()}


def toy(pairs):
    clip = build_clip("smoke-RN", seed=1)
    return clip, training_set(clip, pairs)


def naive_info_nce(u, v, scale):
    "Pair by pair and with plain sums."
    total = 0.
    for i in range(len(u)):
        own = (scale*u[i]@v[i]).exp()
        total -= (own / sum((scale * u[i] @ v[j]).exp() for j in range(len(u)))).log() + (
            own / sum((scale * u[j] @ v[i]).exp() for j in range(len(u)))
        ).log()
    return (total/(2*len(u))).item()


# ---- ABL

def test_the_most_similar_pairs_are_isolated_and_no_pair_is_lost():
    rng = np.random.default_rng(0)
    similarities = rng.normal(size=500).round(1)   # with ties
    isolated, rest = isolate(similarities, .05)
    assert sorted([*isolated, *rest]) == list(range(500)) and len(isolated) == 25 and (np.diff(rest) > 0).all()
    assert similarities[isolated].min() >= similarities[rest].max() and (np.diff(similarities[isolated]) <= 0).all()


@pytest.mark.parametrize("share", [0, 1, -1, .001, .9999, 2])
def test_a_share_that_leaves_one_side_empty_is_refused(share):
    with pytest.raises(
        SettingsError, match=f"share of {share:g} of 200 pairs leaves nothing on one side: choose another share"
    ):
        isolate(np.zeros(200), share)


def embedded(clip, data):
    with torch.no_grad():
        return embed_images(clip, data.images).double(), embed_tokens(clip, data.tokens).double()


@pytest.mark.parametrize("weight, target", [(1., 1.), (2., 0.), (1., -1.)])
def test_the_constraint_is_the_plain_formula(pairs, weight, target):
    "Flagged pairs leave the contrastive loss; `flags` go by rows of the training set, not by places in the batch."
    clip, data = toy(pairs)
    rows, flags = torch.arange(20, 35), torch.zeros(60, dtype=torch.bool)
    flags[[3, 21, 22, 30, 50]] = True
    loss = constraint_loss(flags, weight, target)
    with torch.no_grad():
        value = loss(clip, read_batch(data, rows, "cpu")).item()
        none_flagged = loss(clip, read_batch(data, torch.arange(4, 20), "cpu")).item()
    u, v = embedded(clip, data)
    scale = clip.model.logit_scale.exp().double().detach()
    others = [r for r in rows.tolist() if r not in (21, 22, 30)]
    constraint = sum((float(u[r] @ v[r]) + target)**2 for r in (21, 22, 30)) / 3
    assert value == pytest.approx(naive_info_nce(u[others], v[others], scale) + weight * constraint, abs=1e-4)
    assert none_flagged == pytest.approx(naive_info_nce(u[4:20], v[4:20], scale), abs=1e-4)


@pytest.mark.parametrize("weight", [1., .3])
def test_the_ascent_is_the_plain_formula(pairs, weight):
    clip, data = toy(pairs)
    batch, few = read_batch(data, torch.arange(12), "cpu", step=5), rows_of(data, range(30, 50))
    rows = step_rows(20, 8, 4, 5) + 30
    with torch.no_grad():
        value = ascent_loss(few, weight, batch_size=8, seed=4)(clip, batch).item()
    u, v = embedded(clip, data)
    scale = clip.model.logit_scale.exp().double().detach()
    ascent = -naive_info_nce(u[rows], v[rows], scale)
    assert value == pytest.approx(naive_info_nce(u[:12], v[:12], scale) + weight * ascent, abs=1e-4)


def test_unlearning_lowers_what_is_isolated_and_the_public_default_raises_it(pairs, artefact, tmp_path):
    "By how much isolated pairs are more similar than the others, before and after."
    def gap(name, **options):
        done = artefact(tmp_path/name, abl, recipe=ABL, share=.2, isolated_batch=8, **options)
        model = load_clip(SimpleNamespace(path=done.path, result=done.result))
        rows = arrays(done, "isolation")
        now = (embed_images(model, pairs.images)*embed_tokens(model, training_set(model, pairs).tokens)).sum(1).numpy()
        return now[rows["isolated"]].mean() - now[rows["rest"]].mean(), rows
    asked = dict(constraint={}, unrelated=dict(unlearn_target=0.), ascent=dict(unlearning="ascent"),
                 public=dict(unlearn_target=-1.))
    gaps = {name: gap(name, **options) for name, options in asked.items()}
    before = gaps["constraint"][1]
    start = before["similarities"][before["isolated"]].mean() - before["similarities"][before["rest"]].mean()
    assert gaps["ascent"][0] < start and gaps["constraint"][0] < gaps["unrelated"][0] < start
    assert gaps["constraint"][0] < gaps["public"][0]
    assert {len(found["isolated"]) for _, found in gaps.values()} == {12}
    assert before["isolated"].tolist() == np.argsort(-before["similarities"], kind="stable")[:12].tolist()


def test_the_constraint_trains_on_all_pairs_and_the_ascent_on_the_rest(artefact, tmp_path):
    by = {name: artefact(tmp_path/name, abl, recipe=ABL, share=.2, unlearning=name).result for name in UNLEARNING}
    assert (by["constraint"]["pairs"], by["constraint"]["steps"]) == (60, 2 * (60 // 16))
    assert (by["ascent"]["pairs"], by["ascent"]["steps"]) == (48, 2 * (48 // 16))


def test_the_text_mask_changes_captions_of_isolated_pairs_only(artefact, tmp_path, monkeypatch):
    seen, train = [], baselines.train
    def watched(clip, data, *args, **kwargs):
        seen.append(data)
        return train(clip, data, *args, **kwargs)
    monkeypatch.setattr(baselines, "train", watched)
    plain, masked = (
        artefact(tmp_path / str(mask), abl, recipe=ABL, share=0.2, text_mask=mask, start_layer=0)
        for mask in (False, True)
    )
    trained = [data.tokens.numpy() for data in seen]
    a, b = arrays(plain, "isolation"), arrays(masked, "isolation")
    assert (a["isolated"] == b["isolated"]).all() and (a["similarities"] == b["similarities"]).all()
    kept = [set(m[m > 0]) <= set(t) and (m > 0).sum() < (t > 0).sum() for t, m in zip(a["tokens"], b["tokens"])]
    assert np.mean(kept) > 0.9
    assert all(set(m[m > 0]) <= set(t) for t, m in zip(a["tokens"], b["tokens"]))
    for tokens, found in zip(trained, (a, b)):
        assert (tokens[found["isolated"]] == found["tokens"]).all()
    assert (trained[0][a["rest"]] == trained[1][a["rest"]]).all()
    assert files(plain)["clip.safetensors"] != files(masked)["clip.safetensors"]


def test_ascent_that_runs_away_is_stopped_with_a_line(artefact, tmp_path):
    with pytest.raises(TrainingError, match="is not a number at step"):
        artefact(tmp_path/"a", abl, recipe=dict(ABL, learning_rate=1e30), share=.2, unlearning="ascent")
    assert not (tmp_path/"a"/"out"/"clip.safetensors").exists()


def test_an_unknown_unlearning_is_refused_before_any_work(artefact, tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "load_clip", lambda *a: pytest.fail("worked"))
    with pytest.raises(SettingsError, match="unknown unlearning 'erase': use one of constraint, ascent"):
        artefact(tmp_path/"a", abl, recipe=ABL, share=.2, unlearning="erase")


# ---- RoCLIP

def test_matching_is_the_nearest_entry(pairs):
    clip, data = toy(pairs)
    attach_pool(clip, data, 7, seed=2)
    pool = clip.model.caption_pool
    assert torch.allclose(pool.norm(dim=1), torch.ones(7))
    u = F.normalize(torch.randn(20, pool.shape[1], generator=torch.Generator().manual_seed(0)), dim=1)
    assert torch.equal(nearest_captions(clip, u), torch.stack([max(pool, key=lambda p: float(p @ x)) for x in u]))
    detach_pool(clip)
    assert set(clip.model.state_dict()) == set(build_clip("smoke-RN").model.state_dict())


def test_the_pool_is_a_queue_that_drops_what_does_not_fit_before_its_end(pairs):
    "Entry by entry: a batch goes on where the last one ended, and at the end of the pool the rest of it is lost."
    clip, data = toy(pairs)
    attach_pool(clip, data, 7, seed=2)
    expected, place = list(clip.model.caption_pool.clone()), 0
    rng = torch.Generator().manual_seed(0)
    for count in (3, 3, 5, 7, 20, 2, 4, 1, 1):
        v = F.normalize(torch.randn(count, len(expected[0]), generator=rng), dim=1)
        push_captions(clip, v)
        for embedding in v:
            expected[place], place = embedding, place + 1
            if place == 7:
                place = 0
                break
        assert torch.equal(clip.model.caption_pool, torch.stack(expected))
        assert int(clip.model.caption_pool_next) == place


def test_a_pool_of_captions_starts_with_captions(pairs):
    clip, data = toy(pairs)
    attach_pool(clip, data, 10, "captions", seed=2)
    every = embed_tokens(clip, data.tokens)
    nearest = (clip.model.caption_pool@every.T).max(1)
    assert torch.allclose(nearest.values, torch.ones(10), atol=1e-5)
    first = clip.model.caption_pool.clone()
    detach_pool(clip)
    attach_pool(clip, data, 10, "captions", seed=3)
    assert not torch.equal(first, clip.model.caption_pool)


@pytest.mark.parametrize("every, expected", [(1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (3, [3, 6]), (4, [4])])
def test_which_epochs_match(every, expected):
    assert [e for e in range(1, 7) if all(matches((e - 1)*5 + i, 5, every) for i in range(5))] == expected
    assert [e for e in range(1, 7) if any(matches((e - 1)*5 + i, 5, every) for i in range(5))] == expected


def test_the_loss_of_roclip_is_the_plain_formula(pairs, monkeypatch):
    clip, data = toy(pairs)
    attach_pool(clip, data, 9)
    batch = read_batch(data, torch.arange(12), "cpu", step=5)
    monkeypatch.setattr(baselines, "augment_images", lambda images, policy, seed: images.flip(-1))
    loss = roclip_loss(3)
    with torch.no_grad():
        u = embed_images(clip, data.images[:12].flip(-1)).double()
        v = embed_tokens(clip, data.tokens[:12]).double()
        scale = clip.model.logit_scale.exp().double()
        pool = clip.model.caption_pool.double()
        nearest = torch.stack([max(pool, key=lambda p: float(p@x)) for x in u])
        # step 5 is in the second epoch of three steps
        assert loss(clip, batch).item() == pytest.approx(naive_info_nce(u, nearest, scale), abs=1e-4)
        assert torch.allclose(clip.model.caption_pool.double(), v[:9], atol=1e-5)   # of twelve captions, the first nine
        batch.step = 2
        assert loss(clip, batch).item() == pytest.approx(naive_info_nce(u, v, scale), abs=1e-4)


def test_the_text_tower_stands_still_in_matching_epochs_only(artefact, pairs, clip, tmp_path, monkeypatch):
    "Weights of both towers after every epoch; with the public code's zero gradients the text tower coasts on."
    def moved(name, **options):
        seen, one = [read_tensors(clip.path/"clip.safetensors")], _train_epoch
        def epoch(state, *args):
            one(state, *args)
            seen.append({k: v.clone() for k, v in state.clip.model.state_dict().items()})
        with monkeypatch.context() as m:
            m.setattr(training, "_train_epoch", epoch)
            artefact(tmp_path/name, roclip, recipe=ROCLIP, pool_size=20, **options)
        same = lambda part: [
            all(torch.equal(a[k], b[k]) for k in seen[0] if k.startswith(part)) for a, b in zip(seen, seen[1:])
        ]
        return same("transformer."), same("visual.")
    assert moved("held") == ([False, True, False, True], [False]*4)
    assert moved("third", every=3) == ([False, False, True, False], [False]*4)
    assert moved("coasting", zero_gradient=True) == ([False]*4, [False]*4)


class Killed(Exception):
    pass


@pytest.mark.parametrize("step", [4, 7, 10])   # in the second, third and fourth epoch of three steps
def test_a_killed_training_finds_its_pool_again(artefact, tmp_path, monkeypatch, step):
    # not a multiple of the batch: a batch stands in the middle, the next one is cut at the end
    settings = dict(recipe=ROCLIP, pool_size=25, every=2)
    whole = artefact(tmp_path/"whole", roclip, **settings)
    count, one = [0], _step
    def deadly(*args):
        count[0] += 1
        if count[0] > step:
            raise Killed
        return one(*args)
    monkeypatch.setattr(training, "_step", deadly)
    with pytest.raises(Killed):
        artefact(tmp_path/"broken", roclip, **settings)
    stored = read_tensors(tmp_path/"broken"/"scratch"/"checkpoint.safetensors")
    assert stored["model.caption_pool"].shape[0] == 25
    assert int(stored["model.caption_pool_next"]) == (0 if step < 6 else 16)
    monkeypatch.setattr(training, "_step", one)
    epochs, epoch = [], _train_epoch
    monkeypatch.setattr(training, "_train_epoch", lambda state, *a: (epochs.append(state.epoch), epoch(state, *a))[1])
    resumed = artefact(tmp_path/"broken", roclip, **settings)
    assert files(resumed) == files(whole) and epochs == list(range(step//3, 4))
    assert {k: v for k, v in resumed.result.items()} == whole.result
    assert set(read_tensors(resumed.path / "clip.safetensors")) == set(build_clip("smoke-RN").model.state_dict())


def test_the_pool_matters(artefact, tmp_path):
    "Another size, start or rhythm is another model: the settings reach the training."
    options = dict(
        plain={}, size=dict(pool_size=10), start=dict(pool_start="captions"), every=dict(every=4),
        captions=dict(augment_text=False), images=dict(image_policy=None),
    )
    made = {
        name: files(artefact(tmp_path / name, roclip, **{**dict(recipe=ROCLIP, pool_size=20), **o}))["clip.safetensors"]
        for name, o in options.items()
    }
    assert len(set(made.values())) == len(options)


@pytest.mark.parametrize("options, message", [
    (dict(pool_size=0), "pool of 0 captions cannot be drawn from 60 pairs: choose pool_size from 1 to 60"),
    (dict(pool_size=61), "pool of 61 captions"),
    (dict(every=5), "matching every 5 epochs never happens in 4: choose every from 1 to 4"),
    (dict(every=0), "matching every 0 epochs"),
    (dict(pool_start="empty"), "unknown start 'empty'"),
    (dict(synonyms="auto"), "synonyms auto means another thing on every machine: pass synonyms=synonym_source"),
    (dict(synonyms="roget"), "unknown source of synonyms 'roget': use auto, wordnet or builtin"),
])
def test_bad_settings_of_roclip_are_refused_before_training(artefact, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(training, "_step", lambda *a: pytest.fail("trained"))
    with pytest.raises(SettingsError, match=message):
        artefact(tmp_path/"a", roclip, **{**dict(recipe=ROCLIP, pool_size=20), **options})


# ---- the plan

@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab("smoke", device="cpu", runs=tmp_path_factory.mktemp("plan")/"runs", progress=False,
               module="mcl_repro.papers.baselines")


def test_the_plan_computes_nothing_and_holds_all_that_is_shown(lab, monkeypatch):
    monkeypatch.setattr(lab, "run", lambda *a: pytest.fail("it computed"))
    plan = baselines_plan(lab, lab.profile)
    parts = plan.parts
    assert list(parts.defences) == [
        "ABL", "ABL + Text Mask", "ABL, public default", "ABL, InfoNCE ascent", "RoCLIP", "RoCLIP, as in CFBD"
    ]
    assert list(parts.models) == list(parts.measured) == ["clean CLIP", "No defense", *parts.defences]
    shown = [parts.chain.poisoned, parts.early, parts.noise, *parts.measured.values()]
    assert set(shown) < set(plan.nodes) and {parts.defences["ABL"], parts.defences["RoCLIP"]} < set(plan.nodes)
    assert set(plan.nodes) <= {*shown, *parts.models.values()} and list(plan.readers) == list(BASELINES_OUTPUTS)
    assert {node.settings["test"] for node in parts.measured.values()} == {lab.role("zeroshot_validation")}


@pytest.mark.parametrize("output, spared", [
    ("baselines.abl_isolation", "baselines.roclip stages.classification baselines.noise_losses"),
    ("baselines.roclip_training", "baselines.abl stages.classification baselines.noise_losses"),
    ("baselines.protective_noise", "stages.poisoned_pairs stages.finetuned_clip"),
    ("baselines.defences", "baselines.abl_isolation baselines.noise_losses"),
])
def test_one_table_or_figure_needs_no_more_than_it_reads(lab, output, spared):
    plan = baselines_plan(lab, lab.profile, figures=[output])
    assert list(plan.readers) == [output]
    assert not {node.stage.name for node in with_inputs(plan.nodes)} & set(spared.split())


def test_the_losses_under_noise_are_those_of_one_step_at_a_time(tmp_path, clip):
    pairs, settings = "world:validation:12", {"EM": {}, "UAP": dict(direction="maximise")}
    searches = {name: dict(more, noise_steps=1, length=0, shuffle="none") for name, more in settings.items()}
    work = SimpleNamespace(out=tmp_path, device="cpu")
    losses = noise_losses(work, clip=clip, pairs=resolve(pairs), searches=searches, steps=3)["losses"]
    model = load_clip(clip)
    data = training_set(model, open_data(pairs))
    plain = naive_info_nce(embed_images(model, data.images), embed_tokens(model, data.tokens),
                           model.model.logit_scale.exp().detach())
    assert losses["EM"][0] == losses["UAP"][0] == pytest.approx(plain, abs=1e-4)
    assert losses["EM"][2] < losses["EM"][1] < plain < losses["UAP"][1] < losses["UAP"][2]


def test_variants_differ_in_what_their_names_say(lab):
    made = baselines_plan(lab, lab.profile).parts.defences
    def differing(name, plain="ABL"):
        usual = made[plain].settings
        return {k for k, v in made[name].settings.items() if v != usual.get(k)}
    assert differing("ABL, public default") == {"unlearn_target"} and differing("ABL, InfoNCE ascent") == {"unlearning"}
    assert "text_mask" in differing("ABL + Text Mask") <= {"text_mask", "start_layer"}
    assert made["ABL, public default"].settings["unlearn_target"] == -1
    assert made["RoCLIP"].stage.name == "baselines.roclip" and "share" not in made["RoCLIP"].settings


@pytest.mark.parametrize("profile", ["smoke", "mini"])
def test_what_papers_share_is_one_node(tmp_path, profile):
    "The baselines here are those of UBT's notebook. CFBD trains on a set of its own, with the same clean model."
    def plan_of(paper, make):
        lab = Lab(profile, device="cpu", runs=tmp_path/"runs", progress=False, module=f"mcl_repro.papers.{paper}")
        return make(lab, lab.profile)
    here = plan_of("baselines", baselines_plan).parts
    ubt, cfbd = plan_of("ubt", ubt_plan), plan_of("cfbd", cfbd_plan)
    chains = ubt.chain("BadNet", 0), cfbd.chain("BadNets", 0)
    assert chains[0].victim.key == here.chain.victim.key
    assert ubt.clean.key == cfbd.clean.key or profile == "smoke"     # smoke's CFBD has version 1 of the world
    assert chains[0].victim.key != chains[1].victim.key
    for name in ("ABL", "RoCLIP"):
        assert ubt.defences[name](chains[0]).key == here.defences[name].key
    recipes = [here.defences[name].settings["recipe"] for name in ("RoCLIP", "RoCLIP, as in CFBD")]
    assert recipes[0] != recipes[1]


def test_another_attack_is_another_chain_and_an_unknown_one_is_refused(lab):
    chains = [baselines_plan(lab, lab.profile, attack_name=name).parts.chain for name in ("BadNet", "Blended")]
    assert chains[0].poisoned.key != chains[1].poisoned.key
    with pytest.raises(SettingsError, match="unknown attack 'Dots' in attack_name; profile smoke has BadNet, Blended"):
        baselines_plan(lab, lab.profile, attack_name="Dots")
