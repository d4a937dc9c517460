"The plan file and the status that is read from it: facts that are kept, files that are read once."
import time

import lab_stages
import pytest

from mcl_repro.core.files import read_json, write_json
from mcl_repro.lab import status
from mcl_repro.lab.attempt import StageError
from mcl_repro.lab.lab import Lab
from mcl_repro.lab.status import note_plan, read_plan, read_status


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.setenv("MCL_REPRO_SESSION", "a run")
    monkeypatch.setenv("LAB_STARTS", str(tmp_path/"starts"))
    return Lab("smoke", device="cpu", runs=tmp_path)


def facts_of(nodes, readers=("a.table1",)):
    return {n.key: dict(seconds=3., rank=rank, readers=list(readers)) for rank, n in enumerate(nodes)}


def test_what_a_run_knows_is_kept_when_its_notebooks_ask_again_and_goes_with_the_session(lab):
    nodes = [lab.node(lab_stages.make, seed=seed) for seed in (0, 1)]
    note_plan(lab.folder, lab.store, "a run", nodes, facts_of(nodes), jobs=2)
    began = read_plan(lab.folder/"plan.json")["started"]
    lab.run(nodes[0])
    plan = read_plan(lab.folder/"plan.json")
    assert (plan["jobs"], plan["started"]) == (2, began)
    rows = read_status(lab.runs, "smoke")
    assert [(r["state"], r["rank"], r["expected"], r["readers"]) for r in rows] == \
        [("done", 0, 3., ["a.table1"]), ("waiting", 1, 3., ["a.table1"])]
    note_plan(lab.folder, lab.store, "another run", nodes)
    plan = read_plan(lab.folder/"plan.json")
    assert plan["jobs"] is None and plan["started"] > began
    assert [(r["rank"], r["expected"], r["readers"]) for r in read_status(lab.runs, "smoke")] == [(None, None, [])] * 2


def test_records_that_have_not_changed_are_read_once(lab, monkeypatch):
    nodes = [lab.node(lab_stages.make, seed=seed) for seed in range(5)]
    note_plan(lab.folder, lab.store, "a run", nodes, facts_of(nodes))
    made = lab.run(nodes[:4])
    assert [r["state"] for r in read_status(lab.runs, "smoke")] == ["done"] * 4 + ["waiting"]
    read = []
    monkeypatch.setattr(status, "read_json", lambda path, **more: read.append(path) or read_json(path, **more))
    assert [r["state"] for r in read_status(lab.runs, "smoke")] == ["done"] * 4 + ["waiting"]
    assert read == []
    record = read_json(made[1].path/"record.json")
    write_json(made[1].path/"record.json", record | dict(seconds=99.))      # no longer what was sealed
    next(iter(p for p in made[2].path.iterdir() if p.name != "record.json")).unlink()
    states = [r["state"] for r in read_status(lab.runs, "smoke")]
    assert states == ["done", "waiting", "waiting", "done", "waiting"] and len(read) == 1


def test_a_failure_of_an_earlier_run_waits_to_be_tried_again(lab):
    node = lab.node(lab_stages.fail, kind="bug")
    with pytest.raises(StageError):
        lab.run(node)
    assert [r["state"] for r in read_status(lab.runs, "smoke")] == ["failed"]
    note = lab.store.folder/"failed"/f"{node.key}.json"
    write_json(note, read_json(note) | dict(when="2020-01-01T00:00:00+00:00"))
    assert [r["state"] for r in read_status(lab.runs, "smoke")] == ["waiting"]
    assert [r["state"] for r in lab.status(node)] == ["failed"]      # of a node by itself, whenever it was


def test_status_of_a_large_run_takes_a_moment(lab):
    "Nine hundred stages, twenty of them done; here it takes a fiftieth of a second."
    nodes = [lab.node(lab_stages.make, seed=seed) for seed in range(900)]
    note_plan(lab.folder, lab.store, "a run", nodes, facts_of(nodes))
    lab.run(nodes[:20])
    read_status(lab.runs, "smoke")
    began = time.process_time()
    rows = read_status(lab.runs, "smoke")
    assert time.process_time() - began < .5 and len(rows) == 900
