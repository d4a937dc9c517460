"""Conformance of the defences: whatever defends is run on a poisoned set that gives away nothing but its pairs, where
nobody can measure attack success.

A stage that reads rows, flags, triggers, targets or stored files of the poisoned set, looks behind its images, or asks
for an attack success rate fails. New stages of the modules named in DEFENDERS must be entered in `steps`."""
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from defenders import FORBIDDEN, Peeked, public_images
from mcl_repro.measures import metrics
from mcl_repro.papers import baselines, cfbd, cleanclip, stages, ubt
from mcl_repro.papers.cleanclip_study import poisoning_checkpoint
from mcl_repro.model.clip import build_clip, Clip
from mcl_repro.core.errors import SettingsError
from mcl_repro.lab.lab import Lab
from mcl_repro.lab.profiles import load_profile
from mcl_repro.papers.stages import clean_clip, finetuned_clip, load_clip, open_poisoned, poisoned_pairs
from mcl_repro.model import training
from mcl_repro.attacks import base
from mcl_repro.attacks.base import Attack, BadNets
from mcl_repro.papers.stages import defender_pairs
from mcl_repro.papers.ubt import ubt_overfit, ubt_select, ubt_split, ubt_unlearn

SETTINGS = load_profile("smoke")
DEFENDERS = (ubt, baselines, cleanclip, cfbd)
# of CleanCLIP's experiments: an attacker's training, and who measures
JUDGES = {"scratch_clip", "head_classification", "watched_training"}


class Sealed:
    "Stands for a `Poisoned`, of which a defender may have the pairs; counts how often they were asked for."
    def __init__(self, known):
        self.__dict__.update(_pairs=replace(known.pairs, images=public_images(known.pairs.images)), _asked=0)
    def __getattr__(self, name):
        if name != "pairs":
            raise Peeked(f"a defence looked at {name} of the poisoned set")
        self.__dict__["_asked"] += 1
        return self._pairs


class Closed:
    "Stands for the artefact of the poisoned set: not even its folder can be opened."
    def __getattr__(self, name):
        raise Peeked(f"a defence looked at {name} of the artefact of the poisoned set")


def seal(monkeypatch, known):
    "Every door that leads past the pairs is shut, in whatever module its name was imported."
    sealed, closed = Sealed(known), Closed()
    def opened(artefact):
        assert artefact is closed, "a defence opened another poisoned set"
        return sealed
    def shut(name):
        def refuse(*args, **kwargs):
            raise Peeked(f"a defence called {name}")
        return refuse
    for module in [m for n, m in list(sys.modules.items()) if n.startswith("mcl_repro.")]:
        for name in FORBIDDEN:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, shut(name))
        if hasattr(module, "open_poisoned"):
            monkeypatch.setattr(module, "open_poisoned", opened)
    for name in ("apply", "describe", "paint", "captions", "geometry"):
        monkeypatch.setattr(Attack, name, shut(f"Attack.{name}"))
    return sealed, closed


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "The attacker's half in profile smoke: a clean model, a poisoned set, a poisoned model."
    lab = Lab("smoke", device="cpu", runs=tmp_path_factory.mktemp("defences")/"runs", progress=False)
    clean = lab.node(clean_clip, model=SETTINGS.model.name, pairs=lab.role("pretrain"), recipe=dict(SETTINGS.pretrain))
    poisoned = lab.node(
        poisoned_pairs, pairs=lab.role("finetune"), attack=dict(SETTINGS.attacks.BadNet), target=SETTINGS.target,
        count=SETTINGS.poison.count, image_size=32, seed=0,
    )
    victim = lab.node(finetuned_clip, clip=clean, poisoned=poisoned, recipe=dict(SETTINGS.finetune))
    moments = lab.node(poisoning_checkpoint, clip=clean, poisoned=poisoned, recipe=dict(SETTINGS.finetune))
    found = dict(zip(("clean", "poisoned", "victim", "moments"), lab.run([clean, poisoned, victim, moments])))
    return SimpleNamespace(
        **found, known=open_poisoned(found["poisoned"]), clean_pairs=lab.role("clean_pairs"),
        labelled_images=lab.role("labelled_images"),
    )


def run(folder, f, **settings):
    "One stage, without a lab."
    for name in ("out", "scratch"):
        (folder/name).mkdir(parents=True)
    work = SimpleNamespace(out=folder/"out", scratch=folder/"scratch", device="cpu", progress=lambda *a: None)
    return SimpleNamespace(path=folder/"out", result=f(work, **settings))


def plain(settings):
    return {k: dict(v) if isinstance(v, dict) else v for k, v in settings.items()}


def flagging(detection):
    "The detection with D_p flagged, whatever the guard says of a model as small as this."
    with np.load(detection.path/"detection.npz", allow_pickle=False) as a:
        found = {k: a[k] for k in a.files}
    folder = detection.path.parent/"flagging"
    folder.mkdir(exist_ok=True)
    np.savez(folder/"detection.npz", **found | dict(flagged=np.sort(found["poisoned"]), attacked=np.array(True)))
    return SimpleNamespace(path=folder, result=dict(detection.result, attacked=True))


def steps(made, poisoned, done):
    """Every defence stage with its settings in profile smoke, in an order in which later ones find what they need in
    `done`: name -> (stage, settings).
    """
    s, victim = SETTINGS, dict(clip=made.victim, poisoned=poisoned)
    # a model as small as this does not look poisoned
    suspect = lambda selection: SimpleNamespace(path=selection.path, result=dict(selection.result, poisoned=True))
    unlearn = lambda options: (
        ubt_unlearn,
        dict(
            victim, split=done["ubt_split"], selection=suspect(done["ubt_select"]), recipe=dict(options["recipe"]),
            **{k: v for k, v in options.items() if k != "recipe"},
        ),
    )
    isolation = plain(s.abl)
    yield "ubt_split", lambda: (ubt_split, dict(clip=made.clean, poisoned=poisoned, share=s.ubt.suspicious_share))
    yield (
        "ubt_overfit",
        lambda: (
            ubt_overfit,
            dict(victim, split=done["ubt_split"], recipe=dict(s.ubt.overfit), normal_weight=s.ubt.normal_weight),
        ),
    )
    yield (
        "ubt_select",
        lambda: (
            ubt_select,
            dict(
                poisoned=poisoned, overfitted=done["ubt_overfit"], split=done["ubt_split"], count=s.ubt.unlearn_count,
                start_layer=s.ubt.relevance_start_layer, image_layer=s.ubt.image_layer, image_share=s.ubt.image_share,
            ),
        ),
    )
    yield "ubt_unlearn", lambda: unlearn(s.ubt.unlearn)
    yield "ubt_unlearn, retention", lambda: unlearn(s.ubt.retention)
    yield "ubt_unlearn, both masks", lambda: unlearn(dict(s.ubt.unlearn, mask="both"))
    yield "abl", lambda: (baselines.abl, dict(victim, **isolation))
    yield "abl, constraint", lambda: (baselines.abl, dict(victim, **isolation, ascent="constraint"))
    yield "abl, text mask", lambda: (baselines.abl, dict(victim, **isolation, text_mask=True))
    yield "abl_isolation", lambda: (baselines.abl_isolation, dict(victim, count=s.poison.count))
    yield "roclip", lambda: (baselines.roclip, dict(clip=made.clean, poisoned=poisoned, **plain(s.roclip)))
    yield (
        "roclip, images too",
        lambda: (
            baselines.roclip,
            dict(clip=made.clean, poisoned=poisoned, **{**plain(s.roclip), "image_policy": "roclip"}),
        ),
    )
    yield (
        "mapping_network",
        lambda: (
            cfbd.mapping_network,
            dict(clip=made.clean, pairs=made.clean_pairs, hidden=16, epochs=1, batch_size=32),
        ),
    )
    yield "captioned_texts", lambda: (cfbd.captioned_texts, dict(clip=made.clean, poisoned=poisoned))
    yield (
        "cfbd_detect",
        lambda: (
            cfbd.cfbd_detect,
            dict(clip=made.clean, poisoned=poisoned, mapping=done["mapping_network"], q=20, components=2),
        ),
    )
    yield (
        "cfbd_detect, captions",
        lambda: (
            cfbd.cfbd_detect,
            dict(
                clip=made.clean, poisoned=poisoned, mapping=done["captioned_texts"], q=20, components=2,
                reference="core", screen=True,
            ),
        ),
    )
    yield (
        "cfbd_filtered_clip",
        lambda: (
            cfbd.cfbd_filtered_clip,
            dict(clip=made.clean, poisoned=poisoned, detection=flagging(done["cfbd_detect"]), recipe=dict(s.finetune)),
        ),
    )
    yield (
        "cfbd_filtered_clip, coarse",
        lambda: (
            cfbd.cfbd_filtered_clip,
            dict(
                clip=made.clean, poisoned=poisoned, detection=done["cfbd_detect"], recipe=dict(s.finetune),
                keep="coarse",
            ),
        ),
    )
    yield (
        "cfbd_select",
        lambda: (
            cfbd.cfbd_select,
            dict(victim, detection=flagging(done["cfbd_detect"]), count=8, image_layer=s.ubt.image_layer),
        ),
    )
    yield (
        "cleaned_clip",
        lambda: (cleanclip.cleaned_clip, dict(clip=made.victim, pairs=made.clean_pairs, **plain(s.cleanclip))),
    )
    yield (
        "cleaned_clip, moments",
        lambda: (
            cleanclip.cleaned_clip,
            dict(clip=made.victim, pairs=made.clean_pairs, moments=made.moments, **plain(s.cleanclip)),
        ),
    )
    yield (
        "supervised_clip",
        lambda: (
            cleanclip.supervised_clip,
            dict(clip=made.victim, images=made.labelled_images, **plain(s.cleaning.supervised)),
        ),
    )
    yield (
        "supervised_clip, head only",
        lambda: (
            cleanclip.supervised_clip,
            dict(clip=made.victim, images=made.labelled_images, **plain(s.cleaning.probe)),
        ),
    )


WITHOUT_PAIRS = {"cleaned_clip", "mapping_network", "supervised_clip"}   # they have clean data of their own
SAME_CLIP = {"supervised_clip, head only"}   # what it learns stands beside the CLIP


def test_no_defence_looks_at_what_a_defender_does_not_have(made, tmp_path, monkeypatch):
    sealed, closed = seal(monkeypatch, made.known)
    done = {}
    # no weights of a captioner here
    monkeypatch.setattr(
        cfbd, "coca_captioner",
        lambda *a: lambda pictures: [f"a picture of brightness {p.mean():.0f}" for p in pictures],
    )
    for name, step in steps(made, closed, done):
        before = sealed._asked
        f, settings = step()
        done[name] = run(tmp_path/name, f, **settings)
        files = {p.name for p in done[name].path.iterdir()}
        assert done[name].result and files, f"{name} left nothing"
        assert (sealed._asked > before) != (name.split(",")[0] in WITHOUT_PAIRS), (
            f"{name} asked for the pairs {sealed._asked - before} times"
        )
        if "clip.safetensors" in files:
            assert load_clip(done[name]).name == SETTINGS.model.name
            assert (
                (done[name].path / "clip.safetensors").read_bytes()
                == (made.victim.path / "clip.safetensors").read_bytes()
            ) is (name in SAME_CLIP)
    assert len(done) == 23 and sum((d.path/"clip.safetensors").exists() for d in done.values()) == 15


def test_every_stage_of_the_defences_is_run():
    "A stage that is added to one of these modules belongs into `steps`."
    stages_of = {n for m in DEFENDERS for n, f in vars(m).items() if hasattr(f, "stage") and f.__module__ == m.__name__}
    assert stages_of - JUDGES == {
        name.split(",")[0] for name, _ in steps(SimpleNamespace(clean=None, victim=None, clean_pairs=None), None, {})
    }


CHEATS = dict(
    flags=lambda work, clip, poisoned: stages.open_poisoned(poisoned).flags,
    rows=lambda work, clip, poisoned: stages.open_poisoned(poisoned).rows,
    images=lambda work, clip, poisoned: stages.open_poisoned(poisoned).images,
    captions=lambda work, clip, poisoned: stages.open_poisoned(poisoned).captions,
    target=lambda work, clip, poisoned: stages.open_poisoned(poisoned).target,
    attack=lambda work, clip, poisoned: stages.open_poisoned(poisoned).attack,
    seed=lambda work, clip, poisoned: stages.open_poisoned(poisoned).seed,
    getattr=lambda work, clip, poisoned: getattr(stages.open_poisoned(poisoned), "describe")(),
    file=lambda work, clip, poisoned: np.load(poisoned.path / "rows.npy"),
    result=lambda work, clip, poisoned: poisoned.result["attack"],
    settings=lambda work, clip, poisoned: poisoned.record["settings"]["target"],
    where=lambda work, clip, poisoned: defender_pairs(poisoned).images._where < 0,
    selected=lambda work, clip, poisoned: defender_pairs(poisoned).select(range(5)).images._extra,
    measured=lambda work, clip, poisoned: stages.classification(
        work, clip=clip, test=None, attack=None, target="banana"
    ),
    hits=lambda work, clip, poisoned: metrics.attack_hits(torch.zeros(1, 2), np.zeros(1), 0),
    triggered=lambda work, clip, poisoned: base.TriggeredImages(defender_pairs(poisoned).images, None, 32),
    attacked=lambda work, clip, poisoned: BadNets().apply(np.zeros((1, 32, 32, 3), np.uint8), np.random.default_rng(0)),
)


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_defence_that_cheats_is_caught(made, tmp_path, monkeypatch, cheat):
    sealed, closed = seal(monkeypatch, made.known)
    def defence(work, *, clip, poisoned):
        pairs = defender_pairs(poisoned)
        # what is allowed
        assert pairs.images.array([0], 32).shape == (1, 32, 32, 3) and len(pairs.select([2, 0]).captions) == 2
        CHEATS[cheat](work, clip, poisoned)
        return {}
    with pytest.raises(Peeked):
        run(tmp_path/"cheat", defence, clip=made.victim, poisoned=closed)
    assert sealed._asked >= 1


def test_the_sealed_pairs_are_the_pairs(made, monkeypatch):
    "The seal changes nothing that a defender may see, so what was run above is the defence."
    sealed, closed = seal(monkeypatch, made.known)
    pairs, known = defender_pairs(closed), made.known.pairs
    assert (pairs.ids, pairs.captions, pairs.fingerprint) == (known.ids, known.captions, known.fingerprint)
    assert (pairs.images.array(None, 32) == known.images.array(None, 32)).all()
    assert (pairs.images.take([3]).array([0], 32) == known.images.array([3], 32)).all()


# ---- bad input

@pytest.fixture
def untrained(monkeypatch):
    def refuse(*args, **kwargs):
        pytest.fail("bad input was not refused before training")
    monkeypatch.setattr(training, "_step", refuse)


@pytest.mark.parametrize("share", [0., 1e-4, 1., 7.])
def test_a_share_that_leaves_nothing_is_refused(made, tmp_path, untrained, share):
    with pytest.raises(SettingsError, match="pairs leaves nothing on one side: choose another"):
        run(tmp_path/"split", ubt_split, clip=made.clean, poisoned=made.poisoned, share=share)
    with pytest.raises(SettingsError, match="pairs leaves nothing on one side: choose another"):
        run(
            tmp_path / "abl", baselines.abl, clip=made.victim, poisoned=made.poisoned, recipe=dict(SETTINGS.abl.recipe),
            share=share,
        )


class Towers(torch.nn.Module):
    "The least that counts as a CLIP, without open_clip's text tower."
    def __init__(self):
        super().__init__()
        self.image = torch.nn.Linear(3*64, 16)
        self.words = torch.nn.EmbeddingBag(49408, 16)
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.))
    def encode_image(self, x):
        return self.image(torch.nn.functional.adaptive_avg_pool2d(x, 8).flatten(1))
    def encode_text(self, tokens):
        return self.words(tokens)


@pytest.fixture
def towers(monkeypatch):
    like = build_clip("smoke-RN")
    torch.manual_seed(0)
    for module in (baselines, ubt):
        monkeypatch.setattr(
            module, "load_clip",
            lambda artefact, device="cpu": Clip(Towers(), like.tokenizer, 32, like.mean, like.std, "towers"),
        )


def test_a_text_mask_needs_a_text_transformer(made, tmp_path, untrained, towers):
    with pytest.raises(SettingsError, match="needs CLIP's own text transformer"):
        run(
            tmp_path / "abl", baselines.abl, clip=made.victim, poisoned=made.poisoned, recipe=dict(SETTINGS.abl.recipe),
            share=0.05, text_mask=True,
        )
    assert not list((tmp_path/"abl"/"out").iterdir())


def test_ubt_needs_a_text_transformer_and_says_so_first(made, tmp_path, towers, monkeypatch):
    monkeypatch.setattr(ubt, "pair_similarities", lambda *a: pytest.fail("worked before it refused"))
    with pytest.raises(SettingsError, match="needs CLIP's own text transformer"):
        run(tmp_path/"split", ubt_split, clip=made.clean, poisoned=made.poisoned, share=.05)


def test_a_block_that_the_text_tower_does_not_have_is_refused(made, tmp_path, untrained):
    with pytest.raises(SettingsError, match="start_layer: 9 given for"):
        run(
            tmp_path / "abl", baselines.abl, clip=made.victim, poisoned=made.poisoned, recipe=dict(SETTINGS.abl.recipe),
            share=0.05, text_mask=True, start_layer=9,
        )


def test_without_a_mask_other_towers_will_do(made, tmp_path, towers):
    recipe = dict(epochs=2, batch_size=64, learning_rate=1e-3)
    isolated = run(tmp_path/"abl", baselines.abl, clip=made.victim, poisoned=made.poisoned, recipe=recipe, share=.05)
    robust = run(
        tmp_path / "roclip", baselines.roclip, clip=made.clean, poisoned=made.poisoned, recipe=recipe, pool_size=8
    )
    assert isolated.result["model"] == robust.result["model"] == "towers" and isolated.result["isolated"] == 20


def test_more_than_is_suspicious_cannot_be_selected(made, tmp_path, untrained):
    split = run(tmp_path/"split", ubt_split, clip=made.clean, poisoned=made.poisoned, share=.02)
    with pytest.raises(SettingsError, match="cannot select 9 of 8 suspicious pairs"):
        run(tmp_path/"select", ubt_select, overfitted=made.victim, poisoned=made.poisoned, split=split, count=9)


@pytest.mark.parametrize("name", ["abl", "roclip"])
def test_numbers_that_cannot_train_are_refused(made, tmp_path, untrained, name):
    settings = dict(abl=dict(share=.05), roclip=dict(pool_size=8))[name]
    with pytest.raises(SettingsError, match="epochs must be positive"):
        run(
            tmp_path / name, getattr(baselines, name), clip=made.victim, poisoned=made.poisoned,
            recipe=dict(epochs=0, batch_size=8, learning_rate=1e-3), **settings,
        )
