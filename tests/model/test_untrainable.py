"Trainings that cannot learn are refused before any long work, everywhere, with the counts and what to do."
from dataclasses import replace

import numpy as np
import pytest

from mcl_repro.cli.main import main
from mcl_repro.core.errors import DataError, SettingsError
from mcl_repro.data.pairs import ArrayImages, Pairs
from mcl_repro.data.registry import open_data
from mcl_repro.model.clip import build_clip
from mcl_repro.model.training import check_batch, check_differences, Recipe, train, training_set
from mcl_repro.tools.protecting import numbers_of
from mcl_repro.tools.repairing import METHODS, repair

RECIPE = Recipe(epochs=2, batch_size=4, learning_rate=1e-3)


def pairs(count, captions=None, same=False):
    pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    if same:
        pixels[:] = pixels[:1]
    captions = captions or [f"picture number {n}" for n in range(count)]
    return Pairs([str(n) for n in range(count)], captions, ArrayImages(pixels))


@pytest.mark.parametrize("count, batch, says", [
    (0, 4, "there is no pair to train on"),
    (1, 4, "1 pair alone has nothing to be compared with: give at least 2 pairs"),
    (8, 1, "batch_size: a pair alone has nothing to be compared with; give at least 2"), (1, 1, "a pair alone"),
])
def test_the_loop_refuses_a_pair_alone_and_changes_nothing(count, batch, says):
    clip, data = build_clip("smoke-RN"), training_set(build_clip("smoke-RN"), pairs(2))
    data.tokens, data.image_rows = data.tokens[:1].repeat(count, 1), data.image_rows[:1].repeat(count)
    before = clip.model.logit_scale.detach().clone()
    with pytest.raises(SettingsError, match=says):
        train(clip, data, replace(RECIPE, batch_size=batch))
    assert clip.model.logit_scale == before


def test_two_pairs_and_a_set_smaller_than_a_batch_are_trained_on_as_before():
    clip = build_clip("smoke-RN", seed=1)
    for count in (2, 3):
        assert 0 < train(clip, training_set(clip, pairs(count)), RECIPE)[-1]["loss"] < 20


@pytest.mark.parametrize("setting, value, says", [
    ("epochs", 0, "epochs must be positive, not 0"), ("epochs", 1.5, "epochs must be a whole number, not 1.5"),
    ("epochs", float("inf"), "epochs must be positive, not inf"), ("batch_size", -4, "batch_size must be positive"),
    ("learning_rate", 0, "learning_rate must be positive, not 0"), ("learning_rate", -1e-3, "must be positive"),
    ("learning_rate", float("nan"), "learning_rate must be positive, not nan"),
    ("learning_rate", float("inf"), "learning_rate must be positive, not inf"),
    ("weight_decay", float("nan"), "weight_decay must be 0 or more, not nan"), ("weight_decay", -.1, "0 or more"),
    ("warmup_steps", -1, "warmup_steps must be 0 or more, not -1"),
])
def test_numbers_that_cannot_work(setting, value, says):
    with pytest.raises(SettingsError, match=says):
        replace(RECIPE, **{setting: value})


def test_a_batch_that_the_set_cannot_fill_and_a_warm_up_without_end():
    check_batch(4, RECIPE, whole=True)
    with pytest.raises(SettingsError, match="3 pairs are fewer than a batch of 4: give .* at most 3, or more pairs"):
        check_batch(3, RECIPE, whole=True)
    with pytest.warns(UserWarning, match="the training has 4 steps and its warm-up 50, so the learning rate never"):
        check_batch(8, replace(RECIPE, warmup_steps=50), whole=True)


@pytest.mark.parametrize("data, says", [
    (pairs(5, ["a dog"] * 5), "the captions of all 5 pairs are the same"),
    (pairs(5, same=True), "the pictures of all 5 pairs are the same"),
    (pairs(5).replace(image_rows=np.zeros(5, int)), "the pictures of all 5 pairs are the same"),
])
def test_nothing_to_tell_apart(data, says):
    with pytest.raises(DataError, match=says):
        check_differences(training_set(build_clip("smoke-RN"), data))


def test_one_pair_that_differs_is_enough():
    check_differences(pairs(5, ["a dog"] * 4 + ["a cat"]))
    check_differences(training_set(build_clip("smoke-RN"), pairs(5, ["a dog"] * 4 + ["a cat"])))


@pytest.mark.parametrize("method", ["finetune", "cleanclip", "ubt", "cfbd"])
@pytest.mark.parametrize("batch, says", [(1, "a pair alone"), (500, "pairs are fewer than a batch of 500: give a")])
def test_repair(method, batch, says):
    data, clip = open_data("world:train:400"), build_clip("smoke-RN")
    given = {name: data for name in METHODS[method].needs if name in ("pairs", "trusted")}
    given |= dict(reference=clip) if "reference" in METHODS[method].needs else {}
    with pytest.raises(SettingsError, match=says):
        repair(clip, given.pop("pairs", None), method, recipe=dict(batch_size=batch), **given)


def test_repair_of_pairs_that_are_all_the_same():
    with pytest.raises(DataError, match="the captions of all .* pairs are the same"):
        repair(build_clip("smoke-RN"), pairs(20, ["a dog"] * 20), "finetune")


def test_protect():
    clip = build_clip("smoke-RN")
    for batch, says in ((1, "a pair alone"), (41, "40 pairs are fewer than a batch of 41")):
        with pytest.raises(SettingsError, match=says):
            numbers_of(clip, 40, recipe=dict(batch_size=batch))
    assert numbers_of(clip, 40).recipe.batch_size <= 40


@pytest.mark.parametrize("count, options, says", [
    (1, [], "1 pair alone has nothing to be compared with"),
    (3, ["--batch-size", "1"], "argument --batch-size: '1' is not a whole number from 2"),
    (3, [], "3 pairs are fewer than a batch of 128"),
    (3, ["--batch-size", "2", "--epochs", "0"], "argument --epochs: '0' is not a whole number from 1"),
    (3, ["--batch-size", "2", "--learning-rate", "nan"], "argument --learning-rate: 'nan' is not a number above 0"),
])
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_the_command_train(tmp_path, capsys, count, options, says, dry):
    from PIL import Image
    lines = ["image,caption"]
    for n in range(count):
        Image.new("RGB", (32, 32), (80 * n, 9, 9)).save(tmp_path/f"{n}.png")
        lines.append(f"{n}.png,shade {n}")
    (tmp_path/"pairs.csv").write_text("\n".join(lines) + "\n")
    out = str(tmp_path/"o.safetensors")
    words = ["train", str(tmp_path/"pairs.csv"), "--model", "smoke-RN", "--out", out, *options]
    assert main(words + dry) == 1
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said and not list(tmp_path.glob("o.*"))
