"An attack that needs something made first says so itself: one entry, and no other code knows its name."
import numpy as np
import pytest

from mcl_repro.core.errors import SettingsError
from mcl_repro.lab.lab import Lab
from mcl_repro.lab.nodes import stage
from mcl_repro.papers.stages import attack_of, attack_settings, Preparation, PREPARATIONS


@stage
def drawn_pattern(work, *, pictures, target, size: int = 8, alpha: float = .5):
    "A grey square, as if it had been searched for."
    np.save(work.out/"pattern.npy", np.full((size, size, 3), 128, np.uint8))
    return dict(size=size)


@pytest.fixture
def lab(tmp_path):
    return Lab("smoke", "cpu", tmp_path, progress=False)


@pytest.fixture
def blended(monkeypatch):
    "Blended as an attack whose picture is drawn first."
    made = Preparation(drawn_pattern, under="draw", fields=("pattern",), shared=("alpha",), data="pictures",
                       needs=("target",))
    monkeypatch.setitem(PREPARATIONS, "blended", made)


def test_a_new_attack_with_something_to_make_needs_one_entry(lab, blended):
    found = attack_settings(lab, dict(name="blended", draw=dict(size=16, alpha=.25)), target="sun")
    node = found["pattern"]
    assert set(found) == {"name", "alpha", "pattern"} and found["alpha"] == .25
    assert (node.settings["target"], node.settings["pictures"]) == ("sun", lab.role("pretrain"))
    attack = attack_of({**found, "pattern": lab.run(node)})
    assert (attack.alpha, attack.pattern.shape) == (.25, (16, 16, 3))


def test_the_profiles_target_is_meant_where_none_is_given(lab, blended):
    node = attack_settings(lab, dict(name="blended", draw={}))["pattern"]
    assert node.settings["target"] == lab.profile.target


@pytest.mark.parametrize("under", ["optimise", "encoder", "draw"])
def test_a_search_of_another_attack_is_refused_by_name(lab, blended, under):
    owners = " and ".join(name for name, made in PREPARATIONS.items() if made.under == under)
    with pytest.raises(SettingsError, match=f"attack sig: has nothing to {under}; {under} belongs to {owners}$"):
        attack_settings(lab, {"name": "sig", under: {}})


def test_what_needs_nothing_stays_as_it_is(lab, blended):
    for entry in (dict(name="blended", alpha=.1), dict(name="badnets"), dict(name="of a plug-in", encoder="a.npy")):
        assert attack_settings(lab, entry) == entry
