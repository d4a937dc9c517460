"""CleanCLIP's experiments: structured triggers, poisoned pre-training, what a head is measured by, a training that is
watched, and tables that no paper prints.
"""
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mcl_repro.papers import cleanclip
from mcl_repro.papers.cleanclip import (
    attach_head, class_scores, cleaned_clip, head_classification, load_head, save_head, scratch_clip, supervised_clip,
    watched_training,
)
from mcl_repro.papers.cleanclip_study import (
    alignment, few_of_each, in_class, released_evaluation, still_together, structured_attack, structured_picture,
    triggered_clouds, Watch,
)
from mcl_repro.model.clip import build_clip, embed_images, read_tensors, save_clip, to_pixels, zero_shot_weights
from mcl_repro.data.pairs import ArrayImages
from mcl_repro.data.registry import open_data, resolve
from mcl_repro.core.errors import DataError, SettingsError
from mcl_repro.papers.plan import Experiments
from mcl_repro.lab.lab import Lab
from mcl_repro.measures.metrics import attack_hits, correct
from mcl_repro.report.tables import read_table, show_table
from mcl_repro.papers.stages import (
    attack_of, classification, defender_pairs, finetuned_clip, open_poisoned, outcomes, poisoned_pairs,
)
from mcl_repro.model.training import Recipe, train, training_set

RECIPE = dict(epochs=2, batch_size=8, learning_rate=1e-3, warmup_steps=2)
ATTACK = dict(name="badnets", pattern="checker", placement="corner", patch_share=.25)


class Killed(Exception):
    "Stands for a process that was killed."


def run(folder, f, **settings):
    "One stage, without a lab; in a folder that is there already, a second attempt."
    for name in ("out", "scratch"):
        (folder/name).mkdir(parents=True, exist_ok=True)
    work = SimpleNamespace(out=folder/"out", scratch=folder/"scratch", device="cpu", progress=lambda *a: None)
    return SimpleNamespace(path=folder/"out", result=f(work, **settings))


def weights(artefact):
    return (artefact.path/"clip.safetensors").read_bytes()


def stored(folder, clip):
    "A model as a stage leaves it."
    folder.mkdir(parents=True, exist_ok=True)
    save_clip(clip, folder/"clip.safetensors")
    return SimpleNamespace(path=folder, result=dict(model=clip.name))


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(
        "smoke", device="cpu", runs=tmp_path_factory.mktemp("experiments") / "runs", progress=False,
        roles=dict(finetune="world:train:24"),
    )


@pytest.fixture(scope="module")
def poisoned(lab):
    "24 pairs, 4 of them poisoned."
    return lab.run(
        lab.node(poisoned_pairs, pairs=lab.role("finetune"), attack=ATTACK, target="banana", count=4, image_size=32)
    )


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return stored(tmp_path_factory.mktemp("clip"), build_clip("smoke-RN"))


# ---- triggers with structure

@pytest.mark.parametrize("kind", ["stripes", "triangles", "text"])
def test_a_structured_picture_is_the_same_twice_at_any_size_and_has_edges(kind):
    drawn = [structured_picture(kind, size) for size in (8, 33, 64, 64)]
    assert [p.shape for p in drawn] == [(8, 8, 3), (33, 33, 3), (64, 64, 3), (64, 64, 3)]
    assert {p.dtype for p in drawn} == {np.dtype("uint8")}
    assert np.array_equal(drawn[2], drawn[3]) and not np.array_equal(drawn[2], structured_picture(kind, 64, seed=1))
    x, noise = drawn[2].astype(float), np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(float)
    likeness = lambda p: np.corrcoef(p[:, 1:].ravel(), p[:, :-1].ravel())[0, 1]
    # neighbours are alike, as they are not in noise
    assert x.std() > 40 and likeness(x) > .3 > .1 > abs(likeness(noise))


def test_an_unknown_structure():
    with pytest.raises(SettingsError, match="unknown structure 'dots': use one of stripes, triangles, text"):
        structured_picture("dots")


def test_a_structured_attack_blends_the_picture_that_was_drawn(lab, tmp_path):
    settings = structured_attack(lab, dict(name="blended", pattern=dict(kind="triangles", seed=3), alpha=.5), 32)
    made = lab.run(settings["pattern"])
    pattern = np.load(made.path/"pattern.npy", allow_pickle=False)
    assert made.result == dict(kind="triangles", size=32)
    assert np.array_equal(pattern, structured_picture("triangles", 32, 3))
    attack, images = attack_of(dict(settings, pattern=made)), np.full((2, 32, 32, 3), 100, np.uint8)
    assert np.abs(attack.apply(images, np.random.default_rng(0)).astype(float) - (.5*images + .5*pattern)).max() <= .5
    # and of another size
    assert attack.apply(np.zeros((1, 48, 48, 3), np.uint8), np.random.default_rng(0)).std() > 10
    again = structured_attack(lab, dict(name="blended", pattern=dict(kind="triangles", seed=3), alpha=.2), 32)
    assert (
        again["pattern"].key
        == settings["pattern"].key
        != structured_attack(lab, dict(name="blended", pattern=dict(kind="triangles"), alpha=0.5), 32)["pattern"].key
    )


def test_a_pattern_that_is_a_plain_name_stays(lab):
    entry = dict(name="blended", pattern="noise", alpha=.5)
    settings = structured_attack(lab, entry, 32)
    assert settings == entry and settings is not entry
    drawn = lab.profile.cleaning.structured.attacks["Stripes, blended"]
    # the profile is not written into
    assert structured_attack(lab, drawn, 32)["pattern"].settings == dict(kind="stripes", size=32, seed=0)
    assert drawn.pattern == dict(kind="stripes")


def test_every_structured_attack_of_the_profile_can_poison(lab):
    entries = lab.profile.cleaning.structured.attacks
    made = lab.run([
        lab.node(
            poisoned_pairs, pairs=lab.role("finetune"), attack=structured_attack(lab, e, 32), target="banana",
            count=2, image_size=32,
        )
        for e in entries.values()
    ])
    assert [a.result["count"] for a in made] == [2] * len(entries)
    assert len({open_poisoned(a).pairs.fingerprint for a in made}) == len(entries)


# ---- pre-training from scratch

def test_pretraining_without_the_self_supervised_term_is_plain_contrastive_training(poisoned, tmp_path):
    plain = build_clip("smoke-RN", seed=4)
    train(plain, training_set(plain, defender_pairs(poisoned)), Recipe(**RECIPE, seed=4))
    save_clip(plain, tmp_path/"plain.safetensors")
    done = [
        run(
            tmp_path / str(k), scratch_clip, model="smoke-RN", poisoned=poisoned, recipe=dict(RECIPE, seed=seed), **more
        )
        for k, (seed, more) in enumerate([
            (4, {}), (4, dict(self_supervised_weight=1.0)), (4, dict(self_supervised_weight=2.0)), (5, {}),
            (4, dict(self_supervised_weight=1.0)),
        ])
    ]
    assert weights(done[0]) == (tmp_path/"plain.safetensors").read_bytes()
    assert len({weights(d) for d in done}) == 4 and weights(done[1]) == weights(done[4])
    assert done[0].result["pairs"] == 24 and done[0].result["steps"] == 6 and done[0].result["model"] == "smoke-RN"


def test_bad_captions_are_refused_before_pretraining(poisoned, tmp_path, monkeypatch):
    "Only where captions are augmented at all."
    pairs = defender_pairs(poisoned)
    monkeypatch.setattr(
        cleanclip, "defender_pairs", lambda artefact: pairs.replace(captions=["2024", *list(pairs.captions)[1:]])
    )
    monkeypatch.setattr(cleanclip, "train_and_save", lambda *a, **k: dict(trained=True))
    settings = dict(model="smoke-RN", poisoned=poisoned, recipe=RECIPE)
    with pytest.raises(DataError, match="row 0 has no letters: '2024'"):
        run(tmp_path/"a", scratch_clip, self_supervised_weight=1., **settings)
    assert run(tmp_path / "b", scratch_clip, self_supervised_weight=1.0, letterless="keep", **settings).result
    assert run(tmp_path / "c", scratch_clip, **settings).result


# ---- the optimiser's memory

@pytest.fixture
def moments(clip, poisoned, tmp_path):
    "A poisoning that is watched, with the optimiser's moments."
    return run(
        tmp_path/"moments", watched_training, clip=clip, pairs=poisoned, recipe=RECIPE, images=10, every=4,
        test=resolve("world:zeroshot_test:12"), attack=ATTACK, target="banana", keep_moments=True,
    )


def test_the_moments_are_those_of_the_victims_own_training(clip, poisoned, moments, tmp_path):
    victim = run(tmp_path/"victim", finetuned_clip, clip=clip, poisoned=poisoned, recipe=RECIPE)
    kept, own = read_tensors(moments.path/"checkpoint.safetensors"), read_tensors(victim.path/"clip.safetensors")
    assert {k.removeprefix("model.") for k in kept if k.startswith("model.")} == set(own)
    assert all(torch.equal(kept[f"model.{k}"], v) for k, v in own.items())
    assert {kept[k].item() for k in kept if k.endswith(".step")} == {6.}
    last = (tmp_path/"victim/scratch/checkpoint.safetensors").read_bytes()
    assert (moments.path/"checkpoint.safetensors").read_bytes() != last     # what was watched is in it, too
    assert same_moments(kept, read_tensors(tmp_path/"victim/scratch/checkpoint.safetensors"))


def same_moments(a, b):
    names = [k for k in a if k.startswith("optimizer.")]
    return names and all(torch.equal(a[k], b[k]) for k in names)


def test_the_checkpoint_is_what_cleaning_carries_over(clip, poisoned, moments, tmp_path):
    victim = run(tmp_path/"victim", finetuned_clip, clip=clip, poisoned=poisoned, recipe=RECIPE)
    cleaned = [
        run(tmp_path / name, cleaned_clip, clip=victim, pairs=resolve("world:validation:24"), recipe=RECIPE, **more)
        for name, more in (("with", dict(moments=moments)), ("without", {}))
    ]
    assert weights(cleaned[0]) != weights(cleaned[1])


# ---- accuracy and ASR by a linear head

NAMES = ["cat", "ape", "dog", "cow"]


def labels_csv(folder, classnames, labels):
    "A labelled set of noise pictures, the same ones whatever the classes are called."
    folder.mkdir()
    for k in range(len(labels)):
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder/f"{k}.png")
    (folder/"classnames.txt").write_text("\n".join(classnames) + "\n")
    (folder / "labels.csv").write_text(
        "image,label\n" + "".join(f"{k}.png,{classnames.index(label)}\n" for k, label in enumerate(labels))
    )
    return resolve(str(folder/"labels.csv"))


LABELS = ["dog", "cat", "ape", "cow"]*6


@pytest.fixture
def headed(tmp_path):
    "What `supervised_clip` leaves, with a head that spreads its guesses over all four classes."
    clip = build_clip("smoke-RN")
    artefact = stored(tmp_path/"headed", clip)
    attach_head(clip, 4)
    pixels = np.stack([np.random.default_rng(k).integers(0, 256, (32, 32, 3), dtype=np.uint8) for k in range(24)])
    with torch.no_grad():      # standardised embeddings times a random matrix
        e = clip.model.encode_image(to_pixels(clip, pixels))
        clip.model.head.weight.copy_(torch.randn(4, 32, generator=torch.Generator().manual_seed(0))/e.std(0))
        clip.model.head.bias.copy_(-clip.model.head.weight @ e.mean(0))
    save_head(clip, artefact.path/"head.safetensors", NAMES)
    return artefact


def hand_scores(headed, images):
    "Scores as `head_classification` must have them."
    clip = build_clip("smoke-RN", pretrained=str(headed.path/"clip.safetensors"))
    assert load_head(headed, clip) == NAMES
    return class_scores(clip, images).numpy()


def test_the_head_is_measured_by_the_metrics_of_all_others(headed, tmp_path):
    test = labels_csv(tmp_path/"test", NAMES, LABELS)
    data = open_data(test)
    found = run(tmp_path/"run", head_classification, clip=headed, test=test, attack=ATTACK, target="dog")
    clean = hand_scores(headed, data.images)
    assert len(set(clean.argmax(1))) == 4
    stamped = attack_of(ATTACK).apply(data.image_array(size=32), np.random.default_rng(0))
    attacked = hand_scores(headed, ArrayImages(stamped))
    got, other = outcomes(found), data.labels != NAMES.index("dog")
    assert got["clean"].tolist() == (clean.argmax(1) == data.labels).tolist() == correct(clean, data.labels).tolist()
    assert (
        got["attacked"].tolist()
        == (attacked.argmax(1) == 2)[other].tolist()
        == attack_hits(attacked, data.labels, 2).tolist()
    )
    assert len(got["clean"]) == 24 and len(got["attacked"]) == 18      # images of the target class do not count
    assert found.result == dict(clean=got["clean"].mean(), attacked=got["attacked"].mean(), images=24)


def test_without_an_attack_or_a_target_there_is_no_asr(headed, tmp_path):
    test = labels_csv(tmp_path/"test", NAMES, LABELS)
    for name, attack, target in (("a", None, "dog"), ("b", ATTACK, "banana")):
        assert set(
            outcomes(run(tmp_path / name, head_classification, clip=headed, test=test, attack=attack, target=target))
        ) == {"clean"}


def test_classes_are_matched_by_name(headed, tmp_path):
    first, second = (
        run(
            tmp_path / f"run{k}", head_classification, clip=headed,
            test=labels_csv(tmp_path / f"test{k}", names, LABELS), attack=ATTACK, target="dog",
        )
        for k, names in enumerate([NAMES, sorted(NAMES)])
    )
    assert first.result == second.result and 0 < first.result["clean"] < 1
    assert all(np.array_equal(v, outcomes(second)[k]) for k, v in outcomes(first).items())


def test_a_test_set_of_fewer_classes_is_told_apart_among_them(headed, tmp_path):
    names = ["dog", "ape"]
    test = labels_csv(tmp_path/"test", names, ["dog", "ape"]*5)
    data = open_data(test)
    scores = hand_scores(headed, data.images)[:, [NAMES.index(n) for n in names]]
    assert (
        outcomes(run(tmp_path / "run", head_classification, clip=headed, test=test, attack=None, target="dog"))[
            "clean"
        ].tolist()
        == (scores.argmax(1) == data.labels).tolist()
    )


def test_a_class_that_nobody_labelled(headed, tmp_path, monkeypatch):
    monkeypatch.setattr(cleanclip, "class_scores", lambda *a: pytest.fail("it measured"))
    with pytest.raises(DataError, match="the labelled images name no class 'gnu'"):
        run(
            tmp_path / "run", head_classification, clip=headed,
            test=labels_csv(tmp_path / "test", [*NAMES, "gnu"], LABELS), attack=None, target="dog",
        )


def test_a_supervised_model_is_measured(clip, tmp_path):
    repaired = run(
        tmp_path / "repaired", supervised_clip, clip=clip, images=resolve("world:zeroshot_validation:40"),
        recipe=dict(RECIPE, epochs=1), per_class=1,
    )
    found = run(
        tmp_path / "run", head_classification, clip=repaired, test=resolve("world:zeroshot_test:40"), attack=ATTACK,
        target="banana",
    )
    assert found.result["images"] == 40 and len(outcomes(found)["attacked"]) == 39


# ---- watching a training

def test_alignment_is_the_mean_cosine_with_the_targets_prompt():
    model, data = build_clip("smoke-RN"), open_data("world:zeroshot_test:12")
    pixels = data.image_array(size=32)
    stamped, target = 255 - pixels, int(data.labels[3])
    seen = alignment(model, pixels, stamped, data.labels, data.classnames, target)
    with torch.no_grad():
        texts = (
            F.normalize(
                model.model.encode_text(model.tokenizer([f"a photo of a {n}." for n in data.classnames])), dim=-1
            )
            .double()
            .numpy()
        )
    clean, bad = (embed_images(model, x).double().numpy() @ texts.T for x in (pixels, stamped))
    other = data.labels != target
    assert 0 < other.sum() < 12
    assert seen == pytest.approx(
        dict(
            alignment=bad[other, target].mean(), without_trigger=clean[other, target].mean(),
            CA=(clean.argmax(1) == data.labels).mean(), ASR=(bad.argmax(1) == target)[other].mean(),
        ),
        abs=1e-6,
    )


def test_rows_come_every_few_steps_and_at_the_end_of_epochs_once():
    state = SimpleNamespace(step=0, steps_per_epoch=4, clip=None, history=[])
    watch = Watch(lambda clip: dict(x=state.step**2), 2)
    for step in range(1, 9):
        state.step = step
        watch.after_step(state, None)
        if step % 4 == 0:
            state.history.append({})
            watch.after_epoch(state)
    assert [h["watched"] for h in state.history] == [[dict(step=s, x=s*s) for s in steps] for steps in ((2, 4), (6, 8))]


@pytest.fixture(scope="module")
def watched_settings(clip):
    return dict(
        clip=clip, pairs=resolve("world:validation:24"), recipe=RECIPE, test=resolve("world:zeroshot_test:12"),
        attack=ATTACK, target="banana", images=10, every=2,
    )


def final(folder):
    return {k: v for k, v in read_tensors(folder/"scratch/checkpoint.safetensors").items() if k.startswith("model.")}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.mark.parametrize("settings, alone", [
    ({}, dict(self_supervised_weight=0.)),
    (dict(self_supervised_weight=1.), {}),
    (dict(self_supervised_weight=1., frozen_captions=True), dict(frozen_captions=True)),
])
def test_a_watched_training_is_the_training_itself(watched_settings, tmp_path, settings, alone):
    watched = run(tmp_path/"watched", watched_training, **watched_settings, **settings)
    run(
        tmp_path / "alone", cleaned_clip, clip=watched_settings["clip"], pairs=watched_settings["pairs"], recipe=RECIPE,
        **alone,
    )
    assert same(final(tmp_path/"watched"), final(tmp_path/"alone"))
    rows = pd.read_csv(watched.path/"watched.csv")
    assert rows.step.tolist() == [0, 2, 3, 4, 6]
    assert list(rows) == ["step", "alignment", "without_trigger", "CA", "ASR"]
    assert rows.notna().all(axis=None)
    assert watched.result == pytest.approx(rows.iloc[-1].to_dict()) and rows.alignment.nunique() == 5
    assert [path.name for path in watched.path.iterdir()] == ["watched.csv"]     # no model, no moments


def test_a_poisoning_can_be_watched_and_the_first_row_is_the_model_that_was_given(
    watched_settings, clip, poisoned, tmp_path
):
    watched = run(tmp_path/"watched", watched_training, **watched_settings | dict(pairs=poisoned))
    victim = run(tmp_path/"victim", finetuned_clip, clip=clip, poisoned=poisoned, recipe=RECIPE)
    assert same(
        final(tmp_path / "watched"),
        {f"model.{k}": v for k, v in read_tensors(victim.path / "clip.safetensors").items()},
    )
    everything = open_data(watched_settings["test"])
    drawn = np.random.default_rng([0, 8]).permutation(len(everything))[:10]
    data = everything.select(np.sort(drawn))
    pixels = data.image_array(size=32)
    stamped = attack_of(ATTACK).apply(pixels.copy(), np.random.default_rng(0))
    rows = pd.read_csv(watched.path/"watched.csv")
    for row, path in ((0, clip.path), (-1, victim.path)):
        model = build_clip("smoke-RN", pretrained=str(path/"clip.safetensors"))
        assert rows.iloc[row].drop("step").to_dict() == pytest.approx(
            alignment(model, pixels, stamped, data.labels, data.classnames, data.classnames.index("banana")), abs=1e-6
        )


@pytest.mark.parametrize("change, says", [
    (dict(images=0), "at least one image and a step"),
    (dict(every=0), "at least one image and a step"),
    (dict(target="nobody"), "has no class 'nobody'"),
    (dict(self_supervised_weight=1., synonyms="auto"), "auto means another thing on every machine"),
])
def test_a_watch_that_cannot_work_is_refused_before_training(watched_settings, tmp_path, monkeypatch, change, says):
    monkeypatch.setattr(cleanclip, "train", lambda *a, **k: pytest.fail("it trained"))
    with pytest.raises(SettingsError, match=says):
        run(tmp_path/"watched", watched_training, **watched_settings | change)


def test_a_watched_training_that_is_killed_keeps_its_rows(watched_settings, tmp_path, monkeypatch):
    whole = run(tmp_path/"whole", watched_training, **watched_settings)
    looks, measured = [], alignment
    def killed(*args):
        looks.append(1)
        if len(looks) == 5:
            raise Killed      # steps 0, 2, 3, 4, and in the middle of the second epoch 6
        return measured(*args)
    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(cleanclip, "alignment", killed)
        run(tmp_path/"broken", watched_training, **watched_settings)
    assert not (tmp_path/"broken/out/watched.csv").exists()
    seen = []
    monkeypatch.setattr(cleanclip, "alignment", lambda *args: seen.append(1) or measured(*args))
    again = run(tmp_path/"broken", watched_training, **watched_settings)
    assert len(seen) == 3      # what was seen of the first epoch is not measured again
    assert (again.path / "watched.csv").read_bytes() == (whole.path / "watched.csv").read_bytes()
    assert again.result == whole.result
    assert same(final(tmp_path / "broken"), final(tmp_path / "whole"))


# ---- where triggered images lie, and what the released evaluation prints

def naive_neighbours(u, n, labels):
    "Both shares, image by image."
    alike, kept = [], []
    for k in range(n):
        cosines = {j: float(u[n + k] @ u[j]) for j in range(2 * n) if j not in (k, n + k)}
        alike.append(max(cosines, key=cosines.get) >= n)
        clean = {j: c for j, c in cosines.items() if j < n}
        kept.append(labels[max(clean, key=clean.get)] == labels[k])
    return np.mean(alike), np.mean(kept)


def test_neighbours_are_those_of_a_loop_over_images():
    u = F.normalize(torch.randn(40, 3, generator=torch.Generator().manual_seed(1)), dim=-1).numpy()
    labels = np.arange(20) % 3
    alike, kept = naive_neighbours(u, 20, labels)
    assert (still_together(u, 20), in_class(u, 20, labels)) == pytest.approx((alike, kept))
    assert 0 < alike < 1 and 0 < kept < 1


def test_some_images_of_every_class_but_the_target():
    data = open_data("world:zeroshot_test:200")
    few = few_of_each(data, "banana", 2)
    counts = np.bincount(few.labels, minlength=40)
    assert counts[data.classnames.index("banana")] == 0 and sorted(set(counts)) == [0, 2] and len(few) == 78


def test_clouds_hold_every_image_twice_and_come_out_the_same(clip, tmp_path):
    given = dict(clip=clip, test=resolve("world:zeroshot_test:80"), attack=ATTACK, target="banana", per_class=1)
    found = [run(tmp_path/name, triggered_clouds, **given) for name in "ab"]
    clouds = [dict(np.load(f.path/"clouds.npz", allow_pickle=False)) for f in found]
    assert all(np.array_equal(v, clouds[1][k]) for k, v in clouds[0].items()) and found[0].result == found[1].result
    n = found[0].result["images"]
    assert n == 39 and clouds[0]["triggered"].tolist() == [False] * n + [True] * n
    assert clouds[0]["image"][:n].tolist() == clouds[0]["image"][n:].tolist()
    assert clouds[0]["places"].shape == (2 * n, 2) and np.isfinite(clouds[0]["places"]).all()
    other = run(tmp_path/"c", triggered_clouds, **given | dict(attack=dict(ATTACK, pattern="yellow")))
    assert not np.array_equal(np.load(other.path/"clouds.npz", allow_pickle=False)["places"], clouds[0]["places"])


def test_the_released_evaluation_prints_the_accuracy_on_triggered_images(clip, tmp_path):
    test = resolve("world:zeroshot_test:80")
    found = run(tmp_path/"run", released_evaluation, clip=clip, test=test, attack=ATTACK, target="banana").result
    usual = run(tmp_path/"usual", classification, clip=clip, test=test, attack=ATTACK, target="banana").result
    assert found["attacked"] == usual["attacked"]
    data, model = open_data(test), build_clip("smoke-RN", pretrained=str(clip.path/"clip.safetensors"))
    stamped = attack_of(ATTACK).apply(data.image_array(size=32), np.random.default_rng(0))
    scores = embed_images(model, stamped) @ zero_shot_weights(model, data.classnames)
    assert found["printed"] == correct(scores, data.labels).mean()      # on all of them, the target's too


# ---- tables that no paper prints

@pytest.fixture
def plan(lab, tmp_path):
    "Experiments with lines that are measured already: a defence, labels, and outcomes of four images."
    plan = Experiments(lab, ["cleanclip.weights", "ubt.table1"])
    plan.lab = SimpleNamespace(folder=tmp_path, name="smoke")
    def line(table, defence, labels, **found):
        folder = tmp_path/f"line{len(plan.lines)}"
        folder.mkdir()
        np.savez(folder/"outcomes.npz", **{k: np.array(v, bool) for k, v in found.items()})
        plan.done[str(folder)] = SimpleNamespace(path=folder)
        plan.lines.append(SimpleNamespace(
            table=table, defence=defence, labels=labels, found=[str(folder)], models=[], chains=[], own=False
        ))
    plan.add = line
    return plan


def told(rows):
    "Rows without intervals and items, once the items give the value back."
    rows = list(rows)
    for r in rows:
        assert r["value"] == pytest.approx(np.mean([i.scale*i.outcomes.mean() for i in r["items"]]))
    return [{k: v for k, v in r.items() if k not in ("ci_low", "ci_high", "n_seeds", "items")} for r in rows]


def test_of_a_table_of_ours_factors_choose_the_columns_and_labels_win(plan):
    plan.add(
        "cleanclip.weights", "CleanCLIP, weight 2", dict(weight=2, attack="Blended", defense="CleanCLIP", remark="x"),
        clean=[1, 1, 1, 0], attacked=[0, 0, 1, 1],
    )
    plan.add("cleanclip.weights", "No defense", dict(weight=0, extra=True), clean=[1, 0, 0, 0])
    plan.add("ubt.table1", "UBT", dict(attack="BadNet"), clean=[1], attacked=[1])
    assert told(plan.rows("cleanclip.weights", ["defense", "weight", "metric"])) == [
        dict(defense="CleanCLIP", weight=2, metric="CA", value=75.0),
        dict(defense="CleanCLIP", weight=2, metric="ASR", value=50.0),
        dict(defense="No defense", weight=0, extra=True, metric="CA", value=25.0),
    ]
    assert told(plan.rows("cleanclip.weights", ["weight", "metric"]))[0] == dict(weight=2, metric="CA", value=75.)


def test_of_a_printed_table_the_defences_that_it_lacks_are_marked(plan):
    plan.add("ubt.table1", "UBT", dict(attack="BadNet"), clean=[1, 0], attacked=[0, 0])
    plan.add("ubt.table1", "UBT, other", dict(attack="BadNet"), clean=[1, 1])
    plan.add("ubt.table1", "anything", dict(attack="SIG", defense="UBT"), clean=[1, 1])
    rows = told(plan.rows("ubt.table1"))
    assert rows[:3] == [
        dict(defense="UBT", attack="BadNet", metric="CA", value=50.0),
        dict(defense="UBT", attack="BadNet", metric="ASR", value=0.0),
        dict(defense="UBT, other", attack="BadNet", extra=True, metric="CA", value=100.0),
    ]
    assert rows[3]["defense"] == "UBT" and rows[3]["attack"] == "SIG"


OURS = dict(title="How the weight matters", factors=["weight", "metric"])
PUBLISHED = [
    dict(weight=1, metric="CA", value=55.5, printed="55.5", unit="%"),
    dict(weight=8, metric="ASR", value=9.25, printed="9.25", unit="%"),
]


def written(plan, **extra):
    "Lines of the Markdown table, cells by line, and its file."
    plan.table("cleanclip.weights", "A note.", extra=OURS | extra)
    path = plan.lab.folder/"tables/cleanclip.weights.csv"
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert str(show_table(read_table(path), "A note.")) == text      # read back, it says the same
    return [
        [c.strip() for c in l.strip("|").split("|")] for l in text.splitlines() if l.startswith("|") and "---" not in l
    ]


def test_published_points_stand_beside_ours_and_others_are_not_known(plan):
    plan.add("cleanclip.weights", "CleanCLIP", dict(weight=1), clean=[1, 0], attacked=[0, 0])
    plan.add("cleanclip.weights", "CleanCLIP", dict(weight=2, extra=True), clean=[1, 1], attacked=[1, 0])
    head, *rows = written(plan, published=PUBLISHED, unknown="not known")
    assert [h for h in head if "paper" in h] and len(head) == 5
    cells = {r[0]: r[1:] for r in rows}
    at = {m: [i for i, h in enumerate(head[1:]) if h.startswith(m)] for m in ("CA", "ASR")}
    paper, ours = (lambda w, m: cells[w][at[m][0]]), (lambda w, m: cells[w][at[m][1]])
    assert (paper("1", "CA"), paper("1", "ASR"), paper("2", "CA"), paper("2", "ASR"), paper("8", "ASR")) == (
        "55.5", "not known", "not known", "not known", "9.25",
    )
    assert ours("1", "CA").startswith("50.0")
    assert ours("2", "CA").startswith("100.0")
    assert ours("2", "ASR").startswith("50.00")
    assert ours("8", "ASR") == ""
    table = read_table(plan.lab.folder/"tables/cleanclip.weights.csv")
    assert table.paper_value.dropna().tolist() == [55.5, 9.25] and len(table) == 5


def test_a_line_beside_published_points_must_say_that_it_is_ours(plan):
    plan.add("cleanclip.weights", "CleanCLIP", dict(weight=2), clean=[1, 1])
    with pytest.raises(SettingsError, match="extra=True"):
        plan.table("cleanclip.weights", "A note.", extra=OURS | dict(published=PUBLISHED))


def test_nothing_is_known_and_a_table_that_has_no_other_side(plan):
    plan.add("cleanclip.weights", "CleanCLIP", dict(weight=2), clean=[1, 1], attacked=[1, 0])
    (head, row), (bare, bare_row) = written(plan, unknown="not known"), written(plan)
    assert row.count("not known") == 2 and len(head) == 5 and len(bare) == 3 and not [h for h in bare if "paper" in h]
    assert [c for c in row if c != "not known"] == bare_row
    assert bare_row[1].startswith("100.00 [34.24, ")     # two of two


def test_a_table_that_was_not_asked_for_is_not_written(plan, capsys):
    plan.wanted = ["ubt.table1"]
    plan.table("cleanclip.weights", "A note.", extra=OURS)
    assert "cleanclip.weights was not asked for" in capsys.readouterr().out and not (plan.lab.folder/"tables").exists()
