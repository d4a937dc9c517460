"Notebooks run headless: a throw-away notebook per test, no torch, no network."
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import nbformat
import pytest
from paper_notebooks import STANDARD, TABLE, write
from processes import alive, gone

import mcl_repro
from mcl_repro.run import headless
from mcl_repro.run.batch import Progress, run_notebooks
from mcl_repro.run.headless import executed_metadata, is_unchanged, NotebookError, run_key
from mcl_repro.run.notebook_pages import notebook_page, shows_something
from mcl_repro.core.errors import DataError, SettingsError, TrainingError, UserError
from mcl_repro.lab.lab import Lab
from mcl_repro.lab.profiles import load_profile
from mcl_repro.lab.status import read_status
from mcl_repro.papers.stages import poisoned_pairs
from mcl_repro.run.notebooks import chosen_outputs

VALUE = STANDARD + "value = 80.0"


@pytest.fixture
def nbs(tmp_path):
    write(tmp_path/"nbs", "ubt.ipynb", VALUE, TABLE, "assert value < 100")
    return tmp_path/"nbs"


def go(nbs, papers="ubt", **options):
    "Run notebooks in profile smoke."
    runs = nbs.parent/"runs"
    quiet = Progress(runs, "smoke", out=io.StringIO())
    usual = dict(profile="smoke", device="cpu", runs=runs, notebooks=nbs, progress=quiet)
    return run_notebooks(papers, **usual | options)


def results(nbs):
    "Where they go."
    return nbs.parent/"runs/smoke"


def metadata(path):
    "The metadata of an executed copy."
    return json.loads(path.read_text())["metadata"]


# what a run leaves behind

def test_run_leaves_copy_page_table_and_report(nbs):
    done, = go(nbs)
    out = results(nbs)
    assert done.state == "complete" and done.notebook == out/"notebooks/ubt.ipynb"
    tables = {f"tables/ubt.table1.{s}" for s in ("csv", "json", "md", "tex")}
    written = {p.relative_to(out).as_posix() for p in out.rglob("[!.]*") if p.is_file()}
    assert written == {"index.html", "notebooks/ubt.html", "notebooks/ubt.ipynb", "ro-crate-metadata.json",
                       "ro-crate-preview.html"} | tables
    meta = metadata(done.notebook)
    assert meta["papermill"]["exception"] is None and meta["papermill"]["end_time"]
    assert set(meta["mcl_repro"]["outputs"]) == tables
    assert "notebooks/ubt.html" in (out/"index.html").read_text()


def test_executed_copy_and_page_name_no_folder_of_this_machine(nbs):
    go(nbs)
    for path in results(nbs).rglob("*"):
        if path.is_file():
            assert str(nbs.parent) not in path.read_text(errors="replace"), path


def test_a_notebook_in_a_folder_of_its_own_gives_the_same_results_in_the_same_place(nbs):
    write(nbs/"papers", "ubt.ipynb", VALUE, TABLE)
    (nbs/"ubt.ipynb").unlink()
    done, = go(nbs)
    assert done.notebook == results(nbs)/"notebooks/ubt.ipynb" and (results(nbs)/"tables/ubt.table1.csv").exists()
    assert metadata(done.notebook)["papermill"]["parameters"]["runs"] == "../../runs"


def test_a_table_that_the_notebook_no_longer_writes_goes(nbs):
    go(nbs)
    out = results(nbs)/"tables"
    (out/"mem.table1.csv").write_text("of another notebook")
    write(nbs, "ubt.ipynb", STANDARD, "x = 1")
    go(nbs)
    assert sorted(p.name for p in out.iterdir()) == ["mem.table1.csv"]


def test_examples_are_left_out_and_keep_what_is_stored(nbs):
    path = nbs/"ubt.ipynb"
    write(nbs, "ubt.ipynb", STANDARD, "1/0", "print('run')")
    notebook = nbformat.read(path, as_version=4)
    example = notebook.cells[1]
    example.metadata["tags"] = ["hide-input", "example"]
    example.outputs, example.execution_count = [nbformat.v4.new_output("stream", text="as stored")], 7
    nbformat.write(notebook, path)
    done, = go(nbs)
    shown = [cell for cell in nbformat.read(done.notebook, as_version=4).cells if cell.outputs]
    assert [cell.outputs[0].text for cell in shown] == ["as stored", "run\n"] and shown[0].execution_count == 7
    assert "as stored" in done.notebook.with_suffix(".html").read_text()


# when it runs again

def test_second_run_does_nothing_until_something_changes(nbs):
    done, = go(nbs)
    out, before, key = results(nbs), done.notebook.stat().st_mtime_ns, metadata(done.notebook)["mcl_repro"]["key"]
    assert go(nbs, jobs=2)[0].state == "unchanged"      # how many processes does not change a result
    assert done.notebook.stat().st_mtime_ns == before
    assert is_unchanged(out, "ubt", key) and not is_unchanged(out, "ubt", "other")
    for path in (out/"tables/ubt.table1.csv", out/"tables/ubt.table1.tex", out/"notebooks/ubt.html"):
        content = path.read_bytes()
        path.unlink()
        assert not is_unchanged(out, "ubt", key)
        path.write_bytes(content)
        assert is_unchanged(out, "ubt", key)
    (out/"tables/ubt.table1.csv").write_text("edited by hand")
    assert not is_unchanged(out, "ubt", key)


def test_another_value_or_force_runs_it_again(nbs):
    go(nbs)
    assert go(nbs, parameters={"value": 81.0})[0].state == "complete"
    assert ",81," in (results(nbs)/"tables/ubt.table1.csv").read_text()
    assert go(nbs, parameters={"value": 81.0}, force=True)[0].state == "complete"


@pytest.fixture
def lab(nbs):
    return Lab("smoke", device="cpu", runs=nbs.parent/"runs")


def test_a_file_of_weights_is_part_of_the_key_and_found_from_the_notebook(nbs, lab, monkeypatch):
    weights = nbs.parent/"mine"/"victim.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"one")
    monkeypatch.chdir(nbs.parent)
    checkpoints, others = {"BadNet": "mine/victim.safetensors"}, {"model.pretrained": "openai", "poison.count": 3}
    given = headless._weights_from(nbs, nbs.parent, {"poison.checkpoints": checkpoints, **others})
    found = {"BadNet": os.path.join("..", "mine", "victim.safetensors")}
    assert given == {"poison.checkpoints": found, **others}
    first = run_key(nbs/"ubt.ipynb", {"overrides": given}, lab)
    weights.write_bytes(b"two")
    assert run_key(nbs/"ubt.ipynb", {"overrides": given}, lab) != first
    weights.write_bytes(b"one")
    assert run_key(nbs/"ubt.ipynb", {"overrides": given}, lab) == first
    assert run_key(nbs/"ubt.ipynb", {"overrides": {}}, lab) != first


def test_key_follows_parameters_but_not_where_and_how(nbs, lab):
    def key(**parameters):
        return run_key(nbs/"ubt.ipynb", parameters, lab)
    first = key(seeds=1, runs="a")
    assert key(seeds=2, runs="a") != first
    assert key(seeds=1, runs="b", jobs=4) == first


def test_key_follows_source_library_data_and_versions(nbs, lab, monkeypatch):
    def key():
        return run_key(nbs/"ubt.ipynb", {}, lab)
    first = key()
    for name in ("library_key", "source_key"):
        with monkeypatch.context() as m:
            m.setattr(headless, name, lambda *given: "other")
            assert key() != first
    with monkeypatch.context() as m:
        m.setattr(headless, "package_version", lambda package: "0.0")
        assert key() != first
    role = next(iter(lab.profile["roles"]))
    ref = lab.role(role)
    lab._roles[role] = type(ref)(ref.source, "0" * 64)
    assert key() != first


# what is refused

@pytest.mark.parametrize("given, says", [
    ({"parameters": {"valeu": 1.}}, "no parameter 'valeu' \\(did you mean value\\?\\)"),
    ({"parameters": {"value": "x"}}, "is float"),
    ({"parameters": {"seeds": 2}}, "option of its own"),
    ({"papers": "mme"}, "unknown paper 'mme'; known: ubt"),
    ({"profile": "huge"}, "unknown profile 'huge'"),
    ({"roles": {"jury": "x"}}, "unknown role 'jury'"),
    ({"overrides": {"train.epoch": 1}}, "train.epoch"),
    ({"jobs": 0}, "jobs is 0"),
    ({"seeds": 0}, "seeds is 0"),
    ({"device": "tpu"}, "'tpu'"),
])
def test_wrong_requests_are_refused_before_anything_runs(nbs, given, says):
    with pytest.raises(SettingsError, match=says):
        go(nbs, **given)
    assert not (results(nbs)/"notebooks").exists()


def test_role_with_missing_data_is_refused_before_anything_runs(nbs):
    role = next(iter(load_profile("smoke")["roles"]))
    with pytest.raises(UserError, match="nowhere.csv"):
        go(nbs, roles={role: str(nbs/"nowhere.csv")})
    assert not (results(nbs)/"notebooks").exists()


def test_parameters_that_a_notebook_lacks_are_named(nbs):
    write(nbs, "ubt.ipynb", "x = 1")
    with pytest.raises(SettingsError, match="lacks profile"):
        go(nbs)


# what goes wrong on the way

@pytest.mark.parametrize("kind", [DataError, TrainingError])
def test_a_users_error_in_a_cell_comes_through_as_its_own_line(nbs, kind):
    deep = f"""from mcl_repro.core.errors import {kind.__name__}
def deep(n):
    if n: deep(n-1)
    else: raise {kind.__name__}("photo.jpg is missing; restore it")
deep(20)"""
    write(nbs, "ubt.ipynb", STANDARD, deep)
    with pytest.raises(kind) as e:
        go(nbs)
    assert str(e.value) == "photo.jpg is missing; restore it"
    assert "photo.jpg is missing" in (results(nbs)/"index.html").read_text()


def test_a_failed_run_keeps_the_last_good_copy_and_the_others_run(nbs):
    write(nbs, "mem.ipynb", STANDARD, "ok = True")
    go(nbs, ())
    out = results(nbs)/"notebooks"
    good = (out/"ubt.ipynb").read_bytes()
    write(nbs, "ubt.ipynb", STANDARD, "numbers = []", "numbers[0]")
    write(nbs, "mem.ipynb", STANDARD, "ok = 2")
    says = r"notebook 'ubt' stopped in cell \d+: IndexError: list index out of range \(traceback in .*ubt.failed.html\)"
    with pytest.raises(NotebookError, match=says):
        go(nbs, ())
    assert (out/"ubt.ipynb").read_bytes() == good and "ok = 2" in (out/"mem.ipynb").read_text()
    assert "IndexError" in (out/"ubt.failed.html").read_text()
    assert "of the run before" in (results(nbs)/"index.html").read_text()
    assert executed_metadata(out/"ubt.failed.ipynb") == {}
    write(nbs, "ubt.ipynb", VALUE, TABLE)
    go(nbs, ())
    assert sorted(p.name for p in out.glob("[!.]*")) == ["mem.html", "mem.ipynb", "ubt.html", "ubt.ipynb"]


def test_a_dead_kernel_is_not_a_finished_notebook(nbs):
    write(nbs, "ubt.ipynb", STANDARD, "import os\nos.kill(os.getpid(), 9)")
    with pytest.raises(NotebookError, match="its Python process died"):
        go(nbs)
    out = results(nbs)/"notebooks"
    assert not (out/"ubt.ipynb").exists() and not list(out.glob(".ubt.*.ipynb"))


def test_kernel_is_this_interpreter_with_this_package(nbs, tmp_path, monkeypatch):
    "A kernelspec called python3 that points elsewhere is ignored, and so is the name in the notebook."
    spec = tmp_path/"share/kernels/python3"
    spec.mkdir(parents=True)
    about = {"argv": ["/bin/false", "{connection_file}"], "display_name": "python3", "language": "python"}
    (spec/"kernel.json").write_text(json.dumps(about))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path/"share"))
    package = mcl_repro.__file__
    check = f"""import sys, os, mcl_repro
assert sys.executable == {sys.executable!r}
assert mcl_repro.__file__ == {package!r}
assert os.getcwd() == {str(nbs)!r}
assert os.environ["MCL_REPRO_NOTEBOOK"] == "ubt" """
    write(nbs, "ubt.ipynb", STANDARD, check, kernel="conda-elsewhere")
    assert go(nbs)[0].state == "complete" and "MCL_REPRO_NOTEBOOK" not in os.environ


def test_paths_with_spaces_and_without_permission(tmp_path):
    odd = tmp_path/"my runs ü"
    write(odd/"nbs", "ubt.ipynb", VALUE, TABLE)
    assert go(odd/"nbs")[0].state == "complete" and (odd/"runs/smoke/tables/ubt.table1.csv").exists()
    blocked = odd/"blocked"
    blocked.write_text("a file where a folder should be")
    with pytest.raises(UserError):
        go(odd/"nbs", runs=blocked)


# its page

def test_page_of_a_notebook_loads_nothing_and_draws_formulas():
    text = "# Loss & <loss>\n\nInline $\\frac{1}{2}$, `code $x$`, and\n\n$$\\sum_i x_i$$\n\n$\\unknowncommandhere{$"
    cells = [nbformat.v4.new_markdown_cell(text), nbformat.v4.new_code_cell("#| hide\nsecret = 1"),
             nbformat.v4.new_code_cell('#| export\nvisible = "a < b"')]
    page = notebook_page(nbformat.v4.new_notebook(cells=cells), "ubt")
    assert "<mfrac>" in page and 'display="block"' in page and "$x$" in page and "unknowncommandhere" in page
    assert "secret" not in page and "visible" in page and "#| export" not in page
    assert not any(w in page for w in ("https://cdn", "<script src", "require.min.js", "MathJax.js"))


def test_outputs_that_show_nothing():
    shown = [{"text": "a"}, {"data": {"text/plain": "x"}}, {"ename": "ValueError"}]
    hidden = [{"text": " \n"}, {"data": {"text/plain": ""}}]
    assert [shows_something(o) for o in shown + hidden] == [True] * 3 + [False] * 2


# steps of a plan, and notebooks as views of them

WATCHED = STANDARD + """tables = []
figures = []
"""
VIEW = """
from pathlib import Path
from mcl_repro.report.tables import tidy, write_table
if False:
    from mcl_repro.tiny import tiny_plan
asked = [t for t in tables if "table" in t] or ["ubt.table1", "ubt.table2"]
with open(Path(runs)/"views", "a") as told:
    told.write(" ".join(asked) + "\\n")
for table in asked:
    row = dict(attack="BadNet", defense="UBT", metric="CA", value=70., unit="%")
    write_table(tidy(table, [row]), table, Path(runs)/profile, "Made-up numbers.")
"""


def made_up_plan(lab, settings, tables=()):
    "Table I reads a poisoned set; Table II another one, and a third, which fails where there are not so many pairs."
    attack = dict(settings.attacks.BadNet)
    def poisoned(count):
        return lab.node(poisoned_pairs, pairs=lab.role("finetune"), attack=attack, target="banana", count=count,
                        image_size=32)
    readers = {"ubt.table1": [poisoned(3)], "ubt.table2": [poisoned(4), poisoned(settings.poison.count)]}
    readers = {id: nodes for id, nodes in readers.items() if id in (tables or readers)}
    return SimpleNamespace(readers=readers, nodes=[node for nodes in readers.values() for node in nodes])


@pytest.fixture
def planned(tmp_path, monkeypatch):
    "A paper with a plan of three steps."
    module = ModuleType("mcl_repro.tiny")
    module.ubt_plan = module.tiny_plan = made_up_plan
    monkeypatch.setitem(sys.modules, "mcl_repro.tiny", module)
    write(tmp_path/"nbs", "ubt.ipynb", WATCHED, VIEW.replace("tiny_plan", "ubt_plan"))
    (tmp_path/"runs").mkdir()
    return tmp_path/"nbs"


def views(nbs):
    "What the notebook was shown for, each time."
    return (nbs.parent/"runs/views").read_text().splitlines()


def test_a_headline_table_is_shown_before_the_rest_is_computed(planned):
    done, = go(planned)
    assert done.state == "complete" and views(planned) == ["ubt.table1", "ubt.table1 ubt.table2"]
    rows = read_status(planned.parent/"runs", "smoke")
    assert {row["state"] for row in rows} == {"done"}
    assert sorted(row["readers"] for row in rows) == [["ubt.table1"], ["ubt.table2"], ["ubt.table2"]]
    assert go(planned)[0].state == "unchanged"


def test_with_everything_in_the_store_a_notebook_is_shown_once(planned):
    go(planned)
    (planned.parent/"runs/views").unlink()
    assert go(planned, force=True)[0].state == "complete" and views(planned) == ["ubt.table1 ubt.table2"]


PAIRED = """
import os, time
from pathlib import Path
if False:
    from mcl_repro.tiny import PAPER_plan
me, other = os.environ["MCL_REPRO_NOTEBOOK"], {"ubt": "mem", "mem": "ubt"}[os.environ["MCL_REPRO_NOTEBOOK"]]
(Path(runs)/f"{me}.here").touch()
end = time.time() + 60
while not tables and not (Path(runs)/f"{other}.here").exists():      # waits only where all is shown
    assert time.time() < end, "the other one never came"
    time.sleep(.05)
"""


@pytest.fixture
def pair(planned):
    "Two papers with steps in common, whose notebooks wait for each other."
    def mem_plan(lab, settings, tables=()):
        made = made_up_plan(lab, settings)
        return SimpleNamespace(readers={"mem.table2": made.readers["ubt.table2"]}, nodes=made.readers["ubt.table2"])
    sys.modules["mcl_repro.tiny"].mem_plan = mem_plan
    for name in ("ubt", "mem"):
        write(planned, f"{name}.ipynb", WATCHED, PAIRED.replace("PAPER", name))
    return planned


def test_notebooks_of_a_full_store_are_shown_side_by_side(pair):
    assert [done.state for done in go(pair, ["ubt", "mem"], jobs=2)] == ["complete", "complete"]
    assert [path.name for path in sorted((pair.parent/"runs").glob("*.here"))] == ["mem.here", "ubt.here"]
    copies = [metadata(results(pair)/f"notebooks/{name}.ipynb")["mcl_repro"]["command"] for name in ("ubt", "mem")]
    assert [command.split()[2] for command in copies] == ["ubt", "mem"]
    assert not any(name.startswith("MCL_REPRO_FAILED") for name in os.environ)


def test_an_error_in_one_of_two_notebooks_does_not_stop_the_other(pair):
    write(pair, "mem.ipynb", WATCHED, PAIRED.replace("PAPER", "mem"), "1/0")
    with pytest.raises(NotebookError, match="notebook 'mem' stopped.*ZeroDivisionError"):
        go(pair, ["ubt", "mem"], jobs=2)
    assert executed_metadata(results(pair)/"notebooks/ubt.ipynb")


def test_a_stop_ends_all_kernels(pair):
    for name in ("ubt", "mem"):
        write(pair, f"{name}.ipynb", WATCHED, PAIRED.replace("PAPER", name),
              "if not tables:\n    (Path(runs)/f'{me}.pid').write_text(str(os.getpid()))\n    time.sleep(300)")
    files = [pair.parent/f"runs/{name}.pid" for name in ("ubt", "mem")]
    def stop():      # Ctrl-C, when both sleep
        for file in files:
            wait_for(file)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    threading.Thread(target=stop, daemon=True).start()
    began = time.time()
    with pytest.raises(KeyboardInterrupt):
        go(pair, ["ubt", "mem"], jobs=2)
    assert time.time() - began < 200
    assert gone([int(file.read_text()) for file in files]) is True
    out = results(pair)/"notebooks"
    assert not [*out.glob(".*.ipynb"), *out.glob("*.failed.*")]


def test_one_table_alone_leaves_the_others_as_they_are(planned):
    go(planned)
    other = results(planned)/"tables/ubt.table2.csv"
    before = other.stat().st_mtime_ns
    done, = go(planned, (), outputs=chosen_outputs(["ubt.table1"]))
    assert views(planned)[-1] == "ubt.table1" and other.stat().st_mtime_ns == before
    assert metadata(done.notebook)["mcl_repro"]["command"] == (
        "mcl_repro run ubt --profile smoke --table ubt.table1 --device cpu"
    )
    assert go(planned)[0].state == "complete"      # the copy is of the part, so the whole is shown again


def test_a_step_that_fails_stops_only_what_needs_it(planned):
    with pytest.raises(UserError, match="400"):
        go(planned, overrides={"poison.count": 100_000})
    assert views(planned)[0] == "ubt.table1" and (results(planned)/"tables/ubt.table1.csv").exists()
    states = {tuple(row["readers"]): row["state"] for row in read_status(planned.parent/"runs", "smoke")}
    assert states[("ubt.table1",)] == "done" and "failed" in states.values()


@pytest.mark.parametrize("asked, says", [
    (dict(tables=["ubt.table99"]), "unknown table or figure 'ubt.table99'"),
    (dict(tables=["table1"]), "such as ubt.table1"),
    (dict(claims=["ubt.c999"]), "unknown claim 'ubt.c999'"),
    (dict(tables=["nobody.table1"]), "unknown paper 'nobody'"),
])
def test_a_table_that_there_is_not_is_refused_before_anything_runs(tmp_path, asked, says):
    with pytest.raises(SettingsError, match=says):
        run_notebooks((), "smoke", "cpu", runs=tmp_path/"runs", outputs=chosen_outputs(**asked))
    assert not (tmp_path/"runs/smoke/notebooks").exists()


# being stopped

def start(nbs, *more):
    "The same run as a process of its own."
    words = ["run", "ubt", "--profile", "smoke", "--device", "cpu", "--runs", str(nbs.parent/"runs"),
             "--notebooks", str(nbs)]
    return subprocess.Popen([sys.executable, "-m", "mcl_repro", *words, *more], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"),
                            cwd=Path(mcl_repro.__file__).parent.parent, start_new_session=True)


def wait_for(path, seconds=90):
    end = time.time() + seconds
    while not path.exists() or not path.read_text():
        assert time.time() < end, f"{path} did not appear"
        time.sleep(.05)
    return path.read_text()


SLEEPER = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])
part = os.path.join(runs, '..', 'pids.part')
open(part, 'w').write(f'{os.getpid()} {child.pid}')
os.rename(part, os.path.join(runs, '..', 'pids'))
time.sleep(300)
"""


@pytest.mark.parametrize("how, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_ends_kernel_and_children_within_seconds(nbs, how, code):
    write(nbs, "ubt.ipynb", STANDARD, SLEEPER)
    process = start(nbs)
    try:
        pids = [int(p) for p in wait_for(nbs.parent/"pids").split()]
        assert all(map(alive, pids))
        began = time.time()
        process.send_signal(how)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code and time.time() - began < 30, err
        assert "Traceback" not in err and (how == signal.SIGTERM or "stopped; what is finished is kept" in err)
        assert gone(pids) is True
    finally:
        process.kill()
        process.wait()
    out = results(nbs)/"notebooks"
    assert not (out/"ubt.ipynb").exists() and not list(out.glob(".ubt.*.ipynb"))


def test_killed_batch_is_not_done_and_the_next_run_is(nbs):
    write(nbs, "ubt.ipynb", STANDARD, SLEEPER)
    process = start(nbs)
    kernel, child = (int(p) for p in wait_for(nbs.parent/"pids").split())
    process.kill()
    process.wait()
    out = results(nbs)/"notebooks"
    try:
        assert not (out/"ubt.ipynb").exists()
        write(nbs, "ubt.ipynb", VALUE, TABLE)
        assert go(nbs)[0].state == "complete"
        assert not list(out.glob(".ubt.*.ipynb"))
    finally:
        for pid in (kernel, child):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def test_two_runs_at_once_do_the_work_once(nbs):
    told = "import os, time\nopen(os.path.join(runs, '..', 'starts'), 'a').write('x')\ntime.sleep(1)"
    write(nbs, "ubt.ipynb", STANDARD, told)
    both = [start(nbs), start(nbs)]
    errs = [p.communicate(timeout=60)[1] for p in both]
    assert [p.returncode for p in both] == [0, 0], errs
    assert (nbs.parent/"starts").read_text() == "x" and sum("unchanged" in e for e in errs) == 1


def test_progress_finds_its_run_from_another_folder(tmp_path, monkeypatch):
    "papermill changes the working directory while a notebook runs; a relative folder must still be the one meant."
    monkeypatch.chdir(tmp_path)
    progress = Progress("runs", "smoke", out=io.StringIO())
    monkeypatch.chdir(tmp_path.parent)
    assert progress.runs == tmp_path/"runs"
