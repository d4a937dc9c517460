"""Conformance of the defences: whatever defends is run on a poisoned set that gives away nothing but its pairs, where
nobody can measure attack success.

A stage that reads rows, flags, triggers, targets or stored files of the poisoned set, looks behind its images, or asks
for an attack success rate fails. New stages of the modules named in DEFENDERS must be entered in `STEPS`."""
import inspect
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from defenders import FORBIDDEN, Peeked, public_images
from mcl_repro.measures import metrics
from mcl_repro.papers import baselines, cfbd, cleanclip, stages, ubt
from mcl_repro.model.clip import build_clip, Clip
from mcl_repro.core.errors import SettingsError
from mcl_repro.lab.lab import Lab
from mcl_repro.lab.profiles import load_profile
from mcl_repro.papers.stages import clean_clip, finetuned_clip, load_clip, open_poisoned, poisoned_pairs
from mcl_repro.model import training
from mcl_repro.attacks import base
from mcl_repro.attacks.base import Attack, BadNets
from mcl_repro.papers.stages import defender_pairs
from mcl_repro.papers.ubt import reading_settings, ubt_overfit, ubt_select, ubt_split, ubt_unlearn

SETTINGS = load_profile("smoke")
DEFENDERS = (ubt, baselines, cleanclip, cfbd)
# of CleanCLIP's experiments: an attacker's training, who measures, pictures to look at; of the baselines: noise that
# protects pictures
JUDGES = {"scratch_clip", "head_classification", "watched_training", "second_views", "noise_losses"}


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
    moments = lab.node(
        cleanclip.watched_training, clip=clean, pairs=poisoned, recipe=dict(SETTINGS.finetune), images=5, every=100,
        test=lab.role("zeroshot"), attack=dict(SETTINGS.attacks.BadNet), target=SETTINGS.target, keep_moments=True,
    )
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


S = SETTINGS


def called_poisoned(selection):
    "The selection with the verdict that a model as small as this does not earn."
    return SimpleNamespace(path=selection.path, result=dict(selection.result, poisoned=True))


def unlearning(made, done, settings):
    return dict(plain(settings), clip=made.victim, split=done["ubt_split"],
                selection=called_poisoned(done["ubt_select"]))


def overfitting(made, done):
    return dict(clip=made.victim, split=done["ubt_split"], recipe=dict(S.ubt.overfit),
                normal_weight=S.ubt.normal_weight, until=S.ubt.overfit_until)


def selecting(made, done):
    return dict(overfitted=done["ubt_overfit"], split=done["ubt_split"], count=S.ubt.unlearn_count,
                start_layer=S.ubt.relevance_start_layer, image_layer=S.ubt.image_layer, image_share=S.ubt.image_share)


def isolating(made, done, **more):
    return dict(plain(S.abl), clip=made.victim, **more)


def detecting(made, done, mapping, **more):
    return dict(clip=made.clean, mapping=done[mapping], q=20, components=2, **more)


def flagged_pairs(done):
    return flagging(done["cfbd_detect"])


def labelled(made, settings):
    return dict(plain(settings), clip=made.victim, images=made.labelled_images)


def cleaning(made, **more):
    return dict(plain(S.cleanclip), clip=made.victim, pairs=made.clean_pairs, **more)


# Every defence stage in profile smoke, in an order in which later ones find what they need in `done`: name -> stage and
# its settings; the poisoned set comes to those that take one
STEPS = {
    "ubt_split": (ubt_split, lambda made, done: dict(clip=made.clean, share=S.ubt.suspicious_share)),
    "ubt_overfit": (ubt_overfit, overfitting),
    "ubt_select": (ubt_select, selecting),
    "ubt_unlearn": (ubt_unlearn, lambda made, done: unlearning(made, done, S.ubt.unlearn)),
    "ubt_unlearn, retention form": (
        ubt_unlearn, lambda made, done: unlearning(made, done, reading_settings(S.ubt, "retention form"))
    ),
    "ubt_unlearn, cosine ascent": (
        ubt_unlearn, lambda made, done: unlearning(made, done, reading_settings(S.ubt, "cosine ascent"))
    ),
    "ubt_unlearn, both masks": (
        ubt_unlearn, lambda made, done: unlearning(made, done, dict(S.ubt.unlearn, mask="both"))
    ),
    "abl": (baselines.abl, isolating),
    "abl, ascent": (baselines.abl, lambda made, done: isolating(made, done, unlearning="ascent")),
    "abl, text mask": (baselines.abl, lambda made, done: isolating(made, done, text_mask=True)),
    "abl_isolation": (baselines.abl_isolation, lambda made, done: dict(clip=made.victim, count=S.poison.count)),
    "roclip": (baselines.roclip, lambda made, done: dict(plain(S.roclip), clip=made.clean)),
    "roclip, images too": (
        baselines.roclip, lambda made, done: dict(plain(S.roclip), clip=made.clean, image_policy="roclip")
    ),
    "mapping_network": (
        cfbd.mapping_network,
        lambda made, done: dict(clip=made.clean, pairs=made.clean_pairs, hidden=16, epochs=1, batch_size=32),
    ),
    "captioned_texts": (cfbd.captioned_texts, lambda made, done: dict(clip=made.clean)),
    "cfbd_detect": (cfbd.cfbd_detect, lambda made, done: detecting(made, done, "mapping_network")),
    "cfbd_detect, captions": (
        cfbd.cfbd_detect, lambda made, done: detecting(made, done, "captioned_texts", reference="core", screen=True)
    ),
    "cfbd_choose_q": (cfbd.cfbd_choose_q, lambda made, done: dict(detection=done["cfbd_detect"], q=[10, 20])),
    "cfbd_filtered_clip": (
        cfbd.cfbd_filtered_clip,
        lambda made, done: dict(clip=made.clean, detection=flagged_pairs(done), recipe=dict(S.finetune)),
    ),
    "cfbd_filtered_clip, coarse": (
        cfbd.cfbd_filtered_clip,
        lambda made, done: dict(clip=made.clean, detection=done["cfbd_detect"], recipe=dict(S.finetune), keep="coarse"),
    ),
    "cfbd_select": (
        cfbd.cfbd_select,
        lambda made, done: dict(
            clip=made.victim, detection=flagged_pairs(done), count=8, image_layer=S.ubt.image_layer
        ),
    ),
    "cleaned_clip": (cleanclip.cleaned_clip, lambda made, done: cleaning(made)),
    "cleaned_clip, moments": (cleanclip.cleaned_clip, lambda made, done: cleaning(made, moments=made.moments)),
    "supervised_clip": (cleanclip.supervised_clip, lambda made, done: labelled(made, S.cleaning.supervised)),
    "supervised_clip, head only": (cleanclip.supervised_clip, lambda made, done: labelled(made, S.cleaning.probe)),
}


WITHOUT_PAIRS = {"cleaned_clip", "mapping_network", "supervised_clip", "cfbd_choose_q"}   # they have data of their own
SAME_CLIP = {"supervised_clip, head only"}   # what it learns stands beside the CLIP


def brightness_as_caption(pictures):
    return [f"a picture of brightness {picture.mean():.0f}" for picture in pictures]


def test_no_defence_looks_at_what_a_defender_does_not_have(made, tmp_path, monkeypatch):
    sealed, closed = seal(monkeypatch, made.known)
    done = {}
    monkeypatch.setattr(cfbd, "coca_captioner", lambda *a: brightness_as_caption)     # no captioner's weights here
    for name, (defence, settings) in STEPS.items():
        before, takes = sealed._asked, inspect.signature(defence).parameters
        poisoned = dict(poisoned=closed) if "poisoned" in takes else {}
        done[name] = run(tmp_path/name, defence, **settings(made, done), **poisoned)
        files = {p.name for p in done[name].path.iterdir()}
        assert done[name].result and files, f"{name} left nothing"
        asked = sealed._asked - before
        assert (asked > 0) != (name.split(",")[0] in WITHOUT_PAIRS), f"{name} asked for the pairs {asked} times"
        if "clip.safetensors" in files:
            assert load_clip(done[name]).name == SETTINGS.model.name
            repaired, victim = (load_clip(at).model.state_dict() for at in (done[name], made.victim))
            assert all(torch.equal(v, victim[k]) for k, v in repaired.items()) is (name in SAME_CLIP)
    assert len(done) == 25 and sum((d.path/"clip.safetensors").exists() for d in done.values()) == 16


def test_every_stage_of_the_defences_is_run():
    "A stage that is added to one of these modules belongs into `STEPS`."
    own = {name for module in DEFENDERS for name, f in vars(module).items()
           if hasattr(f, "stage") and f.__module__ == module.__name__}
    assert own - JUDGES == {name.split(",")[0] for name in STEPS}


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
