"""Published results: what is refused, what is written, and that every number in this checkout's notebooks has its
record.
"""
import base64, io, json, os, re, shutil, subprocess, sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from filelock import FileLock

from mcl_repro.run import batch
from mcl_repro.dev import outputs as slimming
from mcl_repro.dev import publishing as module
from mcl_repro.run.batch import Progress, run_notebooks
from mcl_repro.dev.publishing import main
from mcl_repro.core.errors import SettingsError, StoreError, UserError
from mcl_repro.dev.outputs import (
    code_hash, execute, FIGURE_LIMIT, NOTEBOOKS_LIMIT, plain_html, slim_outputs, slim_png, slim_text, stale,
)
from mcl_repro.dev.publishing import (
    check_published, publish, published, published_claims, published_table, read_run, RECORDS_LIMIT,
)
from mcl_repro.lab.lab import Lab
from mcl_repro.report.page import VERDICTS
from mcl_repro.report.printed import printed_entries
from mcl_repro.report.provenance import write_provenance
from mcl_repro.report.tables import read_table, show_table
from mcl_repro.run.notebooks import find_notebooks

ROOT = Path(__file__).resolve().parent.parent
STANDARD = "profile = 'mini'\ndevice = 'auto'\njobs = 1\nseeds = 1\nroles = {}\noverrides = {}\nruns = '../runs'\n"
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
save_figure(fig, 'ubt.lines', Path(runs)/profile, pd.DataFrame(dict(y=[1, 2, 3])), alt='A line.', note='Made up.', extra=True)
"""
NOISE = (
    "import os, sys, warnings\nwarnings.warn('loud'); print(object(), os.getcwd(), "
    "sys.executable)\npd.DataFrame(dict(a=[1, 2]))"
)
LIBRARY = "import os\nopen('../starts', 'a').write('x')\nos.environ['IN_TEST']"


def write(folder, name, *cells, parameters=True):
    nb = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    )
    nb.cells = [
        nbformat.v4.new_markdown_cell(f"# {name}\n\n> A test.", id="title"),
        *(nbformat.v4.new_code_cell(c, id=f"{name[:2]}-{i}") for i, c in enumerate(cells)),
    ]
    if parameters:
        nb.cells[1].metadata["tags"] = ["parameters"]
    folder.mkdir(exist_ok=True)
    (folder/name).write_text(nbformat.writes(nb) + "\n", encoding="utf-8")


def edit(path, change):
    "Change a JSON file in place."
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def outputs(path):
    return {
        c["id"]: c["outputs"] for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"
    }
def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A complete run of two notebooks, really executed."
    top = tmp_path_factory.mktemp("made")
    nbs, run = top/"nbs", top/"runs/smoke"
    write(nbs, "10_a.ipynb", STANDARD, TABLE, FIGURE, NOISE)
    write(nbs, "11_b.ipynb", STANDARD, "6*7")
    write(nbs, "00_lib.ipynb", LIBRARY, "#| slow\n1/0", parameters=False)
    run_notebooks(
        (), "smoke", "cpu", runs=top / "runs", notebooks=nbs,
        progress=Progress(top / "runs", "smoke", out=io.StringIO()),
    )
    for name, day, commit in (("a", "01", "c0ffee1234567"), ("b", "02", "beef00012345")):
        write_provenance(Lab("smoke", "cpu", top/"runs"), [], run, name)
        edit(
            run / "provenance.json",
            lambda p: p["notebooks"][name].update(
                code={"commit": commit, "dirty": False}, written=f"2026-01-{day}T00:00:00+00:00"
            ),
        )
    rows = [
        dict(
            id=c, paper=c.split(".")[0], audit="holds", verdict="undecided", margin="", ci_low="", ci_high="", unit="",
            comparisons="", level="", evidence="",
        )
        for c in printed_entries("claims")
    ]
    pd.DataFrame(rows).to_csv(run/"claims.csv", index=False)
    return top


@pytest.fixture
def top(made, tmp_path):
    shutil.copytree(made, tmp_path/"t")
    return tmp_path/"t"


def go(top):
    return publish(top/"runs", "smoke", top/"nbs")


# ---- what is written

def test_outputs_go_to_the_cells_of_the_same_id(top):
    before = json.loads((top/"nbs/10_a.ipynb").read_text())
    done = go(top)
    after = json.loads((top/"nbs/10_a.ipynb").read_text())
    strip = lambda nb: [{k: v for k, v in c.items() if k != "outputs"} for c in nb["cells"]]
    # nothing but outputs, and no cell of papermill's
    assert strip(after) == strip(before)
    found = outputs(top/"nbs/10_a.ipynb")
    assert list(found) == ["10-0", "10-1", "10-2", "10-3"] and outputs(top / "nbs/11_b.ipynb")["11-1"] == [
        {"data": {"text/plain": ["42"]}, "execution_count": None, "metadata": {}, "output_type": "execute_result"}
    ]
    assert set(found["10-1"][0]["data"]) == {"text/html", "text/markdown"} and "66.67" in "".join(
        found["10-1"][0]["data"]["text/html"]
    )
    kinds = [set(o["data"]) for o in found["10-2"]]
    assert {"image/png"} in kinds and "Figure size" not in json.dumps(found)
    assert done.stamp["run"] and sorted(p.name for p in done.changed) == [
        "10_a.ipynb", "11_b.ipynb", "claims.csv", "run.json", "ubt.table1.csv", "ubt.table1.json",
    ]


def test_outputs_name_nothing_of_this_machine_and_no_address(top):
    go(top)
    text = (top/"nbs/10_a.ipynb").read_text()
    said = outputs(top/"nbs/10_a.ipynb")["10-3"]
    assert said[0]["text"] == [f"<object object> …/nbs …/{Path(sys.executable).name}\n"] and "loud" not in json.dumps(
        said
    )
    assert "<table>" in "".join(said[1]["data"]["text/html"]) and "style" not in json.dumps(said)
    assert (
        str(top) not in text
        and not re.search(r"0x[0-9a-f]{6}", text)
        and not any(o["metadata"] for out in outputs(top / "nbs/10_a.ipynb").values() for o in out if "metadata" in o)
    )


def test_the_stamp_says_which_run(top):
    done = go(top)
    about = published(top/"nbs/results")
    keys = {
        n: json.loads((top / f"runs/smoke/notebooks/{n}.ipynb").read_text())["metadata"]["mcl_repro"]["key"]
        for n in "ab"
    }
    assert (
        done.stamp
        == {k: about[k] for k in ("run", "profile", "seeds", "commit")}
        == {"run": batch._hash(keys["a"], keys["b"])[:8], "profile": "smoke", "seeds": 1, "commit": "beef00012345"}
    )
    assert json.loads((top / "nbs/10_a.ipynb").read_text())["metadata"]["mcl_repro"] == {
        **done.stamp,
        "commit": "c0ffee1234567",
        "outputs_of": code_hash(json.loads((top / "nbs/10_a.ipynb").read_text())),
    }
    assert "".join(outputs(top / "nbs/10_a.ipynb")["10-0"][0]["data"]["text/markdown"]) == (
        f"Results below: run `{about['run']}`, profile smoke, commit `c0ffee1`, seeds 1. `make reproduce "
        "PROFILE=smoke` makes them anew."
    )
    part = about["notebooks"]["a"]
    assert (
        part["key"] == keys["a"]
        and part["seconds"] > 0
        and part["parameters"]
        == {"profile": "smoke", "device": "cpu", "jobs": 1, "seeds": 1, "roles": {}, "overrides": {}}
    )
    assert set(about["figures"]) == {f"figures/ubt.lines.{k}" for k in ("csv", "json", "png", "svg")}


def test_records_are_copies_and_can_be_read(top):
    go(top)
    run, results = top/"runs/smoke", top/"nbs/results"
    assert set(contents(results)) == {"run.json", "claims.csv", "tables/ubt.table1.csv", "tables/ubt.table1.json"}
    for f in ("claims.csv", "tables/ubt.table1.csv", "tables/ubt.table1.json"):
        assert (results/f).read_bytes() == (run/f).read_bytes()
    assert (
        published_table("ubt.table1", results).value.dropna().tolist() == [66.66666667]
        and len(published_claims(results)) == 179
    )
    with pytest.raises(SettingsError, match="unknown table 'ubt.table9'"):
        published_table("ubt.table9", results)


@pytest.mark.parametrize("read", [published, published_claims, lambda folder: published_table("ubt.table1", folder), lambda folder: check_published(folder.parent)])
def test_readers_say_when_nothing_is_published(top, read):
    with pytest.raises(
        SettingsError,
        match="nothing is published in .*results yet; make a run and publish it: make reproduce; make publish",
    ):
        read(top/"nbs/results")


def test_publishing_twice_changes_nothing_and_does_not_make_the_run_old(top):
    go(top)
    before, times = contents(top/"nbs"), {p: p.stat().st_mtime_ns for p in (top/"nbs").rglob("*")}
    assert (
        go(top).changed == []
        and contents(top / "nbs") == before
        and {p: p.stat().st_mtime_ns for p in (top / "nbs").rglob("*")} == times
    )
    again = run_notebooks(
        (), "smoke", "cpu", runs=top / "runs", notebooks=top / "nbs",
        progress=Progress(top / "runs", "smoke", out=io.StringIO()),
    )
    assert [r.state for r in again] == ["unchanged", "unchanged"] and check_published(top/"nbs") == []


def test_tables_of_an_earlier_run_go(top):
    go(top)
    stale = top/"nbs/results/tables/mem.table9.csv"
    stale.write_text("old")
    assert go(top).changed == [stale] and not stale.exists()


def test_a_run_on_a_gpu_is_published_without_one(top):
    executed = top/"runs/smoke/notebooks/a.ipynb"
    nb = json.loads(executed.read_text())
    lab = Lab("smoke", "cpu", top/"runs")
    key = batch.run_key(
        top / "nbs/10_a.ipynb", nb["metadata"]["papermill"]["parameters"],
        module.SimpleNamespace(profile=lab.profile, role=lab.role, device="cuda"),
    )
    edit(executed, lambda n: n["metadata"]["mcl_repro"].update(key=key))
    with pytest.raises(SettingsError, match="older than the code"):
        go(top)
    edit(top/"runs/smoke/provenance.json", lambda p: p["notebooks"]["a"].update(device="cuda"))
    assert go(top).stamp


def test_the_librarys_notebooks_are_left_alone_and_can_be_executed(top):
    library = top/"nbs/00_lib.ipynb"
    before = library.read_bytes()
    go(top)
    assert library.read_bytes() == before and list(stale(top/"nbs")) == ["00_lib"]
    assert execute(library) and not execute(library)
    shown = {"data": {"text/plain": ["'1'"]}, "execution_count": None, "metadata": {}, "output_type": "execute_result"}
    assert outputs(library) == {"00-0": [shown], "00-1": []}
    assert stale(top/"nbs") == {} and check_published(top/"nbs") == []


# ---- what is refused, before anything is written

def metadata(top, name="a", **change):
    edit(top/f"runs/smoke/notebooks/{name}.ipynb", lambda n: [n["metadata"][k].update(v) for k, v in change.items()])


def claims(top, change):
    path = top/"runs/smoke/claims.csv"
    frame = change(pd.read_csv(path, dtype=str, keep_default_na=False))
    frame.to_csv(path, index=False)


def shown_number(top):
    "Another number in the executed copy, and the record as it was."
    path = top/"runs/smoke/notebooks/a.ipynb"
    text = path.read_text()
    assert "66.67" in text
    path.write_text(text.replace("66.67", "99.67"))


REFUSED = {
    "missing": (
        lambda t: (t / "runs/smoke/notebooks/b.ipynb").unlink(), SettingsError,
        "notebook 'b' has not been run in .*make reproduce PROFILE=smoke",
    ),
    "no run": (lambda t: shutil.rmtree(t / "runs"), SettingsError, "notebook 'a' has not been run"),
    "failed": (
        lambda t: (t / "runs/smoke/notebooks/b.failed.ipynb").write_text("{}"), SettingsError,
        "last run of notebook 'b' failed",
    ),
    "interrupted": (
        lambda t: metadata(t, papermill={"end_time": None}), SettingsError, "run of notebook 'a' .* was interrupted",
    ),
    "exception": (
        lambda t: metadata(t, papermill={"exception": True}), SettingsError, "run of notebook 'a' .* was interrupted",
    ),
    "no claims": (lambda t: (t / "runs/smoke/claims.csv").unlink(), SettingsError, "claims.csv is missing"),
    "few claims": (lambda t: claims(t, lambda f: f[3:]), SettingsError, r"no row for 3 of 179 claims \(ubt.c01, ...\)"),
    "claim twice": (lambda t: claims(t, lambda f: pd.concat([f, f[:1]])), StoreError, "'ubt.c01', which is twice"),
    "odd verdict": (
        lambda t: claims(t, lambda f: f.assign(verdict=["proven", *f.verdict[1:]])), StoreError,
        "'proven', which is twice or no claim or verdict",
    ),
    "no verdict": (lambda t: claims(t, lambda f: f.drop(columns="verdict")), StoreError, "claims.csv cannot be read"),
    "dirty": (
        lambda t: edit(t / "runs/smoke/provenance.json", lambda p: p["notebooks"]["b"]["code"].update(dirty=True)),
        SettingsError,
        "'b' was run from a tree with changes that are not committed; commit them, then: make reproduce "
        "PROFILE=smoke FORCE=1",
    ),
    "no commit": (
        lambda t: edit(t / "runs/smoke/provenance.json", lambda p: p["notebooks"]["b"]["code"].update(commit=None)),
        SettingsError, "outside of a git checkout",
    ),
    "no provenance": (
        lambda t: edit(t / "runs/smoke/provenance.json", lambda p: p["notebooks"].pop("b")), StoreError,
        "says nothing of notebook 'b'",
    ),
    "edited table": (
        lambda t: (t / "runs/smoke/tables/ubt.table1.csv").write_text("x"), StoreError,
        "ubt.table1.csv is not what notebook 'a' wrote, somebody edited it",
    ),
    "edited note": (
        lambda t: (t / "runs/smoke/tables/ubt.table1.json").write_text("{}"), StoreError, "ubt.table1.json is not what",
    ),
    "lost figure": (
        lambda t: (t / "runs/smoke/figures/ubt.lines.csv").unlink(), StoreError,
        "ubt.lines.csv of notebook .a. is gone",
    ),
    "edited copy": (shown_number, StoreError, "10_a.ipynb #10-1: the table .UBT Table I: .* is not what is on record"),
    "old cell": (
        lambda t: edit(t / "nbs/11_b.ipynb", lambda n: n["cells"][2].update(source=["7*7"])), SettingsError,
        "run of notebook 'b' is older than the code; make it anew: make reproduce",
    ),
    "other id": (
        lambda t: edit(t / "nbs/11_b.ipynb", lambda n: n["cells"][2].update(id="new")), SettingsError,
        "cell new is not in the executed copy",
    ),
    "override": (
        lambda t: metadata(
            t, papermill={"parameters": {"profile": "smoke", "overrides": {"train.epochs": 3}, "seeds": 1}}
        ),
        SettingsError,
        "'a' was run with another overrides than profile smoke",
    ),
    "other profile": (
        lambda t: metadata(t, papermill={"parameters": {"profile": "mini", "seeds": 1}}), SettingsError,
        "another profile",
    ),
    "error": (
        lambda t: edit(
            t / "runs/smoke/notebooks/b.ipynb",
            lambda n: n["cells"][-1].update(
                outputs=[dict(output_type="error", ename="KeyError", evalue="x", traceback=[])]
            ),
        ),
        SettingsError,
        "11_b.ipynb, cell 11-1: KeyError: x",
    ),
}


@pytest.mark.parametrize("harm, error, says", REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_is_written(top, harm, error, says):
    harm(top)
    before = contents(top/"nbs")
    with pytest.raises(error, match=says):
        go(top)
    assert contents(top/"nbs") == before


@pytest.mark.parametrize("name, value", [("_library", lambda *given: "other"), ("VERSIONED", ("pip",))])
def test_a_run_of_other_code_or_versions_is_refused(top, monkeypatch, name, value):
    monkeypatch.setattr(batch, name, value)
    with pytest.raises(SettingsError, match="run of notebook 'a' is older than the code"):
        go(top)


def test_other_versions_are_named(top):
    edit(top/"runs/smoke/provenance.json", lambda p: p["notebooks"]["a"]["packages"].update(torch="1.0"))
    metadata(top, mcl_repro={"key": "0"*64})
    with pytest.raises(SettingsError, match=r"of other versions \(torch 1.0, here "):
        go(top)


def test_different_seeds_are_refused(top):
    lab = Lab("smoke", "cpu", top/"runs")
    given = {
        **json.loads((top / "runs/smoke/notebooks/b.ipynb").read_text())["metadata"]["papermill"]["parameters"],
        "seeds": 3,
    }
    metadata(
        top, "b", papermill={"parameters": given}, mcl_repro={"key": batch.run_key(top / "nbs/11_b.ipynb", given, lab)}
    )
    with pytest.raises(
        SettingsError,
        match=r"different numbers of seeds \(1, 3\); give all the same: make reproduce PROFILE=smoke SEEDS=3",
    ):
        go(top)


def test_a_run_at_work_is_refused(top):
    with FileLock(str(top/"runs/smoke/notebooks/.b.lock")), pytest.raises(SettingsError, match="a run is at work in"):
        go(top)


def test_a_failing_cell_of_the_library_is_refused(top):
    write(top/"nbs", "00_lib.ipynb", "x = []", "x[0]", parameters=False)
    before = contents(top/"nbs")
    with pytest.raises(SettingsError, match=r"00_lib.ipynb: cell 00-1 fails \(IndexError: list index out of range\)"):
        execute(top/"nbs/00_lib.ipynb")
    assert contents(top/"nbs") == before


@pytest.mark.parametrize("limit, says", [("NOTEBOOKS_LIMIT", r"the notebooks have .* MB \(at most 0.00\): 10_a.ipynb \d+ kB"), ("RECORDS_LIMIT", r"the records have .*claims.csv"), ("FIGURE_LIMIT", r"10_a.ipynb, cell 10-2: a picture of \d+ x \d+ pixels")])
def test_what_no_step_makes_small_enough_is_refused(top, monkeypatch, limit, says):
    monkeypatch.setattr(slimming if limit == "FIGURE_LIMIT" else module, limit, 500)
    before = contents(top/"nbs")
    with pytest.raises(SettingsError, match=says):
        go(top)
    assert contents(top/"nbs") == before


def test_pictures_lose_colours_only_where_notebooks_are_too_large(top, monkeypatch):
    go(top)
    picture = lambda: next(
        o["data"]["image/png"] for o in outputs(top / "nbs/10_a.ipynb")["10-2"] if "image/png" in o["data"]
    )
    before = picture()
    monkeypatch.setattr(module, "NOTEBOOKS_LIMIT", sum(p.stat().st_size for p in (top/"nbs").rglob("*.ipynb")) - 100)
    go(top)
    assert len(picture()) < len(before) - 100 and check_published(top/"nbs") == []


def test_a_write_that_fails_leaves_whole_files_and_the_next_one_mends_it(top, monkeypatch):
    before, replace, calls = contents(top/"nbs"), os.replace, []
    def fails(a, b):
        calls.append(b)
        if str(b).endswith("11_b.ipynb"):
            raise OSError(28, "No space left on device")
        replace(a, b)
    with monkeypatch.context() as m:
        m.setattr(report.os, "replace", fails)
        with pytest.raises(StoreError, match="11_b.ipynb: No space left"):
            go(top)
    after = contents(top/"nbs")
    assert (
        after["11_b.ipynb"] == before["11_b.ipynb"] and len(calls) > 1 and not [f for f in after if f.endswith(".part")]
    )
    json.loads(after["10_a.ipynb"])
    assert "results/run.json" not in after                     # `run.json` comes last
    go(top)
    assert check_published(top/"nbs") == []


# ---- slimming

def test_pictures_fit_and_keep_their_colours():
    import matplotlib.pyplot as plt, numpy as np
    from PIL import Image
    fig, ax = plt.subplots(figsize=(4, 3))
    ax.imshow(np.random.default_rng(0).random((8, 8, 3)))
    ax.plot([0, 7], [0, 7], color="#00ff00")
    out = io.BytesIO()
    fig.savefig(out, format="png", transparent=True)
    plt.close(fig)
    data = base64.b64encode(out.getvalue()).decode()
    slim = slim_png(data)
    assert slim == slim_png(data) and len(slim) < len(data)
    seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(slim))).convert("RGB"), int)
    # on white, and the thin green line is green
    assert (seen[0, 0] >= 253).all() and (np.abs(seen - [0, 255, 0]).max(2) < 16).sum() > 100
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (120, 1700, 3), np.uint8)).save(noise, "PNG")
    slim = slim_png(base64.b64encode(noise.getvalue()).decode())
    assert len(slim) <= FIGURE_LIMIT and Image.open(io.BytesIO(base64.b64decode(slim))).width <= 1600


def test_one_form_of_each_output_is_kept():
    out = lambda **data: [
        {
            "output_type": "display_data",
            "metadata": {"x": 1},
            "data": {k.replace("_", "/", 1): v for k, v in data.items()},
        }
    ]
    forms = lambda **data: [set(o["data"]) for o in slim_outputs(out(**data))]
    svg = {"image/svg+xml": "<svg></svg>"}
    assert forms(text_html="<table><tr><td>1</td></tr></table>", text_plain="1", **svg) == [
        {"text/html", "text/plain"}
    ] and forms(**svg) == [{"image/svg+xml"}]
    assert forms(text_html="<table><tr><td>1</td></tr></table>", text_plain="1"*2000) == [{"text/html"}]
    assert (
        forms(text_html="<script>1</script>", text_plain="left") == [{"text/plain"}]
        and forms(text_html="<style></style>") == []
    )
    assert forms(text_markdown="# a", text_plain="# a") == [{"text/markdown"}] and forms(text_plain="<Axes: >") == [
        {"text/plain"}
    ]
    assert forms(application_javascript="1") == [] and forms(text_plain="") == []
    assert slim_outputs(
        [
            {"output_type": "stream", "name": "stderr", "text": "noise"},
            {"output_type": "stream", "name": "stdout", "text": "1%\r2%\r\n"},
        ]
    ) == [{"output_type": "stream", "name": "stdout", "text": ["2%\n"]}]


@pytest.mark.parametrize("text, slim", [("a\rb\rc", "c"), ("50%\r100%\r\n", "100%\n"), ("\x1b[1;31mred\x1b[0m", "red"), ("<x at 0x7f12ab>", "<x>"), ("/".join(["", "home", "me", "data", "x.csv"]), "…/x.csv"), ("open('/tmp/tmp3k/a b')", "open('…/a b')"),
                                        ("\\".join(["C:", "Users", "me", "x.txt"]), "…/x.txt"), ("100%|████| 30/30 [00:02<00:00, 12it/s]\ndone", "done"), ("https://example.org/home/x 1/2 and /nowhere", "https://example.org/home/x 1/2 and /nowhere")])
def test_text(text, slim):
    assert slim_text(text) == slim


@pytest.mark.parametrize("html, plain", [
    ('<p style="x" onclick="y()">a<br/>b</p>', "<p>a<br>b</p>"), ("<script>x</script><style>y</style>z", "z"), ('<i aria-hidden="true">a<br><b>b</b></i>c', "c"), ('<td colspan="2" class="x">1 &lt; 2</td>', '<td colspan="2">1 &lt; 2</td>'),
    ('<a href="javascript:x">a</a><a href="https://x.org">b</a>', '<a>a</a><a href="https://x.org">b</a>'), ('<img src="https://x.org/y.png"><img src="data:image/png;base64,AA">', '<img><img src="data:image/png;base64,AA">'),
    ("<unknown>text</unknown></b>", "text</b>"), ("<pre>a\n  b</pre>", "<pre>a\n  b</pre>")])
def test_html_keeps_what_code_hosts_keep(html, plain):
    assert plain_html(html) == plain


def test_published_notebooks_are_as_nbdev_leaves_them(top):
    """Neither nbdev_clean nor nbdev_export touches them, in a project with these settings and the folder of records
    beside them.
    """
    shutil.copy(ROOT/"settings.ini", top)
    (top/"mcl_repro").mkdir()
    (top/"mcl_repro/__init__.py").write_text("")
    edit(top/"nbs/00_lib.ipynb", lambda n: n["cells"][1].update(source=["#| default_exp lib"]))
    edit(top/"nbs/00_lib.ipynb", lambda n: n["cells"][2].update(source=["#| export\n", "x = 1"]))
    do = lambda what: subprocess.run(
        [sys.executable, "-c", what], cwd=top, capture_output=True, text=True, timeout=100,
        env={**{k: v for k, v in os.environ.items() if k != "IN_TEST"}, "PYTHONPATH": str(ROOT)},
    )
    clean = (
        "from nbdev.doclinks import nbdev_export; from nbdev.clean import nbdev_clean; nbdev_export(); nbdev_clean()"
    )
    assert do(clean).returncode == 0
    go(top)
    before = contents(top/"nbs"), contents(top/"mcl_repro")
    assert before[0]["10_a.ipynb"].count(b'"outputs": []') < 4
    done = do(clean)
    assert done.returncode == 0, done.stderr
    assert (contents(top/"nbs"), contents(top/"mcl_repro")) == before


# ---- nothing is edited without being noticed

def swap(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


HARM = {
    "number": (
        lambda n: swap(n / "10_a.ipynb", "66.67", "96.67"),
        "the table .UBT Table I: .* is not what is on record",
    ),
    "picture": (
        lambda n: edit(n / "10_a.ipynb", lambda b: b["cells"][3].update(outputs=[])),
        "10_a.ipynb: the outputs are not as they were published",
    ),
    "stamp": (
        lambda n: edit(n / "11_b.ipynb", lambda b: b["metadata"]["mcl_repro"].update(run="00000000")),
        "11_b.ipynb: its stamp",
    ),
    "no stamp": (lambda n: edit(n / "11_b.ipynb", lambda b: b["metadata"].pop("mcl_repro")), "11_b.ipynb: its stamp"),
    "record": (
        lambda n: swap(n / "results/tables/ubt.table1.csv", "66.66666667", "99.9"),
        "results/tables/ubt.table1.csv: not as it was published",
    ),
    "verdict": (lambda n: swap(n / "results/claims.csv", "undecided", "reproduced"), "results/claims.csv: not as"),
    "lost record": (lambda n: (n / "results/tables/ubt.table1.json").unlink(), "ubt.table1.json: not as"),
    "lost notebook": (lambda n: (n / "11_b.ipynb").unlink(), "b: published, but there is no such notebook"),
}


@pytest.mark.parametrize("harm, says", HARM.values(), ids=HARM)
def test_edits_are_noticed(top, harm, says):
    go(top)
    assert check_published(top/"nbs") == []
    harm(top/"nbs")
    assert any(re.search(says, w) for w in check_published(top/"nbs"))


def test_a_verdict_that_is_shown_is_the_one_on_record():
    known = pd.DataFrame(dict(id=["ubt.c01", "ubt.c02"], verdict=["reproduced", "not_testable"]))
    wrong = lambda **forms: module._wrong_claims([("x", {k.replace("_", "/"): v for k, v in forms.items()})], known)
    row = "<table><tr><th>claim</th></tr><tr><td>ubt.c01</td><td>{}</td><td>holds</td></tr></table>".format
    assert (
        wrong(text_html=row("reproduced"))
        == wrong(text_html=row("<b>reproduced</b>"))
        == wrong(text_html=row(""))
        == wrong(text_markdown="| `ubt.c02` | not testable |")
        == []
    )
    assert wrong(text_html=row("contradicted")) == ["x: ubt.c01 is contradicted, on record reproduced"] and wrong(
        text_markdown="| `ubt.c02` | undecided |"
    )


def test_command(top, capsys):
    assert main(["--profile", "smoke", "--runs", str(top/"runs"), "--notebooks", str(top/"nbs")]) == 0
    assert re.fullmatch(
        r"published run [0-9a-f]{8} of profile smoke, commit beef000: 6 files changed, notebooks have 0.0 MB\n",
        capsys.readouterr().out,
    )
    (top/"runs/smoke/claims.csv").unlink()
    assert main(["--profile", "smoke", "--runs", str(top/"runs"), "--notebooks", str(top/"nbs")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# ---- this checkout

RESULTS = ROOT/"nbs/results"
here = pytest.mark.skipif(
    not (RESULTS / "run.json").exists(),
    reason="nothing is published in this checkout yet (make reproduce; make publish)",
)


@here
def test_published_notebooks_and_records_agree():
    assert check_published(ROOT/"nbs") == []


@here
def test_every_published_table_is_drawn_from_its_record():
    shown = [
        {k: "".join(v) for k, v in o["data"].items()}
        for p in (ROOT / "nbs").glob("1[0-9]_*.ipynb")
        for out in outputs(p).values()
        for o in out
        if "data" in o
    ]
    html = {f["text/markdown"].strip(): f["text/html"] for f in shown if f.get("text/markdown", "").startswith("### ")}
    drawn = {}
    for path in RESULTS.glob("tables/*.csv"):
        view = show_table(read_table(path), json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["note"])
        drawn[str(view).strip()] = plain_html(view._repr_html_())
    assert html == drawn and len(drawn) == len(list(RESULTS.glob("tables/*.csv")))


@here
def test_published_claims_are_those_of_the_papers():
    claims = published_claims()
    assert sorted(claims.id) == sorted(printed_entries("claims")) and set(claims.verdict) <= set(VERDICTS)


@here
def test_the_stamp_of_every_notebook_is_the_published_run():
    about = published()
    papers = find_notebooks(ROOT/"nbs")
    assert set(about["notebooks"]) == set(papers)
    for name, path in papers.items():
        stamp = json.loads(path.read_text(encoding="utf-8"))["metadata"]["mcl_repro"]
        wanted = {
            "run": about["run"],
            "profile": about["profile"],
            "seeds": about["seeds"],
            "commit": about["notebooks"][name]["commit"],
        }
        assert {k: stamp[k] for k in wanted} == wanted
        assert f"run `{about['run']}`" in json.dumps(outputs(path))


@here
def test_published_files_are_small():
    notebooks = [p for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]
    shown = [o.get("data", {}) for p in notebooks for found in outputs(p).values() for o in found]
    assert max(len(data["image/png"]) for data in shown if "image/png" in data) <= 150_000 == FIGURE_LIMIT
    assert sum(p.stat().st_size for p in notebooks) <= 12_000_000 == NOTEBOOKS_LIMIT
    assert sum(p.stat().st_size for p in RESULTS.rglob("*") if p.is_file()) <= 1_000_000 == RECORDS_LIMIT
    assert (RESULTS/"readme.png").stat().st_size < 60_000


@here
def test_an_edited_number_is_noticed_here_too(tmp_path):
    shutil.copytree(ROOT/"nbs", tmp_path/"nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    path = tmp_path/"nbs/ubt.ipynb"
    number = re.search(r"<b>(\d+\.\d+)</b>", path.read_text(encoding="utf-8"))[1]
    swap(path, f"<b>{number}</b>", f"<b>{float(number) + 1:.2f}</b>")
    assert any("is not what is on record" in w for w in check_published(tmp_path/"nbs"))
