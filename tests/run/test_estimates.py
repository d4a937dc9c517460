"Expected seconds of steps, from records that are made up."
from types import SimpleNamespace

import lab_stages
import pytest

from mcl_repro.core.files import write_json
from mcl_repro.lab import costs
from mcl_repro.lab.costs import StageWork, work_of
from mcl_repro.lab.lab import Lab
from mcl_repro.lab.status import with_inputs
from mcl_repro.run.estimates import expected_seconds, steps_before


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_STARTS", str(tmp_path/"starts"))
    monkeypatch.setitem(costs.COSTS, "lab_stages.fit", lambda s: StageWork().add("train", s.steps))
    return Lab("smoke", device="cpu", runs=tmp_path, progress=False)


def fit(lab, **settings):
    return lab.node(lab_stages.fit, data=lab.node(lab_stages.make, seed=0), **{"seed": 0, "sleep": 0., **settings})


def took(lab, node, seconds, **more):
    "Compute a node, and say that it took so long."
    made = lab.run(node)
    write_json(made.path/"record.json", {**made.record, "seconds": seconds, **more})


def expected(lab, node, rates=None):
    planned = [SimpleNamespace(node=n, work=work_of(n)) for n in with_inputs([node])]
    return expected_seconds(planned, lab.store, rates or {})[node.key]


def test_the_most_similar_record_scaled_to_the_work(lab):
    took(lab, fit(lab, steps=2), 4.)
    took(lab, fit(lab, steps=2, sleep=.01), 40.)
    assert expected(lab, fit(lab, steps=2, seed=5)) == 4.
    assert expected(lab, fit(lab, steps=2, seed=5, sleep=.01)) == 40.
    assert expected(lab, fit(lab, steps=4, seed=5)) == 8.
    assert expected(lab, fit(lab, steps=4, seed=5), {"": dict(train=.1)}) == 8.


def test_other_machines_and_other_threads_do_not_count(lab):
    took(lab, fit(lab, steps=2), 4., hardware=dict(cpu="another"))
    assert expected(lab, fit(lab, steps=2, seed=5)) is None
    assert expected(lab, fit(lab, steps=2, seed=5), {"": dict(train=.1)}) == pytest.approx(.2)
    took(lab, fit(lab, steps=2, seed=1), 6., device=dict(type="cpu", threads=2))
    assert expected(lab, fit(lab, steps=2, seed=5)) is None


def test_what_is_counted_is_corrected_by_what_is_on_record(lab, monkeypatch):
    monkeypatch.setitem(costs.COSTS, "lab_stages.where", lambda s: StageWork().add("train", 50))
    other = lab.node(lab_stages.where, number=1)
    assert expected(lab, other, {"": dict(train=.1)}) == 5.
    took(lab, fit(lab, steps=20), 6.)      # three times as long as counted
    planned = [SimpleNamespace(node=n, work=work_of(n)) for n in with_inputs([other, fit(lab, steps=20, seed=1)])]
    assert expected_seconds(planned, lab.store, {"": dict(train=.1)})[other.key] == pytest.approx(15.)


def test_a_record_whose_input_has_gone_is_left_out(lab):
    node = fit(lab, steps=2)
    took(lab, node, 4.)
    data = next(iter(node.inputs.values()))
    (lab.store.path("lab_stages.make", data.key)/"record.json").unlink()
    assert "lab_stages.fit" not in steps_before([node], lab.store)


def test_a_setting_that_a_record_does_not_have_has_its_default(lab):
    node = fit(lab, steps=5)      # the default
    made = lab.run(node)
    settings = {k: v for k, v in made.record["settings"].items() if k != "steps"}
    write_json(made.path/"record.json", {**made.record, "settings": settings, "seconds": 7.})
    assert expected(lab, fit(lab, steps=10, seed=3)) == 14.
