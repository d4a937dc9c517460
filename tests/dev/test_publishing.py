"""Published results: what is refused, what is written, and that every number in this checkout's notebooks has its
record.
"""
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
from filelock import FileLock
from paper_notebooks import STANDARD
from published_tables import skip_if_older

import mcl_repro
from mcl_repro.core import files as writing
from mcl_repro.core.errors import SettingsError, StoreError
from mcl_repro.dev import outputs as slimming
from mcl_repro.dev import publishing as module
from mcl_repro.dev.outputs import code_hash, execute, FIGURE_LIMIT, NOTEBOOKS_LIMIT, plain_html, read_notebook, stale
from mcl_repro.dev.publishing import (
    check_published, main, publish, published, published_claims, published_table, RECORDS_LIMIT,
)
from mcl_repro.lab.lab import Lab
from mcl_repro.report.page import VERDICTS
from mcl_repro.report.printed import printed_entries
from mcl_repro.report.provenance import write_provenance
from mcl_repro.report.tables import read_table, show_table
from mcl_repro.run import headless
from mcl_repro.run.batch import Progress, run_notebooks
from mcl_repro.run.notebooks import find_notebooks, hash_of

ROOT = Path(mcl_repro.__file__).resolve().parent.parent
TABLE = """
from pathlib import Path
from mcl_repro.report.tables import read_table, show_table, tidy, write_table
made = tidy('ubt.table1', [dict(attack='BadNet', defense='UBT', metric='CA', value=200/3, ci_low=60., ci_high=70.)])
show_table(read_table(write_table(made, 'ubt.table1', Path(runs)/profile, 'Made-up numbers.')), 'Made-up numbers.')
"""
FIGURE = """
import matplotlib.pyplot as plt, pandas as pd
from mcl_repro.report.figures import save_figure
fig, ax = plt.subplots(); ax.plot([1, 2, 3], label='a'); ax.legend()
drawn = pd.DataFrame(dict(y=[1, 2, 3]))
save_figure(fig, 'ubt.lines', Path(runs)/profile, drawn, alt='A line.', note='Made up.', extra=True)
"""
NOISE = """
import os, sys, warnings
warnings.warn('loud')
print(object(), os.getcwd(), sys.executable)
pd.DataFrame(dict(a=[1, 2]))
"""
LIBRARY = "import os\nos.environ['IN_TEST']"


def write(folder, name, *cells, parameters=True):
    "A notebook `a.ipynb` with the ids a-0, a-1, ..."
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    title = nbformat.v4.new_markdown_cell(f"# {name}\n\n> A test.", id="title")
    code = [nbformat.v4.new_code_cell(cell, id=f"{Path(name).stem}-{i}") for i, cell in enumerate(cells)]
    nb = nbformat.v4.new_notebook(metadata={"kernelspec": kernel}, cells=[title, *code])
    if parameters:
        nb.cells[1].metadata["tags"] = ["parameters"]
    folder.mkdir(exist_ok=True)
    (folder/name).write_text(nbformat.writes(nb) + "\n", encoding="utf-8")


def edit(path, change):
    "Change a JSON file in place."
    content = read_notebook(path)
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def outputs(path):
    "The outputs of a notebook's cells of code."
    return {c["id"]: c["outputs"] for c in read_notebook(path)["cells"] if c["cell_type"] == "code"}


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def run_all(top):
    "Run the notebooks that have changed."
    quiet = Progress(top/"runs", "smoke", out=io.StringIO())
    return run_notebooks((), "smoke", "cpu", runs=top/"runs", notebooks=top/"nbs", progress=quiet)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A complete run of two notebooks, really executed."
    top = tmp_path_factory.mktemp("made")
    nbs, run = top/"nbs", top/"runs/smoke"
    write(nbs, "a.ipynb", STANDARD, TABLE, FIGURE, NOISE)
    write(nbs, "b.ipynb", STANDARD, "6*7")
    write(nbs, "lib.ipynb", LIBRARY, "#| slow\n1/0", parameters=False)
    run_all(top)
    for name, day, commit in (("a", "01", "c0ffee1234567"), ("b", "02", "beef00012345")):
        write_provenance(Lab("smoke", "cpu", top/"runs"), [], run, name)
        known = dict(code={"commit": commit, "dirty": False}, written=f"2026-01-{day}T00:00:00+00:00")
        edit(run/"provenance.json", lambda p: p["notebooks"][name].update(known))
    empty = dict.fromkeys(("margin", "ci_low", "ci_high", "unit", "comparisons", "level", "evidence"), "")
    rows = [dict(id=claim, paper=claim.split(".")[0], audit="holds", verdict="inconclusive", **empty)
            for claim in printed_entries("claims")]
    pd.DataFrame(rows).to_csv(run/"claims.csv", index=False)
    return top


@pytest.fixture
def top(made, tmp_path):
    shutil.copytree(made, tmp_path/"t")
    return tmp_path/"t"


def go(top):
    return publish(top/"runs", "smoke", top/"nbs")


# ---- what is written

def without_outputs(notebook):
    return [{k: v for k, v in c.items() if k != "outputs"} for c in notebook["cells"]]


def test_outputs_go_to_the_cells_of_the_same_id(top):
    before = read_notebook(top/"nbs/a.ipynb")
    done = go(top)
    assert without_outputs(read_notebook(top/"nbs/a.ipynb")) == without_outputs(before)     # no cell of papermill's
    found = outputs(top/"nbs/a.ipynb")
    assert list(found) == ["a-0", "a-1", "a-2", "a-3"]
    answer = {"data": {"text/plain": ["42"]}, "execution_count": None, "metadata": {}, "output_type": "execute_result"}
    assert outputs(top/"nbs/b.ipynb")["b-1"] == [answer]
    table = found["a-1"][0]["data"]
    assert set(table) == {"text/html", "text/markdown"} and "66.67" in "".join(table["text/html"])
    assert {"image/png"} in [set(o["data"]) for o in found["a-2"]]
    assert "Figure size" not in json.dumps(found)
    changed = ["a.ipynb", "b.ipynb", "claims.csv", "run.json", "ubt.table1.csv", "ubt.table1.json"]
    assert sorted(p.name for p in done.changed) == changed


def test_outputs_name_nothing_of_this_machine_and_no_address(top):
    go(top)
    text, found = (top/"nbs/a.ipynb").read_text(), outputs(top/"nbs/a.ipynb")
    printed, table = found["a-3"]
    assert printed["text"] == [f"<object object> …/nbs …/{Path(sys.executable).name}\n"]
    assert "<table>" in "".join(table["data"]["text/html"])
    assert not any(word in json.dumps(found["a-3"]) for word in ("loud", "style"))
    assert str(top) not in text and not re.search(r"0x[0-9a-f]{6}", text)
    assert not any(o.get("metadata") for shown in found.values() for o in shown)


def test_the_stamp_says_which_run(top):
    done = go(top)
    about = published(top/"nbs/results")
    keys = [read_notebook(top/f"runs/smoke/notebooks/{n}.ipynb")["metadata"]["mcl_repro"]["key"] for n in "ab"]
    stamp = {"run": hash_of(*keys)[:8], "profile": "smoke", "seeds": 1, "commit": "beef00012345"}
    assert done.stamp == stamp == {k: about[k] for k in stamp}
    notebook = read_notebook(top/"nbs/a.ipynb")
    own = {**stamp, "commit": "c0ffee1234567", "outputs_of": code_hash(notebook)}
    assert notebook["metadata"]["mcl_repro"] == own
    line = outputs(top/"nbs/a.ipynb")["a-0"][0]["data"]["text/markdown"]
    assert "".join(line) == (f"Results below: run `{about['run']}`, profile smoke, commit `c0ffee1`, seeds 1. "
                             "`make reproduce PROFILE=smoke` makes them anew.")
    part = about["notebooks"]["a"]
    assert part["key"] == keys[0] and part["seconds"] > 0
    given = {"profile": "smoke", "device": "cpu", "jobs": 1, "seeds": 1, "roles": {}, "overrides": {}}
    assert part["parameters"] == given
    assert set(about["figures"]) == {f"figures/ubt.lines.{k}" for k in ("csv", "json", "png", "svg")}


def test_records_are_copies_and_can_be_read(top):
    go(top)
    run, results = top/"runs/smoke", top/"nbs/results"
    copies = {"claims.csv", "tables/ubt.table1.csv", "tables/ubt.table1.json"}
    assert set(contents(results)) == {"run.json", *copies}
    for name in copies:
        assert (results/name).read_bytes() == (run/name).read_bytes()
    assert published_table("ubt.table1", results).value.dropna().tolist() == [66.66666667]
    assert len(published_claims(results)) == 179
    with pytest.raises(SettingsError, match="unknown table 'ubt.table9'"):
        published_table("ubt.table9", results)


READERS = [published, published_claims, lambda folder: published_table("ubt.table1", folder),
           lambda folder: check_published(folder.parent)]


@pytest.mark.parametrize("read", READERS)
def test_readers_say_when_nothing_is_published(top, read):
    says = "nothing is published in .*results yet; make a run and publish it: make reproduce; make publish"
    with pytest.raises(SettingsError, match=says):
        read(top/"nbs/results")


def times(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_publishing_twice_changes_nothing_and_does_not_make_the_run_old(top):
    nbs = top/"nbs"
    go(top)
    before, written = contents(nbs), times(nbs)
    assert go(top).changed == []
    assert (contents(nbs), times(nbs)) == (before, written)
    assert [run.state for run in run_all(top)] == ["unchanged", "unchanged"]
    assert check_published(nbs) == []


def test_tables_of_an_earlier_run_go(top):
    go(top)
    old = top/"nbs/results/tables/mem.table9.csv"
    old.write_text("old")
    assert go(top).changed == [old] and not old.exists()


def test_a_run_on_a_gpu_is_published_without_one(top):
    executed = top/"runs/smoke/notebooks/a.ipynb"
    given = read_notebook(executed)["metadata"]["papermill"]["parameters"]
    lab = Lab("smoke", "cpu", top/"runs")
    on_gpu = SimpleNamespace(profile=lab.profile, role=lab.role, device="cuda")
    key = headless.run_key(top/"nbs/a.ipynb", given, on_gpu)
    edit(executed, lambda n: n["metadata"]["mcl_repro"].update(key=key))
    with pytest.raises(SettingsError, match="older than the code"):
        go(top)
    edit(top/"runs/smoke/provenance.json", lambda p: p["notebooks"]["a"].update(device="cuda"))
    assert go(top).stamp


def test_the_librarys_notebooks_are_left_alone_and_can_be_executed(top):
    nbs, library = top/"nbs", top/"nbs/lib.ipynb"
    before = library.read_bytes()
    go(top)
    assert library.read_bytes() == before and list(stale(nbs)) == ["lib"]
    assert execute(library) and not execute(library)
    shown = {"data": {"text/plain": ["'1'"]}, "execution_count": None, "metadata": {}, "output_type": "execute_result"}
    assert outputs(library) == {"lib-0": [shown], "lib-1": []}
    assert stale(nbs) == {} and check_published(nbs) == []


# ---- what is refused, before anything is written

def metadata(top, name="a", **change):
    "Change entries of the metadata of an executed copy."
    edit(top/f"runs/smoke/notebooks/{name}.ipynb", lambda n: [n["metadata"][k].update(v) for k, v in change.items()])


def provenance(top, **change):
    "Change what is known of the code of notebook b."
    edit(top/"runs/smoke/provenance.json", lambda p: p["notebooks"]["b"]["code"].update(change))


def source(top, **change):
    "Change the last cell of notebook b."
    edit(top/"nbs/b.ipynb", lambda n: n["cells"][2].update(change))


def claims(top, change):
    path = top/"runs/smoke/claims.csv"
    frame = change(pd.read_csv(path, dtype=str, keep_default_na=False))
    frame.to_csv(path, index=False)


def given(top, **parameters):
    metadata(top, papermill={"parameters": dict(profile="smoke", seeds=1) | parameters})


def swap(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def failed_cell(top):
    error = dict(output_type="error", ename="KeyError", evalue="x", traceback=[])
    edit(top/"runs/smoke/notebooks/b.ipynb", lambda n: n["cells"][-1].update(outputs=[error]))


RUN = "runs/smoke"
REFUSED = {     # what happens to the run, what is said
    "missing": (lambda t: (t/RUN/"notebooks/b.ipynb").unlink(),
                "notebook 'b' has not been run in .*make reproduce PROFILE=smoke"),
    "no run": (lambda t: shutil.rmtree(t/"runs"), "notebook 'a' has not been run"),
    "failed": (lambda t: (t/RUN/"notebooks/b.failed.ipynb").write_text("{}"), "last run of notebook 'b' failed"),
    "interrupted": (lambda t: metadata(t, papermill={"end_time": None}), "run of notebook 'a' .* was interrupted"),
    "exception": (lambda t: metadata(t, papermill={"exception": True}), "run of notebook 'a' .* was interrupted"),
    "no claims": (lambda t: (t/RUN/"claims.csv").unlink(), "claims.csv is missing"),
    "few claims": (lambda t: claims(t, lambda f: f[3:]), r"no row for 3 of 179 claims \(ubt.c01, ...\)"),
    "dirty": (lambda t: provenance(t, dirty=True),
              "'b' was run from a tree with changes that are not committed; commit them, then: "
              "make reproduce PROFILE=smoke FORCE=1"),
    "no commit": (lambda t: provenance(t, commit=None), "outside of a git checkout"),
    "old cell": (lambda t: source(t, source=["7*7"]),
                 "run of notebook 'b' is older than the code; make it anew: make reproduce"),
    "other id": (lambda t: source(t, id="new"), "cell new is not in the executed copy"),
    "override": (lambda t: given(t, overrides={"train.epochs": 3}),
                 "'a' was run with another overrides than profile smoke"),
    "other profile": (lambda t: given(t, profile="mini"), "another profile"),
    "error": (failed_cell, "b.ipynb, cell b-1: KeyError: x"),
}
SPOILT = {
    "claim twice": (lambda t: claims(t, lambda f: pd.concat([f, f[:1]])), "'ubt.c01', which is twice"),
    "odd verdict": (lambda t: claims(t, lambda f: f.assign(verdict=["proven", *f.verdict[1:]])),
                    "'proven', which is twice or no claim or verdict"),
    "no verdict": (lambda t: claims(t, lambda f: f.drop(columns="verdict")), "claims.csv cannot be read"),
    "no provenance": (lambda t: edit(t/RUN/"provenance.json", lambda p: p["notebooks"].pop("b")),
                      "says nothing of notebook 'b'"),
    "edited table": (lambda t: (t/RUN/"tables/ubt.table1.csv").write_text("x"),
                     "ubt.table1.csv is not what notebook 'a' wrote, somebody edited it"),
    "edited note": (lambda t: (t/RUN/"tables/ubt.table1.json").write_text("{}"), "ubt.table1.json is not what"),
    "lost figure": (lambda t: (t/RUN/"figures/ubt.lines.csv").unlink(), "ubt.lines.csv of notebook .a. is gone"),
    "edited copy": (lambda t: swap(t/RUN/"notebooks/a.ipynb", "66.67", "99.67"),
                    "a.ipynb #a-1: the table .UBT Table I: .* is not what is on record"),
}


def refused(top, harm, error, says):
    harm(top)
    before = contents(top/"nbs")
    with pytest.raises(error, match=says):
        go(top)
    assert contents(top/"nbs") == before


@pytest.mark.parametrize("harm, says", REFUSED.values(), ids=REFUSED)
def test_a_run_that_is_not_what_it_should_be_is_refused_before_anything_is_written(top, harm, says):
    refused(top, harm, SettingsError, says)


@pytest.mark.parametrize("harm, says", SPOILT.values(), ids=SPOILT)
def test_a_run_that_somebody_edited_is_refused_before_anything_is_written(top, harm, says):
    refused(top, harm, StoreError, says)


@pytest.mark.parametrize("name, value", [("_library", lambda *given: "other"), ("VERSIONED", ("pip",))])
def test_a_run_of_other_code_or_versions_is_refused(top, monkeypatch, name, value):
    monkeypatch.setattr(headless, name, value)
    with pytest.raises(SettingsError, match="run of notebook 'a' is older than the code"):
        go(top)


def test_other_versions_are_named(top):
    edit(top/"runs/smoke/provenance.json", lambda p: p["notebooks"]["a"]["packages"].update(torch="1.0"))
    metadata(top, mcl_repro={"key": "0"*64})
    with pytest.raises(SettingsError, match=r"of other versions \(torch 1.0, here "):
        go(top)


def test_different_seeds_are_refused(top):
    executed = read_notebook(top/"runs/smoke/notebooks/b.ipynb")
    seeds = {**executed["metadata"]["papermill"]["parameters"], "seeds": 3}
    key = headless.run_key(top/"nbs/b.ipynb", seeds, Lab("smoke", "cpu", top/"runs"))
    metadata(top, "b", papermill={"parameters": seeds}, mcl_repro={"key": key})
    says = r"different numbers of seeds \(1, 3\); give all the same: make reproduce PROFILE=smoke SEEDS=3"
    with pytest.raises(SettingsError, match=says):
        go(top)


def test_a_run_at_work_is_refused(top):
    with FileLock(str(top/"runs/smoke/notebooks/.b.lock")), pytest.raises(SettingsError, match="a run is at work in"):
        go(top)


def test_a_failing_cell_of_the_library_is_refused(top):
    write(top/"nbs", "lib.ipynb", "x = []", "x[0]", parameters=False)
    before = contents(top/"nbs")
    with pytest.raises(SettingsError, match=r"lib.ipynb: cell lib-1 fails \(IndexError: list index out of range\)"):
        execute(top/"nbs/lib.ipynb")
    assert contents(top/"nbs") == before


@pytest.mark.parametrize("place, limit, says", [
    (module, "NOTEBOOKS_LIMIT", r"the notebooks have .* MB \(at most 0.00\): a.ipynb \d+ kB"),
    (module, "RECORDS_LIMIT", r"the records have .*claims.csv"),
    (slimming, "FIGURE_LIMIT", r"a.ipynb, cell a-2: a picture of \d+ x \d+ pixels"),
])
def test_what_no_step_makes_small_enough_is_refused(top, monkeypatch, place, limit, says):
    monkeypatch.setattr(place, limit, 500)
    refused(top, lambda t: None, SettingsError, says)


def picture(top):
    "The first picture of notebook a, in base64."
    return next(o["data"]["image/png"] for o in outputs(top/"nbs/a.ipynb")["a-2"] if "image/png" in o["data"])


def test_pictures_lose_colours_only_where_notebooks_are_too_large(top, monkeypatch):
    go(top)
    before = picture(top)
    size = sum(p.stat().st_size for p in (top/"nbs").rglob("*.ipynb"))
    monkeypatch.setattr(module, "NOTEBOOKS_LIMIT", size - 100)
    go(top)
    assert len(picture(top)) < len(before) - 100 and check_published(top/"nbs") == []


def test_a_write_that_fails_leaves_whole_files_and_the_next_one_mends_it(top, monkeypatch):
    before, replace, calls = contents(top/"nbs"), os.replace, []

    def fails(part, path):
        calls.append(path)
        if str(path).endswith("b.ipynb"):
            raise OSError(28, "No space left on device")
        replace(part, path)

    with monkeypatch.context() as m:
        m.setattr(writing.os, "replace", fails)
        with pytest.raises(StoreError, match="b.ipynb: .*No space left"):
            go(top)
    after = contents(top/"nbs")
    assert after["b.ipynb"] == before["b.ipynb"] and len(calls) > 1
    assert not [name for name in after if name.endswith(".part")]
    json.loads(after["a.ipynb"])
    assert "results/run.json" not in after                     # `run.json` comes last
    go(top)
    assert check_published(top/"nbs") == []


def test_published_notebooks_are_as_nbdev_leaves_them(top):
    """Neither nbdev_clean nor nbdev_export touches them, in a project with these settings and the folder of records
    beside them.
    """
    shutil.copy(ROOT/"settings.ini", top)
    (top/"mcl_repro").mkdir()
    (top/"mcl_repro/__init__.py").write_text("")
    edit(top/"nbs/lib.ipynb", lambda n: n["cells"][1].update(source=["#| default_exp lib"]))
    edit(top/"nbs/lib.ipynb", lambda n: n["cells"][2].update(source=["#| export\n", "x = 1"]))
    environment = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"PYTHONPATH": str(ROOT)}
    code = "from nbdev.doclinks import nbdev_export; from nbdev.clean import nbdev_clean; nbdev_export(); nbdev_clean()"

    def export_and_clean():
        done = subprocess.run([sys.executable, "-c", code], cwd=top, capture_output=True, text=True, timeout=100,
                              env=environment)
        assert done.returncode == 0, done.stderr

    export_and_clean()
    go(top)
    before = contents(top/"nbs"), contents(top/"mcl_repro")
    assert before[0]["a.ipynb"].count(b'"outputs": []') < 4
    export_and_clean()
    assert (contents(top/"nbs"), contents(top/"mcl_repro")) == before


# ---- nothing is edited without being noticed

HARM = {
    "number": (lambda n: swap(n/"a.ipynb", "66.67", "96.67"), "the table .UBT Table I: .* is not what is on record"),
    "picture": (lambda n: edit(n/"a.ipynb", lambda b: b["cells"][3].update(outputs=[])),
                "a.ipynb: the outputs are not as they were published"),
    "stamp": (lambda n: edit(n/"b.ipynb", lambda b: b["metadata"]["mcl_repro"].update(run="00000000")),
              "b.ipynb: its stamp"),
    "no stamp": (lambda n: edit(n/"b.ipynb", lambda b: b["metadata"].pop("mcl_repro")), "b.ipynb: its stamp"),
    "record": (lambda n: swap(n/"results/tables/ubt.table1.csv", "66.66666667", "99.9"),
               "results/tables/ubt.table1.csv: not as it was published"),
    "verdict": (lambda n: swap(n/"results/claims.csv", "inconclusive", "replicated"), "results/claims.csv: not as"),
    "lost record": (lambda n: (n/"results/tables/ubt.table1.json").unlink(), "ubt.table1.json: not as"),
    "lost notebook": (lambda n: (n/"b.ipynb").unlink(), "b: published, but there is no such notebook"),
}


@pytest.mark.parametrize("harm, says", HARM.values(), ids=HARM)
def test_edits_are_noticed(top, harm, says):
    go(top)
    assert check_published(top/"nbs") == []
    harm(top/"nbs")
    assert any(re.search(says, wrong) for wrong in check_published(top/"nbs"))


ROW = "<table><tr><th>claim</th></tr><tr><td>ubt.c01</td><td>{}</td><td>holds</td></tr></table>"


@pytest.mark.parametrize("form, shown, says", [
    ("text/html", ROW.format("replicated"), []),
    ("text/html", ROW.format("<b>replicated</b>"), []),
    ("text/html", ROW.format(""), []),
    ("text/markdown", "| `ubt.c02` | not testable |", []),
    ("text/html", ROW.format("not_replicated"), ["x: ubt.c01 is not replicated, on record replicated"]),
    ("text/markdown", "| `ubt.c02` | inconclusive |", ["x: ubt.c02 is inconclusive, on record not testable"]),
])
def test_a_verdict_that_is_shown_is_the_one_on_record(form, shown, says):
    known = pd.DataFrame(dict(id=["ubt.c01", "ubt.c02"], verdict=["replicated", "not_testable"]))
    assert module._wrong_claims([("x", {form: shown})], known) == says


def test_command(top, capsys):
    words = ["--profile", "smoke", "--runs", str(top/"runs"), "--notebooks", str(top/"nbs")]
    assert main(words) == 0
    said = r"published run [0-9a-f]{8} of profile smoke, commit beef000: 6 files changed, notebooks have 0.0 MB\n"
    assert re.fullmatch(said, capsys.readouterr().out)
    (top/"runs/smoke/claims.csv").unlink()
    assert main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1


# ---- this checkout

RESULTS = ROOT/"nbs/results"
here = pytest.mark.skipif(not (RESULTS/"run.json").exists(),
                          reason="nothing is published in this checkout yet (make reproduce; make publish)")


def shown_forms(path):
    "The forms of all outputs of a notebook, as text."
    found = [o["data"] for cell in outputs(path).values() for o in cell if "data" in o]
    return [{form: "".join(lines) for form, lines in data.items()} for data in found]


@here
def test_published_notebooks_and_records_agree():
    skip_if_older()
    assert check_published(ROOT/"nbs") == []


@here
def test_every_published_table_is_drawn_from_its_record():
    skip_if_older()
    shown = [forms for path in find_notebooks(ROOT/"nbs").values() for forms in shown_forms(path)]
    tables = [forms for forms in shown if forms.get("text/markdown", "").startswith("### ")]
    drawn, paths = {}, list(RESULTS.glob("tables/*.csv"))
    for path in paths:
        view = show_table(read_table(path), read_notebook(path.with_suffix(".json"))["note"])
        drawn[str(view).strip()] = plain_html(view._repr_html_())
    assert len(drawn) == len(paths) > 0
    assert {forms["text/markdown"].strip(): forms["text/html"] for forms in tables} == drawn


@here
def test_published_claims_are_those_of_the_papers():
    skip_if_older()
    found = published_claims()
    assert sorted(found.id) == sorted(printed_entries("claims")) and set(found.verdict) <= set(VERDICTS)


@here
def test_the_stamp_of_every_notebook_is_the_published_run():
    about, papers = published(), find_notebooks(ROOT/"nbs")
    assert set(about["notebooks"]) == set(papers)
    for name, path in papers.items():
        stamp = read_notebook(path)["metadata"]["mcl_repro"]
        wanted = {k: about[k] for k in ("run", "profile", "seeds")} | {"commit": about["notebooks"][name]["commit"]}
        assert {k: stamp[k] for k in wanted} == wanted
        assert f"run `{about['run']}`" in json.dumps(outputs(path))


@here
def test_published_files_are_small():
    notebooks = [p for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]
    pictures = [len(forms["image/png"]) for path in notebooks for forms in shown_forms(path) if "image/png" in forms]
    assert max(pictures) <= 150_000 == FIGURE_LIMIT
    assert sum(p.stat().st_size for p in notebooks) <= 12_000_000 == NOTEBOOKS_LIMIT
    assert sum(p.stat().st_size for p in RESULTS.rglob("*") if p.is_file()) <= 1_000_000 == RECORDS_LIMIT
    assert (RESULTS/"readme.png").stat().st_size < 60_000


@here
def test_an_edited_number_is_noticed_here_too(tmp_path):
    skip_if_older()
    shutil.copytree(ROOT/"nbs", tmp_path/"nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    path = tmp_path/"nbs/papers/ubt.ipynb"
    number = re.search(r"<b>(\d+\.\d+)</b>", path.read_text(encoding="utf-8"))[1]
    swap(path, f"<b>{number}</b>", f"<b>{float(number) + 1:.2f}</b>")
    assert any("is not what is on record" in wrong for wrong in check_published(tmp_path/"nbs"))


# ---- the front page, where a run has less than all of it

def test_an_attack_without_one_of_its_ends_has_no_arrow():
    from matplotlib.figure import Figure
    drawn = {}
    for known in (("No defense",), ("UBT",), ("No defense", "UBT")):
        ax = Figure().subplots()
        module._arrows(ax, {(defence, "BadNet"): (90., 60.) for defence in known}, "Some")
        drawn[known] = len(ax.texts), len(ax.lines)
    assert drawn == {("No defense",): (0, 1), ("UBT",): (0, 1), ("No defense", "UBT"): (1, 2)}


def test_a_picture_whose_table_is_not_on_record_is_noticed(tmp_path):
    nbs = tmp_path/"nbs"
    (nbs/"results").mkdir(parents=True)
    assert module._wrong_front(nbs, {}) == []
    (nbs/"results"/module.PICTURE).write_bytes(b"a picture")
    says = "readme.png: the table that it was drawn from, ubt.table1, is not on record"
    assert module._wrong_front(nbs, {}) == [says]


def test_the_front_says_that_a_paper_prints_nothing_only_where_it_does_not(tmp_path):
    rows = {name: module._front_row(tmp_path, tmp_path/"results", name, tmp_path/f"papers/{name}.ipynb", [])
            for name in ("ubt", "cleanclip")}
    cell = {name: row.split(" | ")[2] for name, row in rows.items()}
    assert cell == {"ubt": "0", "cleanclip": "prints none here"}
