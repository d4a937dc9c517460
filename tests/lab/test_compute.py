"Steps by rank: which begin first, who is told, and what a notebook makes of a step that failed before."
import json

import pytest
from lab_stages import fail, fit, make, table
from mcl_repro.core.errors import TrainingError
from mcl_repro.lab.engine import error_in_words
from mcl_repro.lab.lab import is_done, Lab
from mcl_repro.lab.status import read_status, with_inputs


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_STARTS", str(tmp_path/"starts"))
    return Lab("smoke", device="cpu", runs=tmp_path/"runs")


def chains(lab, count=3):
    "Independent chains of two steps: the second one of each."
    return [lab.node(fit, data=lab.node(make, seed=seed), seed=seed, steps=1) for seed in range(count)]


def ranked(nodes, order):
    "Facts that put steps in this order, by name and seed."
    def name(node):
        return f"{node.stage.name.rpartition('.')[2]}{node.settings.get('seed', '')}"
    found = {name(node): node.key for node in with_inputs(nodes)}
    return {found[n]: dict(rank=rank, seconds=1., readers=["a.table1"]) for rank, n in enumerate(order)}


def begun(lab):
    "The steps that began, in order."
    lines = (lab.runs.parent/"starts").read_text().split("\n")
    return [line.split()[0] for line in lines if line and "." not in line.split()[0]]


ORDER = ["make2", "fit2", "make0", "make1", "fit1", "fit0"]


def test_the_smallest_rank_begins_first(lab):
    nodes, told = chains(lab), []
    errors = lab.compute(nodes, ranked(nodes, ORDER), lambda node, state, error: told.append((node.key, state, error)))
    assert errors == [] and begun(lab) == ORDER
    assert {state for _, state, _ in told} == {"done"} and len(told) == 6
    assert all(is_done(lab.store, node) for node in with_inputs(nodes))
    assert {row["rank"] for row in read_status(lab.runs, "smoke")} == set(range(6))


def test_dask_takes_ranks_as_priorities(lab):
    pytest.importorskip("distributed")
    several = Lab("smoke", device="cpu", runs=lab.runs, engine="dask", jobs=1)
    try:
        nodes = chains(several, 6)
        order = [f"{kind}{seed}" for seed in (5, 0, 4, 1, 3, 2) for kind in ("make", "fit")]
        several.compute(nodes, ranked(nodes, order))
    finally:
        several.close()
    # a worker begins the next step before it has told of the last one, so a second step may be one place late
    made, fitted = ([int(step[-1]) for step in begun(lab) if step.startswith(kind)] for kind in ("make", "fit"))
    first = made[0]                # whatever was there when the worker came
    assert made[1:] == [seed for seed in (5, 0, 4, 1, 3, 2) if seed != first]
    at = begun(lab).index
    assert all(at(f"fit{seed}") - at(f"make{seed}") <= 3 for seed in fitted)


def test_what_a_failed_step_leads_to_is_told_as_skipped(lab):
    bad = lab.node(fail, kind="user")
    nodes = [*chains(lab, 1), lab.node(fail, kind="ok", after=bad)]
    told = {}
    facts = {node.key: dict(rank=rank, seconds=None, readers=[]) for rank, node in enumerate(with_inputs(nodes))}
    errors = lab.compute(nodes, facts, lambda node, state, error: told.update({node.key: (state, error)}))
    assert len(errors) == 1 and told[bad.key] == ("failed", errors[0])
    assert told[nodes[1].key] == ("skipped", None) and told[nodes[0].key] == ("done", None)


def test_a_notebook_does_not_try_again_what_failed_before_it_was_started(lab, tmp_path, monkeypatch):
    node = lab.node(fail, kind="user")
    with pytest.raises(TrainingError) as found:
        lab.run(node)
    told = tmp_path/"failed.json"
    told.write_text(json.dumps({node.key: error_in_words(found.value)}))
    monkeypatch.setenv("MCL_REPRO_FAILED", str(told))
    with pytest.raises(TrainingError, match="loss is nan at step 3"):
        lab.run([lab.node(table, fits=[node]), *chains(lab, 1)])
    assert begun(lab) == ["fail"]


def test_a_damaged_result_is_seen_by_its_size_and_computed_again(lab):
    node, = chains(lab, 1)
    facts = ranked([node], ["make0", "fit0"])
    lab.compute([node], facts)
    weights = lab.store.path(node.stage.name, node.key)/"weights.npy"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert not is_done(lab.store, node)
    lab.compute([node], facts)
    assert is_done(lab.store, node) and begun(lab) == ["make0", "fit0", "fit0"]
