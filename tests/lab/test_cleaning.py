"Deleting needs proof: what cannot be read is never taken for what is not needed."
import shutil, time

import pytest

import lab_stages
from lab_bench import clean_all, clean_once
from mcl_repro.cli.main import main
from mcl_repro.core.errors import SettingsError, StoreError
from mcl_repro.lab import cleaning
from mcl_repro.lab.cleaning import clean_store
from mcl_repro.lab.lab import Lab
from mcl_repro.lab.status import read_plan, write_plan


@pytest.fixture
def lab(tmp_path, monkeypatch):
    "Five results that one paper needs, and one of another paper."
    monkeypatch.setenv("LAB_STARTS", str(tmp_path/"starts"))
    (tmp_path/"starts").touch()
    lab = Lab("smoke", device="cpu", runs=tmp_path/"runs", progress=False)
    lab.run(lab_stages.graph(lab, sleep=0.))
    lab.run(other(lab))
    return lab


def other(lab):
    return lab.node(lab_stages.careless, name="another paper")


def results(lab):
    return {path.name for path in lab.store.objects.glob("*/*")}


def aged(lab, days, only=None):
    "Entries of the plan (those of a stage) as if they had been asked for so many days earlier."
    path = lab.folder/"plan.json"
    plan = read_plan(path)
    for entry in plan["entries"].values():
        if only is None or only in entry["stage"]:
            moment = time.time() - days*86400
            entry["used"] = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(moment))
    write_plan(path, plan)


DAMAGES = {
    "cut": lambda data: data[:-3],
    "half": lambda data: data[:len(data)//2],
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "first byte": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "a key": lambda data: data.replace(b'"key": "', b'"key": "0', 1),
    "a date": lambda data: data.replace(b'"used": "20', b'"used": "19', 1),
    "another list": lambda data: b'{"format": 1, "entries": []}',
    "no list": lambda data: b'{"format": 1}',
    "infinite": lambda data: data.replace(b'"jobs": ', b'"jobs": Infinity, "was": ', 1),
    "another program": lambda data: data.replace(b'"format": 1', b'"format": 9', 1),
    "no UTF-8": lambda data: b"\xff\xfe" + data,
}

@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_plan_keeps_everything(lab, damage, capsys):
    before, plan = results(lab), lab.folder/"plan.json"
    whole = plan.read_bytes()
    plan.write_bytes(damage(whole))
    assert plan.read_bytes() != whole
    with pytest.raises(StoreError, match="plan.json is damaged, so nobody knows what it asked for"):
        clean_store(lab.store.folder, lab.runs, yes=len(before))
    assert main(["clean", "--runs", str(lab.runs), "--yes", "6"]) == 2
    assert capsys.readouterr().err.startswith("error: ") and results(lab) == before


def test_a_run_does_not_forget_a_damaged_plan(lab):
    before, plan = results(lab), lab.folder/"plan.json"
    plan.write_bytes(DAMAGES["first byte"](plan.read_bytes()))
    with pytest.warns(UserWarning, match="plan.json was damaged and is now plan.damaged-"):
        lab.run(other(lab))
    aside, = lab.folder.glob("plan.damaged-*.json")
    with pytest.raises(StoreError, match=f"{aside.name} is a plan that cannot be read, so nobody knows what is needed"):
        clean_store(lab.store.folder, lab.runs)
    lab.run(lab_stages.graph(lab, sleep=0.))       # all papers again
    aside.unlink()
    assert clean_store(lab.store.folder, lab.runs) == [] and results(lab) == before


def test_a_plan_of_an_older_version_is_continued(lab):
    before, path = results(lab), lab.folder/"plan.json"
    cleaning.read_plan(path)
    path.write_text(path.read_text().replace('"checksum"', '"was"'))
    assert "checksum" not in read_plan(path)
    lab.run(other(lab))
    assert "checksum" in read_plan(path) and clean_store(lab.store.folder, lab.runs) == [] and results(lab) == before


@pytest.mark.parametrize("days", [-1, -1e-9, float("nan"), float("inf"), float("-inf")])
def test_days_that_are_none_are_refused(lab, days, capsys):
    with pytest.raises(SettingsError, match="give a number of days from 0 on"):
        clean_store(lab.store.folder, lab.runs, days=days)
    assert main(["clean", "--runs", str(lab.runs), f"--days={days}"]) == 2
    assert "is not a number from 0 to 36500" in capsys.readouterr().err


@pytest.mark.parametrize("jump", [-40000, -100, 100, 40000], ids=lambda days: f"{days} days")
def test_a_clock_that_jumped_removes_nothing_more(lab, jump, monkeypatch):
    aged(lab, 40, "careless")
    real = time.time
    def found():
        return [row["name"] for row in clean_store(lab.store.folder, lab.runs)]
    now = found()
    assert len(now) == 1
    monkeypatch.setattr(cleaning.time, "time", lambda: real() + jump*86400)
    assert set(found()) <= set(now)


def test_a_plan_from_the_future_removes_nothing_more(lab):
    aged(lab, -4000, "careless")
    assert clean_store(lab.store.folder, lab.runs) == []


def test_the_record_of_a_needed_result_must_be_whole(lab):
    aged(lab, 40, "careless")
    needed = next(lab.store.objects.glob("*fit/*"))/"record.json"
    needed.write_bytes(needed.read_bytes()[:-5])
    with pytest.raises(StoreError, match="record.json is damaged, so nobody knows what it needs; remove that folder"):
        clean_store(lab.store.folder, lab.runs, yes=1)
    assert len(results(lab)) == 6
    shutil.rmtree(needed.parent)
    assert [row["kind"] for row in clean_store(lab.store.folder, lab.runs)] == ["artefact"]


@pytest.mark.parametrize("count", [2, 5, 10**9])
def test_another_number_than_was_shown_removes_nothing(lab, count):
    aged(lab, 40, "careless")
    before = results(lab)
    with pytest.raises(SettingsError, match=r"1 things would go, not .*; look at them, and name .* \(--yes 1\)"):
        clean_store(lab.store.folder, lab.runs, yes=count)
    assert results(lab) == before


def test_what_goes_can_be_put_back_until_the_next_cleaning(lab):
    aged(lab, 40, "careless")
    before, row = results(lab), clean_once(lab.store, lab.runs)[0]
    assert (row["kind"], row["reason"]) == ("artefact", "no plan asked for it lately") and len(results(lab)) == 5
    aside, = (lab.store.folder/"quarantine").glob("cleaned-*")
    (aside/row["name"]).rename(lab.store.folder/row["name"])
    assert results(lab) == before and lab.store.read(other(lab).stage.name, other(lab).key)
    clean_all(lab.store, lab.runs)
    assert not list((lab.store.folder/"quarantine").iterdir()) and len(results(lab)) == 5


def test_many_results_go_in_seconds(lab):
    "Every record is read once and moved once, however many bases there are."
    place, count = lab.store.objects/"other.stage", 4000
    for k in range(count):
        (place/f"{k:040x}").mkdir(parents=True)
        (place/f"{k:040x}"/"record.json").write_text("{}")
        (lab.store.folder/"bases"/f"{k:064x}.safetensors").touch()
    began = time.perf_counter()
    clean_once(lab.store, lab.runs)
    assert len(results(lab)) == 6 and not list((lab.store.folder/"bases").iterdir())
    assert time.perf_counter() - began < 20


@pytest.mark.parametrize("damage", ["1e999", "NaN", "-Infinity", "["*3000 + "]"*3000, "[]"], ids=lambda text: text[:9])
def test_a_record_that_is_no_finite_json_is_damage(lab, damage):
    node = other(lab)
    path = lab.store.path(node.stage.name, node.key)/"record.json"
    path.write_text(path.read_text().replace('"seconds": ', f'"seconds": {damage}, "was": ', 1))
    assert not any(row["state"] == "done" for row in lab.status(node))
    with pytest.warns(UserWarning, match="was damaged \\(its record is broken\\)"):
        lab.run(node)
    assert lab.store.read(node.stage.name, node.key)


@pytest.mark.parametrize("content", [
    "{}", "[]", "1", '{"files": [1]}', '{"files": {"a": 1}, "seconds": {}}', '{"files": null, "checksum": null}', "",
])
def test_a_record_of_another_form_is_damage(lab, content):
    node = other(lab)
    (lab.store.path(node.stage.name, node.key)/"record.json").write_text(content)
    assert not any(row["state"] == "done" for row in lab.status(node))
    with pytest.warns(UserWarning, match="was damaged"):
        lab.run(node)
    assert lab.store.read(node.stage.name, node.key)
