"What stages cost: every stage says it, and some of it is counted by hand."
import importlib
import re

import pytest

from mcl_repro.data.registry import open_data, resolve
from mcl_repro.data.world import SPLITS
from mcl_repro.lab.costs import COSTS, model_facts, StageWork, work_of, WORLD_TOKENS
from mcl_repro.lab.lab import Lab
from mcl_repro.lab.profiles import PACKAGE
from mcl_repro.model.clip import build_clip
from mcl_repro.papers.baselines import abl
from mcl_repro.papers.cfbd import cfbd_detect, mapping_network
from mcl_repro.papers.cleanclip import cleaned_clip
from mcl_repro.papers.mem import hacker_clip, unlearnable_pairs
from mcl_repro.papers.scan_sets import pair_embeddings
from mcl_repro.papers.stages import (
    classification, clean_clip, divergence, finetuned_clip, poisoned_pairs, retrieval, trojan_trigger,
)
from mcl_repro.papers.ubt import ubt_overfit, ubt_select, ubt_split

RN = "smoke-RN"
PAIRS, IMAGES = resolve("world:train:400"), resolve("world:zeroshot_test:100")
RECIPE = dict(epochs=2, batch_size=64, learning_rate=1e-3)
BADNETS = dict(name="badnets", pattern="checker")


@pytest.fixture
def lab(tmp_path):
    return Lab("smoke", device="cpu", runs=tmp_path)


@pytest.fixture
def clean(lab):
    return lab.node(clean_clip, model=RN, pairs=PAIRS, recipe=RECIPE)


@pytest.fixture
def poisoned(lab):
    return lab.node(poisoned_pairs, pairs=PAIRS, attack=BADNETS, target="banana", count=10, image_size=32)


@pytest.fixture
def victim(lab, clean, poisoned):
    return lab.node(finetuned_clip, clip=clean, poisoned=poisoned, recipe=RECIPE)


@pytest.fixture
def amounts(lab):
    "The amounts of a stage with some settings."
    return lambda stage, **settings: work_of(lab.node(stage, **settings)).amounts


def test_every_stage_of_the_library_says_what_it_costs():
    found = set()
    for path in PACKAGE.rglob("*.py"):
        names = re.findall(r"^@stage\ndef (\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE)
        found |= {f"{path.stem}.{name}" for name in names}
        if names:
            parts = path.relative_to(PACKAGE).with_suffix("").parts
            importlib.import_module(".".join(["mcl_repro", *parts]))
    told = {name for name, cost in COSTS.items() if cost.__module__.startswith("mcl_repro.")}     # not those of scripts
    assert len(found) > 30 and found == told


def test_training_and_what_it_leaves(victim):
    work = work_of(victim)     # 400 pairs in batches of 64: 6 steps an epoch
    assert work.amounts == {("draw", RN): 400, ("train", RN): 2 * 6 * 64, ("step", RN): 12, ("load", RN): 2}
    assert work.steps == {(RN, 64, "auto")} and work.pictures == 400 * 3 * 32**2
    facts = model_facts(RN)      # rows of the token table that no caption of the world has are not kept again
    assert work.kept == 4 * (facts.parameters - (facts.tokens - WORLD_TOKENS) * facts.token_width)
    with pytest.raises(ValueError, match="'jump'"):
        StageWork().add("jump", 1)


def test_a_step_in_parts_holds_a_part_and_goes_forward_twice(lab, clean, poisoned):
    whole, parts = (work_of(lab.node(finetuned_clip, clip=clean, poisoned=poisoned, recipe=dict(RECIPE, **more)))
                    for more in ({}, dict(micro_batch=16)))
    assert parts.steps == {(RN, 16, "auto")}
    assert parts.amounts["train", RN] == whole.amounts["train", RN] * 4 // 3


def test_public_weights_are_only_read_and_a_clean_set_is_left_as_it_is(amounts):
    assert amounts(clean_clip, model="RN50", pretrained="openai", checksum=None) == {("load", "RN50"): 2}
    assert amounts(poisoned_pairs, pairs=PAIRS, attack=None, target="banana", count=0, image_size=32) == {}


def test_measurements(amounts, clean, victim):
    found = amounts(classification, clip=victim, test=IMAGES, attack=BADNETS, target="banana")
    assert found["image", RN] == 2 * 100     # with and without the trigger
    assert found["text", RN] == 80 * 40      # 80 prompts for each of 40 classes
    gallery = resolve("world:retrieval_flickr8k:10")
    goal = dict(target_caption="a photo of a banana", target="banana")
    found = amounts(retrieval, clip=victim, test=gallery, attack=None, **goal)
    assert (found["image", RN], found["text", RN]) == (10, 50)
    assert amounts(divergence, clip=victim, reference=clean, test=IMAGES)["text", RN] == 2 * 80 * 40


def test_a_trigger_that_is_optimised(amounts, clean):
    found = amounts(trojan_trigger, clip=clean, pairs=PAIRS, steps=10, batch_size=32, image_count=100, held_out=50)
    assert (found["image_gradient", RN], found["image", RN], found["draw", RN]) == (320, 5 * 150, 150)


def test_ubt_overfits_on_mixed_batches_and_may_ask_after_each_epoch_whether_to_end(lab, amounts, clean, poisoned):
    split = lab.node(ubt_split, clip=clean, poisoned=poisoned, share=.1)
    shared = dict(clip=clean, poisoned=poisoned, split=split)
    found = amounts(ubt_overfit, recipe=dict(RECIPE, epochs=1), **shared)
    assert (found["step", RN], found["train", RN], found.get(("image", RN))) == (400 // 64, 400 // 64 * 64, None)
    found = amounts(ubt_overfit, recipe=dict(RECIPE, epochs=1), normal=100, **shared)
    assert found["train", RN] == 140 // 64 * 64     # 40 are suspicious
    found = amounts(ubt_overfit, recipe=dict(RECIPE, epochs=3), until=.8, **shared)
    assert (found["image", RN], found["text", RN]) == (3 * 40, 3 * 40)
    overfitted = lab.node(ubt_overfit, recipe=RECIPE, **shared)
    found = amounts(ubt_select, overfitted=overfitted, poisoned=poisoned, split=split, count=8)
    assert (found["image", RN], found["text", RN], found["image_gradient", RN]) == (400, 400, 8)


def test_the_self_supervised_term_doubles_training(amounts, victim):
    recipe = dict(RECIPE, epochs=1)
    shared = dict(clip=victim, pairs=PAIRS, recipe=recipe)
    both, alone = (amounts(cleaned_clip, self_supervised_weight=weight, **shared) for weight in (1., 0.))
    assert (both["train", RN], alone["train", RN]) == (6 * 128, 6 * 64)
    assert both["augment", RN] == 400 and ("augment", RN) not in alone


def test_abl_looks_at_all_pairs_and_trains_on_them_or_for_an_ascent_on_the_rest(amounts, victim, poisoned):
    given = dict(clip=victim, poisoned=poisoned, recipe=RECIPE, share=.1, isolated_batch=4)
    all_of_them, rest = amounts(abl, **given), amounts(abl, unlearning="ascent", **given)
    assert all_of_them["image", RN] == rest["image", RN] == 400
    assert (all_of_them["step", RN], rest["step", RN]) == (2 * (400 // 64), 2 * (360 // 64))
    assert all_of_them["train", RN] == all_of_them["step", RN] * 64
    assert rest["train", RN] == rest["step", RN] * (64 + 4)


def test_detection_is_matrix_products(lab, amounts, clean, poisoned):
    gflop = amounts(mapping_network, clip=clean, pairs=PAIRS, hidden=64, epochs=3)["gflop", ""]
    assert gflop == pytest.approx(6 * 2 * 3 * 400 * 32 * 64 / 1e9)     # two layers, forward and twice as much backward
    mapping = lab.node(mapping_network, clip=clean, pairs=PAIRS, hidden=64)
    found = amounts(cfbd_detect, clip=clean, poisoned=poisoned, mapping=mapping, q=8)
    assert (found["image", RN], found["text", RN], found["mixture", ""]) == (400, 400, 400)
    found = amounts(pair_embeddings, clip=clean, pairs=PAIRS)
    assert [found[kind, RN] for kind in ("image", "text", "load")] == [400, 400, 1]


def test_mem_searches_triggers_in_the_first_rounds(amounts):
    search = dict(length=3, candidates=16, noise_steps=8, text_rounds=1)
    recipe = dict(RECIPE, epochs=5)
    found = amounts(unlearnable_pairs, pairs=PAIRS, model=RN, search=search, recipe=recipe, round_steps=6)
    assert (found["image_gradient", RN], found["train", RN]) == (5 * 8 * 400, 5 * 6 * 64)
    assert found["variant", RN] == 3 * 17 * 400
    assert amounts(hacker_clip, pairs=PAIRS, model=RN) == {("load", RN): 2}     # the row Random trains nothing


def test_the_world_has_as_many_tokens_as_its_models_are_thought_to_keep():
    seen = set()
    for name, split in SPLITS.items():
        if split.kind != "labelled":
            captions = list(open_data(f"world:{name}").captions)
            seen |= set(build_clip(RN).tokenizer(sorted(set(captions))).unique().tolist())
    assert len(seen) <= WORLD_TOKENS < 1.1 * len(seen)
