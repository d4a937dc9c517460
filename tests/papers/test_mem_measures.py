"What MEM's tables and figures read: the same as without stages, and nothing that a stage did not look at."
from types import SimpleNamespace

import numpy as np
import pytest

from mcl_repro.attacks.protection import drawable_text, Protection, save_protection
from mcl_repro.data.registry import open_data, resolve
from mcl_repro.lab.lab import Lab
from mcl_repro.measures.metrics import bootstrap_interval, median_rank
from mcl_repro.model.clip import build_clip, save_clip
from mcl_repro.papers.mem_measures import (
    attention, drawn_together, hacker_ranks, kept_estimate, published_examples, rank_cell, rank_difference,
    rows_of_pictures, shortcut, versions,
)
from mcl_repro.papers.stages import arrays, outcomes, retrieval

DATA = "world:retrieval_flickr8k_train:24"


def left(folder, **result):
    return SimpleNamespace(path=folder, result=result)


def run(folder, stage, **given):
    folder.mkdir()
    return left(folder, **stage(SimpleNamespace(out=folder, device="cpu"), **given))


@pytest.fixture(scope="module")
def data():
    return resolve(DATA)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = []
    for seed in range(2):
        folder = tmp_path_factory.mktemp("model")
        save_clip(build_clip("smoke-RN", seed=seed), folder/"clip.safetensors")
        made.append(left(folder, model="smoke-RN"))
    return made


def protected(folder, data, noise=None):
    folder.mkdir()
    pairs, draw = open_data(data), np.random.default_rng(0)
    noise = np.zeros((len(pairs), 32, 32, 3), np.int8) if noise is None else noise
    made = Protection(pairs.ids, noise, draw.integers(1000, 4000, (len(pairs), 3)))
    np.save(folder/"noise.npy", made.noise)
    save_protection(folder, made.ids, made.triggers, made.bound, dict(method="drawn"))
    return left(folder)


# ---- ranks

def test_ranks_are_those_that_other_papers_measure(tmp_path, models, data):
    ours = run(tmp_path/"ours", hacker_ranks, clip=models[0], test=data)
    theirs = run(tmp_path/"theirs", retrieval, clip=models[0], test=data, attack=None, target_caption="", target="")
    for way, ranks in outcomes(ours).items():
        assert np.array_equal(ranks, outcomes(theirs)[way])
        for metric in ("hit10", "medr"):
            assert ours.result[f"{way}_{metric}"] == theirs.result[f"{way}_{metric}"]


def test_kept_intervals_are_those_of_the_bootstrap(tmp_path, models, data):
    found = run(tmp_path/"ranks", hacker_ranks, clip=models[0], test=data)
    for way, ranks in outcomes(found).items():
        groups = drawn_together(outcomes(found), way)
        assert (groups is None) == (way == "image_to_text")
        assert kept_estimate(found, way, "Medr") == bootstrap_interval(ranks, median_rank, count=1000, groups=groups)
        assert kept_estimate(found, way, "Hit@10") == bootstrap_interval((ranks < 10).astype(float), groups=groups)


def test_a_cell_is_over_seeds_and_keeps_what_it_was_made_from(tmp_path, models, data):
    found = [run(tmp_path/f"{k}", hacker_ranks, clip=model, test=data) for k, model in enumerate(models)]
    cell = rank_cell(found, "text_to_image", "Hit@10")
    values = [artefact.result["text_to_image_hit10"] for artefact in found]
    assert (cell["unit"], cell["n_seeds"], cell["value"]) == ("%", 2, pytest.approx(100 * np.mean(values), abs=1e-3))
    assert [items.scale for items in cell["items"]] == [100, 100] and len(cell["items"][0].outcomes) == 120


def test_a_difference_is_of_the_same_queries(tmp_path, models, data):
    found = [run(tmp_path/f"{k}", hacker_ranks, clip=model, test=data) for k, model in enumerate(models)]
    differences = rank_difference(SimpleNamespace(), found=found[1], clean=found[0])
    for way, (value, low, high) in differences.items():
        assert value == found[1].result[f"{way}_medr"] - found[0].result[f"{way}_medr"]
        assert low <= value <= high and low < high


# ---- what figures look at

def test_without_noise_another_picture_is_another_picture(tmp_path, models, data):
    bare = run(tmp_path/"bare", shortcut, clip=models[0], pairs=data, protection=protected(tmp_path/"p", data), shown=9)
    ranks = arrays(bare, "shortcut")
    assert len(set(ranks["noise alone"])) == 24     # grey pictures are all the same: every text is somebody's
    assert ranks["places"].shape == (2, 9, 2) and bare.result["texts"] == 24
    alone = run(tmp_path/"alone", shortcut, clip=models[0], pairs=data, shown=9, count=20)
    assert set(alone.result) == {"texts", "clean picture"} and alone.result["texts"] == 20


def test_the_example_is_a_short_caption_with_something_to_see_or_what_was_given(tmp_path, models, data):
    plain = run(tmp_path/"plain", attention, clip=models[0], test=data)
    assert 6 <= len(plain.result["caption"].split()) <= 9
    other = run(tmp_path/"other", attention, clip=models[1], test=data, example=left(tmp_path, example=5))
    assert other.result["example"] == 5 and other.result["words"] == other.result["caption"].split()
    assert arrays(other, "example")["picture"].shape == (224, 224, 3)
    few = run(tmp_path/"few", attention, clip=models[1], test=data, count=4)
    assert few.result["pairs"] == 4 and {len(x) for x in outcomes(few).values()} == {4}


def test_attention_with_a_trigger_is_spread_over_more_words(tmp_path, models, data):
    given = dict(clip=models[0], test=data)
    plain = run(tmp_path/"plain", attention, **given)
    made = protected(tmp_path/"p", data)
    triggered = run(tmp_path/"triggered", attention, protection=made, example=plain, **given)
    words = [outcomes(found)["an even spread"] for found in (plain, triggered)]
    assert np.allclose(3 / words[1], 3 / words[0] + 3) and len(triggered.result["words"]) == len(
        plain.result["words"]) + 3


def test_versions_are_of_pictures_with_enough_captions(tmp_path, models, data):
    pairs = open_data(data)
    assert [len(group) for group in rows_of_pictures(pairs, 3, 4)] == [4, 4, 4]
    assert rows_of_pictures(pairs, 3, 6) == []
    for protection in (None, protected(tmp_path/"p", data)):
        found = run(tmp_path/f"{protection is None}", versions, clip=models[0], pairs=data, pictures=3, each=9,
                    protection=protection)
        assert found.result == dict(pictures=3, versions=5)
        same = arrays(found, "likeness")["versions of a picture"]
        assert np.allclose(same, 1, atol=1e-4) == (protection is not None)      # no noise: the versions are one picture


# ---- what was published

def test_examples_can_be_drawn_unless_rows_are_named(tmp_path, data):
    made = protected(tmp_path/"p", data, np.random.default_rng(1).integers(-8, 9, (120, 32, 32, 3), np.int8))
    given = dict(pairs=data, protection=made, model="smoke-RN")
    some = run(tmp_path/"some", published_examples, **given)
    assert all(drawable_text(text) == text for text in some.result["triggers"]) and len(some.result["captions"]) <= 4
    named = run(tmp_path/"named", published_examples, rows=[3, 1], **given)
    assert named.result["captions"] == [open_data(data).captions[k] for k in (3, 1)]
    assert np.array_equal(arrays(named, "pictures")["noise"], np.load(made.path/"noise.npy")[[3, 1]])


def test_every_stage_says_what_it_costs(tmp_path):
    from mcl_repro.lab.costs import work_of
    from mcl_repro.papers.mem import mem_plan
    for profile in ("smoke", "mini"):
        lab = Lab(profile, "cpu", tmp_path, progress=False, module="mcl_repro.papers.mem")
        works = {node.stage.name: work_of(node) for node in mem_plan(lab, lab.profile).nodes}
        assert len(works) == 10 and all(work is not None and work.amounts for work in works.values())
