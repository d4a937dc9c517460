"""Own attacks and defences: what is refused, what a check finds, packages good and broken, and the comparison that goes
on after a kill.
"""
import random
import sys
import warnings
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch

from mcl_repro.tools import plugins as P
from mcl_repro.attacks.base import Attack, ATTACKS, BadNets
from mcl_repro.data.registry import open_data
from mcl_repro.core.errors import DataError, SettingsError, UserError
from mcl_repro.tools.measuring import attack, load_attack, measure
from mcl_repro.tools.repairing import Method, METHODS, repair
from mcl_repro.model.training import train


@pytest.fixture(autouse=True)
def tables_as_before():
    "What a test registers is gone after it."
    before = dict(ATTACKS), dict(METHODS), list(P._loaded)
    yield
    for table, was in zip((ATTACKS, METHODS), before):
        table.clear()
        table.update(was)
    P._loaded[:] = before[2]

frozen = dataclass(frozen=True)

def make_attack_class(name="stripes", module=__name__, **more):
    "A fresh class of an attack that works."
    def paint(self, images, rng):
        images[:, ::4] = 255
        return images
    cls = type("Stripes", (Attack,), dict(name=name, uses_rng=False, paint=paint, __module__=module, **more))
    return frozen(cls)


# attacks

def test_a_registered_attack_is_taken_everywhere(tmp_path):
    P.register_attack(make_attack_class())
    pairs = open_data("world:train:60")
    done = attack(pairs, "stripes", "banana", count=3, image_size=32, folder=tmp_path/"out")
    assert done.card.settings["attack"]["name"] == "stripes" and load_attack(tmp_path/"out")[0] == ATTACKS["stripes"]()
    found = measure("smoke-RN", images="world:zeroshot_test:40", attack=tmp_path/"out")
    assert "ASR" in found.items
    del ATTACKS["stripes"]
    with pytest.raises(SettingsError, match="'stripes' is none of .* register it first"):
        measure("smoke-RN", images="world:zeroshot_test:40", attack=tmp_path/"out")

def test_a_cell_that_is_run_twice_registers_again_and_another_class_does_not():
    first, second = P.register_attack(make_attack_class()), P.register_attack(make_attack_class())
    assert ATTACKS["stripes"] is second is not first
    with pytest.raises(SettingsError, match="'stripes' is there already"):
        P.register_attack(make_attack_class(module="elsewhere"))
    assert ATTACKS["stripes"] is second

def test_a_setting_without_a_default_is_checked_when_it_is_known():
    def paint(self, images, rng):
        images[:, :, ::2] = np.random.default_rng().integers(256) if self.wild else 7
        return images
    parts = dict(name="open", uses_rng=False, paint=paint, __annotations__=dict(wild=bool), __module__=__name__)
    P.register_attack(frozen(type("Open", (Attack,), parts)))
    pairs = open_data("world:train:60")
    assert len(attack(pairs, "open", "banana", count=2, image_size=32, settings=dict(wild=False)).table) == 2
    with pytest.raises(SettingsError, match="does not pass the conformance check"):
        attack(pairs, "open", "banana", count=2, image_size=32, settings=dict(wild=True))
    # a table cannot guess its setting
    assert "open" not in P._wanted_attacks(None)

def no_captions(self, captions, target, rng):
    return [""]*len(captions)

pair_of_sizes = dict(name="pair", __annotations__=dict(size=tuple), size=(1, 2))

@pytest.mark.parametrize("make, words", [
    (lambda: BadNets(), "is no class"),
    (lambda: int, "is no class"),
    (lambda: make_attack_class("badnets"), "is there already"),
    (lambda: make_attack_class("two words"), "is a word"),
    (lambda: make_attack_class("../up"), "is a word"),
    (lambda: make_attack_class(None), "is a word"),
    (lambda: frozen(type("Nameless", (Attack,), dict(paint=lambda s, i, r: i))), "give it a name of its own"),
    (lambda: type("Undecorated", (BadNets,), dict(name="undecorated")), "put @dataclass"),
    (lambda: make_attack_class(captions=no_captions), "captions must be one text for each"),
    (lambda: make_attack_class(eligible=lambda self, pairs, target: np.zeros(len(pairs), bool)), "yes for some"),
    (lambda: frozen(type("Pair", (make_attack_class(),), pair_of_sizes)), "plain JSON"),
])
def test_what_is_no_attack_is_refused_and_leaves_no_trace(make, words):
    before = dict(ATTACKS)
    with pytest.raises(SettingsError, match=words):
        P.register_attack(make())
    assert ATTACKS == before


# defences

def test_a_function_gets_what_it_asks_for_and_nothing_else():
    got = {}
    usual = dict(epochs=2, batch_size=8, learning_rate=1e-4)
    def ask(clip, pairs, *, trusted, seed=0, recipe=usual, strength=0.5, **other):
        got.update(pairs=pairs, trusted=trusted, seed=seed, recipe=recipe, strength=strength, other=other)
        with torch.no_grad():
            clip.model.logit_scale += 1e-3
    P.register_repair("ask")(ask)
    done = repair(
        "smoke-RN", "world:train:30", "ask", trusted="world:validation:40", seed=5, settings=dict(strength=0.7),
        recipe=dict(epochs=3),
    )
    # a tenth of the trusted pairs is kept from it
    assert (len(got["pairs"]), len(got["trusted"]), got["seed"], got["strength"], got["other"]) == (30, 36, 5, .7, {})
    assert got["recipe"] == dict(epochs=3, batch_size=8, learning_rate=1e-4, seed=5)
    assert done.card.settings["settings"] == dict(strength=.7) and done.clip.name == "smoke-RN"
    with pytest.raises(SettingsError, match="ask needs trusted"):
        repair("smoke-RN", "world:train:30", "ask")
    with pytest.raises(SettingsError, match="strenght"):
        repair("smoke-RN", "world:train:30", "ask", trusted="world:validation:40", settings=dict(strenght=1))

@pytest.mark.parametrize("function, words", [
    (lambda: None, "takes clip first"),
    (lambda model, pairs: None, "takes clip first"),
    (lambda clip, pairs, *, refrence: None, "did you mean reference"),
    (lambda clip, pairs, *, share: None, "as a setting it needs a default"),
])
def test_a_function_that_cannot_be_a_defence_is_refused(function, words):
    with pytest.raises(SettingsError, match=words):
        P.register_repair("odd")(function)
    assert "odd" not in METHODS

@pytest.mark.parametrize("name", ["cleanclip", "ubt", "Own", "my-own", "", None, "../x"])
def test_a_name_that_is_taken_or_no_word_is_refused(name):
    before = dict(METHODS)
    with pytest.raises(SettingsError):
        P.register_repair(name)(lambda clip, pairs: None)
    assert METHODS == before

def test_a_method_is_taken_as_it_is():
    way = Method(lambda clip, pairs, **other: dict(refused=True, why="nothing to do"), ("pairs",), "Do nothing.")
    assert P.register_repair("idle")(way) is way is METHODS["idle"]
    assert P.check_repair("idle") == dict(refused=True, why="nothing to do")

def nudge(clip, by=1e-3):
    with torch.no_grad():
        clip.model.visual.conv1.weight += by

def spoil_pairs(clip, pairs):
    nudge(clip)
    pairs.captions[0] = "something else"
def spoil_rows(clip, pairs):
    nudge(clip)
    pairs.image_rows[0] = 1
def spoil_labels(clip, pairs, *, images):
    nudge(clip)
    images.labels[0] += 1
def spoil_reference(clip, pairs, *, reference):
    nudge(clip)
    nudge(reference)
def spoil_nan(clip, pairs):
    nudge(clip, float("nan"))
def spoil_shape(clip, pairs):
    clip.model.logit_scale = torch.nn.Parameter(torch.zeros(2))
def spoil_size(clip, pairs):
    clip.image_size = 16
    nudge(clip)
def spoil_facts(clip, pairs):
    nudge(clip)
    return dict(model=clip)
def spoil_type(clip, pairs):
    nudge(clip)
    return [1]
def spoil_selected(clip, pairs):
    nudge(clip)
    return dict(selected=pd.DataFrame(dict(id=[1])))
def spoil_why(clip, pairs):
    return dict(refused=True)
def spoil_numpy(clip, pairs):
    nudge(clip, np.random.rand())
def spoil_random(clip, pairs):
    nudge(clip, random.random())
def spoil_error(clip, pairs):
    raise KeyError("x")
def spoil_one(clip, pairs):
    nudge(clip, pairs.captions[1] and 1e-3)

@pytest.mark.parametrize("function, words", [
    (spoil_pairs, "an input was changed: pairs"),
    (spoil_rows, "an input was changed: pairs"),
    (spoil_labels, "an input was changed: images"),
    (spoil_reference, "an input was changed: reference"),
    (spoil_nan, "conv1.weight is not finite"),
    (spoil_shape, "logit_scale has another shape"),
    (spoil_size, "loads as another one"),
    (spoil_facts, "cannot be written as JSON"),
    (spoil_type, "not list"),
    (spoil_selected, "needs a column row"),
    (spoil_why, "without a why"),
    (spoil_numpy, "same seed gave another model"),
    (spoil_random, "same seed gave another model"),
    (spoil_error, "KeyError with 20 pairs"),
    (spoil_one, "IndexError with one pair"),
], ids=lambda f: getattr(f, "__name__", ""))
def test_the_check_finds_what_is_wrong(function, words):
    with pytest.raises(AssertionError, match=words):
        P.check_repair(function, count=20)

def test_the_check_leaves_the_random_generators_alone():
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    assert P.check_repair("cleanclip", count=20, recipe=dict(epochs=1))["steps"] == 1
    with pytest.raises(AssertionError):
        P.check_repair(spoil_numpy, count=20)
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])

@pytest.mark.parametrize("name, options", [
    ("supervised", dict(recipe=dict(epochs=1))),
    ("ubt", dict(recipe=dict(epochs=1, batch_size=8), settings=dict(steps=4, suspicious_share=.1))),
])
def test_built_in_defences_conform(name, options):
    assert isinstance(P.check_repair(name, **options), dict)


# packages

GOOD = """
from dataclasses import dataclass
from mcl_repro.attacks.base import Attack
import torch

@dataclass(frozen=True)
class Dots(Attack):
    name, uses_rng = "dots", False
    def paint(self, images, rng): images[:, ::3, ::3] = 0; return images

def soften(clip, pairs, *, by=.01):
    with torch.no_grad(): clip.model.logit_scale -= by
"""
DIES = """
from mcl_repro.tools.plugins import register_repair
@register_repair('half')
def half(clip, pairs): pass
raise RuntimeError('first line\\nsecond line')
"""
IDLE = """
from dataclasses import dataclass
from mcl_repro.attacks.base import Attack
@dataclass(frozen=True)
class Idle(Attack):
    name = 'idle_one'
    def paint(self, images, rng): return images
"""
TAKEN = "def f(clip, pairs): pass"
BROKEN = {     # module -> kind, name and value of its entry point, code, what is said
    "dies_on_import": ("repairs", "dies", "dies_on_import:x", DIES, "RuntimeError: first line"),
    "leaves": ("repairs", "leaves", "leaves:x", "import sys\nsys.exit(3)", "SystemExit: 3"),
    "lacks": ("attacks", "lacks", "lacks:Missing", "", "AttributeError"),
    "takes_a_name": ("repairs", "cleanclip", "takes_a_name:f", TAKEN, "SettingsError: defence 'cleanclip' is there"),
    "no_attack": ("attacks", "number", "no_attack:seven", "seven = 7", "SettingsError"),
    "fails_the_check": ("attacks", "idle", "fails_the_check:Idle", IDLE, "attack idle_one does not pass"),
}
ENTRIES = [("attacks", "dots", "good_one:Dots"), ("repairs", "soften", "good_one:soften")]     # of the good one

def install(folder, module, code, entries):
    "A package as pip leaves it: a module and its dist-info."
    (folder/f"{module}.py").write_text(code)
    info = folder/f"{module}-1.0.dist-info"
    info.mkdir()
    (info/"METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: 1.0\n")
    points = [f"[mcl_repro.{kind}]\n{name} = {value}\n" for kind, name, value in entries]
    (info/"entry_points.txt").write_text("".join(points))

@pytest.fixture
def packages(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    P._loaded.clear()
    yield tmp_path
    for module in (*BROKEN, "good_one", "decorated"):
        sys.modules.pop(module, None)

def test_an_installed_package_is_picked_up_once(packages):
    install(packages, "good_one", GOOD, ENTRIES)
    told = P.load_plugins()
    mine = told[told.package == "good-one"]
    assert sorted(mine.name) == ["dots", "soften"]
    assert (mine.problem == "").all()
    assert "dots" in ATTACKS
    assert "soften" in METHODS
    assert {"dots"} <= set(P._wanted_attacks(None)) and {"soften"} <= set(P._wanted_repairs(None, dict(pairs=1)))
    del ATTACKS["dots"]
    assert P.load_plugins().equals(told) and "dots" not in ATTACKS                    # a second call loads nothing
    assert P.check_repair("soften", count=10) == {}

def test_decorators_in_a_package_do_no_harm(packages):
    both = "from mcl_repro.tools.plugins import register_attack, register_repair\n"
    code = GOOD.replace("@dataclass", "@register_attack\n@dataclass")
    code = both + code.replace("def soften", "@register_repair('soften')\ndef soften")
    points = [(kind, name, value.replace("good_one", "decorated")) for kind, name, value in ENTRIES]
    install(packages, "decorated", code, [*points, ("repairs", "all", "decorated")])
    assert (P.load_plugins().query("package == 'decorated'").problem == "").all()
    assert "dots" in ATTACKS
    assert "soften" in METHODS
    assert "all" not in METHODS

def test_broken_packages_are_told_in_one_line_each_and_stop_nobody(packages):
    for module, (kind, name, value, code, _) in BROKEN.items():
        install(packages, module, code, [(kind, name, value)])
    install(packages, "good_one", GOOD, ENTRIES)
    before = set(ATTACKS), set(METHODS)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        told = P.load_plugins()
    # and nothing of the half of a package
    assert set(ATTACKS) == before[0] | {"dots"} and set(METHODS) == before[1] | {"soften"}
    said = [str(w.message) for w in said if "was left out" in str(w.message)]
    for module, (_, name, _, _, problem) in BROKEN.items():
        line, = [s for s in said if f"of package {module.replace('_', '-')} " in s]
        assert line.startswith(f"plugin {name} ") and problem in line and "\n" not in line
        assert problem in told[told.package == module.replace("_", "-")].problem.item()


# the comparison

def small(**more):
    "A comparison that takes a second or two."
    given = dict(
        images="world:zeroshot_test:80", trusted="world:validation:30", rate=0.1, repairs=["shrink"],
        attacks=["badnets"], recipe=dict(epochs=1, batch_size=30, learning_rate=1e-3),
    )
    return P.compare("smoke-RN", "world:train:60", "banana", **given | more)

@pytest.fixture
def shrink():
    @P.register_repair("shrink")
    def shrink(clip, pairs, *, by=.1):
        with torch.no_grad():
            clip.model.logit_scale -= by

def test_what_is_registered_stands_in_the_table_unasked(shrink):
    P.register_attack(make_attack_class())
    found = small(attacks=None, repairs=None)
    assert list(dict.fromkeys(found.attack)) == ["badnets", "stripes"]
    assert list(dict.fromkeys(found.defence)) == ["clean model", "none", "cleanclip", "shrink"]
    assert len(found) == 2 * 4 * 2
    assert found.value.notna().all()
    assert (found.ci_low <= found.value).all()
    assert (found.value <= found.ci_high).all()
    alone = found.set_index(["attack", "defence", "metric"])
    # another temperature classifies as before
    assert alone.loc[("badnets", "none", "CA"), "value"] == alone.loc[("badnets", "shrink", "CA"), "value"]
    assert P.comparison_view(found).shape == (2, 8) and len(P.comparison_figure(found).axes) == 2

def test_a_comparison_goes_on_and_computes_only_what_is_new(shrink, tmp_path, monkeypatch):
    trained = []
    def counted(*args, **kwargs):
        trained.append(1)
        return train(*args, **kwargs)
    monkeypatch.setattr(P, "train", counted)
    class Killed(BaseException):
        pass
    def killed(*a, **k):
        raise Killed
    with monkeypatch.context() as m:
        m.setattr(P, "repair", killed)
        with pytest.raises(Killed):
            small(folder=tmp_path/"c")
    assert len(trained) == 1
    first = small(folder=tmp_path/"c")
    # as if undisturbed; the latter trained once more
    assert len(trained) == 1 and first.equals(small())
    trained.clear()
    more = small(folder=tmp_path/"c", repairs={"shrink": {}, "twice": dict(method="shrink", settings=dict(by=.2))})
    assert not trained and more[more.defence != "twice"].reset_index(drop=True).equals(first)
    with pytest.raises(SettingsError, match="holds a comparison with another recipe"):
        small(folder=tmp_path/"c", recipe=dict(epochs=2, batch_size=30, learning_rate=1e-3))
    with pytest.raises(SettingsError, match="holds other files"):
        small(folder=tmp_path)

def test_a_refusal_is_a_line_of_the_table(shrink):
    @P.register_repair("picky")
    def picky(clip, pairs):
        raise DataError("these pairs: not to my taste")
    @P.register_repair("calm")
    def calm(clip, pairs):
        return dict(refused=True, why="all is well")
    found = small(repairs=["picky", "calm", "shrink"])
    lines = found.set_index(["defence", "metric"])
    assert np.isnan(lines.value["picky", "ASR"])
    assert "not to my taste" in lines.note["picky", "CA"]
    assert lines.note["calm", "CA"] == "left as it is: all is well"
    assert lines.value["calm", "ASR"] == lines.value["none", "ASR"] and lines.note["shrink", "CA"] == ""
    assert P.comparison_view(found).loc["badnets", ("ASR", "picky")] == "refused"

def test_defences_see_the_poisoned_pairs_and_never_the_clean_ones():
    seen = {}
    @P.register_repair("look")
    def look(clip, pairs, *, trusted, reference):
        seen.update(pairs=pairs, trusted=trusted, reference=reference)
        nudge(clip)
    small(repairs=["look"])
    clean = open_data("world:train:60")
    assert sum(a != b for a, b in zip(seen["pairs"].captions, clean.captions)) == 6 and seen["pairs"].labels is None
    assert seen["trusted"].name.startswith("world:validation") and seen["reference"].name == "smoke-RN"

@pytest.mark.parametrize("options, words", [
    (dict(attacks=["badnet"]), "none of"),
    (dict(repairs=["cleanclp"]), "did you mean cleanclip"),
    (dict(repairs=["cleanclip"], trusted=None), "cleanclip needs trusted"),
    (dict(repairs=["supervised"]), "give labelled= to compare"),
    (dict(repairs={"x": dict(method="cleanclip", setting={})}), "unknown option"),
    (dict(recipe=dict(epochs=0, batch_size=1, learning_rate=1)), "epochs must be positive"),
    (dict(recipe=dict(lr=1)), "recipe"),
    (dict(images="world:train:20"), "has no classes"),
    (dict(rate=2), "poison rate"),
    (dict(attacks=["ssba"]), "needs the setting 'encoder'"),
    (dict(attacks=[]), "no attack"),
])
def test_what_cannot_work_is_told_before_anything_is_trained(monkeypatch, options, words):
    monkeypatch.setattr(P, "train", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(UserError, match=words):
        small(**({"repairs": ["cleanclip"]} | options))
