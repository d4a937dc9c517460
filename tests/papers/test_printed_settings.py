"""Every printed setting has exactly one carrier here, profile paper says what the papers say, and what does not is
caught and named.
"""
import copy
import re
from importlib import resources

import pytest
import yaml

from mcl_repro.core.libraries import import_open_clip
from mcl_repro.model.clip import imagenet_templates, model_config
from mcl_repro.data.registry import read_manifest, READERS
from mcl_repro.core.errors import SettingsError
from mcl_repro.papers.plan import Experiments
from mcl_repro.lab.lab import Lab
from mcl_repro.lab.profiles import load_profile
from mcl_repro.papers.mem import Search
from mcl_repro.papers.printed_settings import count_settings, read_settings, settings_table, value_at, VERDICTS
from mcl_repro.model.training import Recipe

PACKAGE = resources.files("mcl_repro")
PRINTED = yaml.safe_load((PACKAGE/"report/papers/tables.yaml").read_text(encoding="utf-8"))["settings"]
OURS = (PACKAGE/"papers/printed_settings.yaml").read_text(encoding="utf-8")
ENTRIES = yaml.safe_load(OURS)
PAPER = load_profile("paper")
READ = read_settings()
TABLE = settings_table(PAPER, READ)


def entry(printed):
    return ENTRIES[printed["paper"]][printed["name"]]


# ---- all of them, once

def test_every_printed_setting_stands_in_the_table_with_its_section_and_value():
    assert len(PRINTED) == 131
    assert list(zip(TABLE.paper, TABLE.setting, TABLE.section)) == [
        (p["paper"], p["name"], str(p["section"])) for p in PRINTED
    ]
    assert count_settings(TABLE)["all"].sum() == 131 and set(TABLE.how) == {"equal", "built in", *VERDICTS}
    for p, shown in zip(PRINTED, TABLE.printed):
        first = p["value"][0] if isinstance(p["value"], list) else p["value"]
        if p["value"] is None:
            assert shown == ""
        elif isinstance(first, (int, float)):
            assert float(shown.split()[0].rstrip(",")) == first
        else:
            assert str(first) in shown


def changed(tmp_path, change):
    "The entries with a change, as a file."
    new = change(OURS)
    assert new != OURS
    path = tmp_path/"settings.yaml"
    path.write_text(new, encoding="utf-8")
    return path


EPOCHS = "{setting: ubt.overfit.epochs}"
EPOCHS_LINE = f"  overfitting epochs: {EPOCHS}\n"
WRONG = [   # old, new, what the error says
    (EPOCHS_LINE, "", "ubt: overfitting epochs has no entry"),
    ("  overfitting epochs:", "  overfitting rounds:", "ubt: overfitting rounds is not printed"),
    (EPOCHS_LINE, 2 * EPOCHS_LINE, "'overfitting epochs' stands twice"),
    (EPOCHS, "{setting: ubt.overfit.epochs, code: papers.ubt.ubt_overfit}",
     "exactly one of setting, role, code; found setting, code"),
    (EPOCHS, "{setting: ubt.overfit.epochs, differs: we like it}",
     "ubt, overfitting epochs: ubt.overfit.epochs does not differ from the printed 5"),
    (EPOCHS, "{setting: ubt.overfit.rounds}", "no setting 'ubt.overfit.rounds': there is no 'rounds'"),
    ("{code: papers.ubt.cartesian_pairs}", "{code: papers.ubt.all_pairs}", "no mcl_repro.papers.ubt.all_pairs"),
    ("{code: papers.ubt.cartesian_pairs}", "{code: ubt}", "there is no mcl_repro.ubt"),
    ("{setting: ubt.suspicious_share, read: percent}", "{setting: ubt.suspicious_share}",
     "the paper prints 1 .*is 0.01"),
]

@pytest.mark.parametrize("old, new, says", WRONG)
def test_a_wrong_entry_is_named(tmp_path, old, new, says):
    with pytest.raises(SettingsError, match=says):
        settings_table(entries=read_settings(changed(tmp_path, lambda t: t.replace(old, new, 1))))


def test_a_value_that_was_lost_needs_a_reason(tmp_path):
    reason = r"(share of data used as unlearn data:\n    setting: ubt.unlearn_count\n)    undetermined:.*\n"
    without = changed(tmp_path, lambda text: re.sub(reason, r"\1", text))
    says = "ubt, share of data used as unlearn data: no value is printed; say `undetermined`"
    with pytest.raises(SettingsError, match=says):
        settings_table(entries=read_settings(without))


# ---- equal is equal

def is_plain(printed):
    "Whether a setting is one number that stands in the profile as it is."
    ours = entry(printed)
    one_path = set(ours) == {"setting"} and isinstance(ours["setting"], str)
    return one_path and isinstance(printed["value"], (int, float))

PLAIN = [p for p in PRINTED if is_plain(p)]
SAID_TO_BE_EQUAL = [p for p in PRINTED if "setting" in entry(p) and not set(VERDICTS) & set(entry(p))]

def test_numbers_of_the_profile_are_the_printed_ones_by_a_second_reading():
    assert len(PLAIN) > 25
    for p in PLAIN:
        assert value_at(PAPER, entry(p)["setting"]) == p["value"], p


@pytest.mark.parametrize("printed", SAID_TO_BE_EQUAL, ids=lambda p: f"{p['paper']}, {p['name']}")
def test_every_setting_that_is_said_to_be_equal_is_missed_when_it_changes(printed):
    paths = entry(printed)["setting"]
    path = paths if isinstance(paths, str) else paths[-1]
    settings = copy.deepcopy(dict(PAPER))
    *above, last = path.split(".")
    at = settings
    for step in above:
        at[step] = dict(at[step])
        at = at[step]
    at[last] = another(at[last])
    says = "the paper prints .* make them equal or say why they differ|has no setting"
    with pytest.raises(SettingsError, match=says):
        settings_table(settings, READ)


def another(value):
    "Another value of the same kind, in every way that an entry can read it."
    if isinstance(value, dict):
        kept = list(value.items())[:-1]
        return {"another" if place == 0 else key: another(part) for place, (key, part) in enumerate(kept)}
    if isinstance(value, list):
        return [another(value[0]), *value[1:]]
    return value + " changed" if isinstance(value, str) else 3 * value


def test_another_data_set_or_size_is_missed_too():
    for role, source, says in [
        ("finetune", "cc3m:train:400000", "prints 500000"), ("zeroshot", "cifar10:test", "ImageNet1K"),
        ("mem_coco_train", "coco:train_karpathy", r"\[82783, 5000, 5000\]"),
    ]:
        with pytest.raises(SettingsError, match=says):
            settings_table(load_profile("paper", roles={role: source}), READ)


def test_what_is_not_printed_has_a_choice_and_a_reason():
    chosen = TABLE[TABLE.how.isin(VERDICTS)]
    assert len(chosen) == sum(bool(set(VERDICTS) & set(entry(p))) for p in PRINTED)
    assert (chosen.ours.str.len() > 0).all()
    assert (chosen.reason.str.len() > 15).all()
    lost = {(p["paper"], p["name"]) for p in PRINTED if p["value"] is None}
    undetermined = chosen[chosen.how == "undetermined"]
    assert len(lost) == 8 and lost <= set(zip(undetermined.paper, undetermined.setting))
    # names are words, no second place for numbers
    assert READ[0] and all(isinstance(v, str) for v in READ[0].values())


# ---- the profile as a whole

def test_models_are_the_papers_at_224_pixels_with_the_activation_of_their_weights():
    public = {
        PAPER.model.name: "ViT-B-32",
        PAPER.papers.cfbd.model.name: "RN50",
        **dict(zip(PAPER.mem.faces.models.values(), ("RN50", "RN101", "ViT-B-32"))),
    }
    pretrained = import_open_clip().pretrained.get_pretrained_cfg
    for name, plain in public.items():
        config = model_config(name)
        assert config["vision_cfg"]["image_size"] == 224
        assert config["text_cfg"] == model_config(plain)["text_cfg"]
        assert config["vision_cfg"] == model_config(plain)["vision_cfg"]
        assert config.get("quick_gelu", False) == pretrained(name, "openai")["quick_gelu"]
    assert list(PAPER.mem.models.values()) == ["RN50", "RN101", "ViT-B-32"]
    assert PAPER.model.pretrained == PAPER.papers.cfbd.model.pretrained == "openai"


def test_a_paper_may_have_a_model_and_a_recipe_of_its_own(tmp_path, monkeypatch):
    def planned(paper, **given):
        lab = Lab("paper", "cpu", tmp_path, module=f"mcl_repro.papers.{paper}", settings=given)
        return Experiments(lab, [f"{paper}.table1"], attacks={"BadNet": "BadNet"})

    def recipe(plan):
        return plan.settings.finetune.epochs, plan.settings.finetune.learning_rate

    ubt, cfbd, mem, cleanclip = map(planned, ("ubt", "cfbd", "mem", "cleanclip"))
    assert [recipe(ubt), recipe(cleanclip), recipe(cfbd)] == [(3, 1e-6), (5, 1e-6), (5, 1e-5)]
    assert cleanclip.model == cfbd.model
    given = planned("cfbd", **{"model.name": "RN101", "finetune.epochs": 1})
    assert (given.model.name, recipe(given)) == ("RN101", (1, 1e-5))     # what is given is not overruled
    assert ubt.model.name == mem.model.name == "ViT-B-32-quickgelu" and cfbd.model.name == "RN50-quickgelu"
    assert ubt.image_size == cfbd.image_size == 224
    monkeypatch.setenv("MCL_REPRO_DATA", str(tmp_path/"nothing"))
    # public weights need no data
    assert (ubt.clean.settings["pretrained"], ubt.clean.settings["pairs"]) == ("openai", None)
    robust = [plan.settings.roclip.recipe for plan in (ubt, cfbd)]     # CFBD's, not printed, is the public code's
    assert [(r.epochs, r.batch_size, r.learning_rate) for r in robust] == [(24, 128, 1e-6), (24, 512, 5e-5)]
    for name in ("mini", "smoke"):
        small = load_profile(name)
        assert list(small.papers) == ["cfbd"] and {"roles", "poison", "roclip"} <= set(small.papers.cfbd)
        assert small.poison.checkpoints is None


def test_zero_shot_data_and_prompts():
    assert len(imagenet_templates()) == 80
    manifest = read_manifest()
    six = [PAPER.roles[f"zeroshot_{name.lower()}"] for name in PAPER.ubt.downstream_targets]
    assert six == ["cifar10:test", "cifar100:test", "caltech101:test", "dtd:test", "pets:test", "food101:test"]
    assert [manifest[s.split(":")[0]]["splits"]["test"]["classes"] for s in six] == [10, 100, 101, 47, 37, 101]


def test_every_role_is_a_split_that_the_manifest_can_read():
    manifest = read_manifest()
    for role, source in PAPER.roles.items():
        name, split = source.split(":")[:2]
        layouts = [layout for layout in manifest[name]["layouts"] if split in layout["splits"]]
        assert layouts and all(layout["format"] in READERS for layout in layouts), (role, source)


def recipes(block):
    "Every recipe in a block of a profile, at any depth."
    found = []
    for name, part in block.items():
        if isinstance(part, dict):
            is_recipe = name in ("recipe", "pretrain", "finetune", "overfit", "hacker")
            inner = [part] if is_recipe else recipes(part)
            found += [recipe for recipe in inner if {"epochs", "batch_size"} <= set(recipe)]
    return found


@pytest.mark.parametrize("profile", ["smoke", "mini", "paper"])
def test_recipes_and_searches_of_every_profile_are_ones(profile):
    settings = load_profile(profile)
    found = recipes(settings)
    assert len(found) >= 12 and all(Recipe(**{k: v for k, v in r.items() if k != "recipe"}) for r in found)
    for method in settings.mem.methods.values():
        assert Search(**{**settings.mem.protect.search, **method.get("search", {})})


def test_a_table_says_stand_in_where_data_or_settings_are_not_the_papers(tmp_path):
    def stands_in(profile, **kwargs):
        return Lab(profile, device="cpu", runs=tmp_path, **kwargs).stands_in

    harmless = {"finetune.precision": "fp32", "finetune.order": "streamed", "finetune.micro_batch": 32}
    assert stands_in("mini")
    assert not stands_in("paper")
    assert not stands_in("paper", settings=harmless)
    assert stands_in("paper", roles={"finetune": "world:train"})
    assert stands_in("paper", settings={"finetune.epochs": 1})
