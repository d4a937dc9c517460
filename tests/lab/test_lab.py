"""Profiles, keys, store, engines, status and cleaning of the lab; the killing is in test_crash.py."""
import importlib, inspect, json, linecache, os, signal, subprocess, sys, tempfile, time, warnings
from pathlib import Path

import numpy as np
import pytest

import lab_stages
from lab_bench import DEADLINE, await_end, await_that, clean_all, content, environment
from lab_stages import graph
from mcl_repro.core.errors import SettingsError, StoreError, TrainingError
from mcl_repro.core.files import read_json, write_json
from mcl_repro.lab import engine, identity, nodes
from mcl_repro.lab.attempt import StageError
from mcl_repro.lab.cleaning import clean_store
from mcl_repro.lab.engine import _connect, _end
from mcl_repro.lab.identity import _CODE, _data_files, _file_of, _MODULES, code_of
from mcl_repro.lab.lab import Lab
from mcl_repro.lab.nodes import node_spec, stage
from mcl_repro.lab.profiles import load_profile
from mcl_repro.lab.status import read_plan, read_status, with_inputs, write_plan


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_STARTS", str(tmp_path/"starts"))
    return Lab("smoke", device="cpu", runs=tmp_path/"runs")


def starts(lab):
    return [l.split()[0] for l in (lab.runs.parent/"starts").read_text().splitlines()]


def python(code, *args, **more):
    "Run code in a process of its own; `more` goes into its environment."
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(**more), timeout=DEADLINE)


# ---- imports and profiles

def test_the_lab_comes_without_what_takes_seconds_to_import():
    out = python("import sys, mcl_repro.lab.lab; print(*sys.modules)")
    assert not {"torch", "distributed", "pandas", "matplotlib"} & set(out.stdout.split())


@pytest.mark.parametrize("name", ["smoke", "mini", "paper"])
def test_profiles_of_the_package(name):
    profile = load_profile(name)
    assert all(isinstance(v, str) and ":" in v for v in profile["roles"].values())
    assert set(profile["roles"]) == set(load_profile("mini")["roles"])


@pytest.fixture
def profiles(tmp_path):
    path = tmp_path/"profiles.yaml"
    path.write_text("""
a:
  train: {epochs: 2, lr: 1e-3, amp: false, name: x, sizes: [1, 2], limit: null}
  roles: {train: "world:train:10"}
b: {extends: a, train: {epochs: 9}}
c: {extends: d}
d: {extends: c}
""")
    return lambda *args, **kwargs: load_profile(*args, path=path, **kwargs)


def test_a_profile_extends_another_and_is_changed_by_type(profiles, tmp_path):
    with pytest.raises(SettingsError, match="extends"):
        profiles("b")
    path = tmp_path/"profiles.yaml"
    path.write_text(path.read_text().rpartition("c: ")[0])
    assert profiles("b").train == {"epochs": 9, "lr": 0.001, "amp": False, "name": "x", "sizes": [1, 2], "limit": None}
    given = {"train.lr": 1, "train.amp": True, "train.limit": 5, "train.sizes": (3,)}
    changed = profiles("b", given, {"train": "my.csv"})
    assert changed.train == {"epochs": 9, "lr": 1.0, "amp": True, "name": "x", "sizes": [3], "limit": 5}
    assert type(changed.train.lr) is float
    assert changed.roles == {"train": "my.csv"} and profiles("a").roles == {"train": "world:train:10"}
    wrong_types = {"train.epochs": (2.5, True), "train.amp": (1,), "train.name": (3,), "train.sizes": (3,)}
    for name, values in wrong_types.items():
        for value in values:
            with pytest.raises(SettingsError, match="is .* in the profile, not"):
                profiles("a", {name: value})
    for wrong in [{"train": {}}, {"epochs": 3}, {"train.epochs.x": 3}, {"roles.train": "x"}]:
        with pytest.raises(SettingsError, match="unknown setting"):
            profiles("a", wrong)


def test_profile_errors_are_one_line_with_the_remedy(profiles, tmp_path):
    (tmp_path/"profiles.yaml").write_text("a: {x: 1}\n")
    for call, says in [
        (lambda: profiles("z"), "unknown profile 'z'; known: a"),
        (lambda: profiles("a", {"y": 1}), "unknown setting 'y' for profile 'a'; known: x"),
        (lambda: profiles("a", roles={"r": "s"}), "unknown role 'r' for profile 'a'; known: none"),
    ]:
        with pytest.raises(SettingsError) as e:
            call()
        assert str(e.value) == says


def test_cuda_where_there_is_none_is_refused_before_anything_runs(tmp_path):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(SettingsError, match="device cuda was asked for, but torch sees no GPU here"):
        Lab("smoke", device="cuda", runs=tmp_path/"runs")
    assert not (tmp_path/"runs").exists() and Lab("smoke", runs=tmp_path).device == "cpu"


def test_roles_become_data_references(tmp_path):
    pytest.importorskip("mcl_repro.data")
    lab = Lab("smoke", device="cpu", runs=tmp_path)
    role = next(iter(lab.profile["roles"]), None) or pytest.skip("profile smoke has no roles yet")
    ref = lab.role(role)
    assert ref.source == lab.profile["roles"][role] and ref is lab.role(role)
    a, b = (lab.node(lab_stages.fail, kind=k) for k in (ref, "none"))
    assert a.key != b.key and lab.node(lab_stages.fail, kind=lab.role(role)).key == a.key


# ---- keys

CHANGES = {  # code in which 1 becomes 2, and the key has to change
    "body": "def f(w): return 1",
    "default": "def g(x=1): return x\ndef f(w): return g()",
    "constant": "X = 1\ndef f(w): return X",
    "constant changed later": "X = {}\nX[0] = 1\ndef f(w): return X",
    "lambda": "g = lambda: 1\ndef f(w): return g()",
    "conditional definition": "try: import nothing\nexcept ImportError:\n  def g(): return 1\ndef f(w): return g()",
    "decorator": "def d(g): return lambda w: 1\n@d\ndef f(w): return 0",
    "base class": "class A:\n  def m(s): return 1\nclass B(A): pass\ndef f(w): return B().m()",
    "special method": "class A:\n  def __len__(s): return 1\ndef f(w): return len(A())",
    "method by text": "class A:\n  def m(s): return 1\ndef f(w): return getattr(A(), 'm')()",
    "method by computed text":
        "class A:\n  def on_m(s): return 1\ndef f(w, *, k='m'): return getattr(A(), f'on_{k}')()",
    "property": "class A:\n  @property\n  def p(s): return 1\ndef f(w): return A().p",
    "patched method":
        "from fastcore.basics import patch\nclass A: pass\n@patch\ndef m(self: A): return 1\ndef f(w): return A().m()",
    "registered subclass":
        "T = []\nclass A:\n  def __init_subclass__(c): T.append(c)\nclass B(A):\n  def m(s): return 1\n"
        "def f(w): return [c().m() for c in T + A.__subclasses__()]",
    "recursion": "def f(w): return g()\ndef g(): return f(0) or 1",
    "long chain of calls":
        "def f(w): return g_a()\ndef g_a(): return g_aa()\n"
        + "".join(f"def g_{'a'*i}(): return g_{'a'*(i + 1)}()\n" for i in range(2, 1500))
        + f"def g_{'a'*1500}(): return 1",
    "nested function": "def f(w):\n  def g(): return 1\n  return g()",
}

SAME = {  # before and after, and the key has to stay
    "comment": ("def f(w): return 1", "# new\ndef f(w):\n    return 1  # one"),
    "docstring": ("def f(w): 'Old.'; return 1", "def f(w):\n    'New.'\n    return 1"),
    "hint": ("def f(w, *, a: int = 1) -> dict: return a", "def f(w, *, a=1): return a"),
    "unused": ("def f(w): return 1", "def f(w): return 1\ndef g(): return 2\nX = 3"),
    "unused patched method": (
        "from fastcore.basics import patch\nclass A: pass\ndef f(w): return A()",
        "from fastcore.basics import patch\nclass A: pass\n@patch\ndef m(self: A): return 2\ndef f(w): return A()",
    ),
    "how files are read": (
        "from mcl_repro.core import files\ndef f(w): return 1",
        "from mcl_repro.core import files\ndef f(w): return 1\ndef g(): return files.read_json('x')",
    ),
}


def digest_in(folder, text):
    "The hash of `f` in a new module with this text."
    folder.mkdir(exist_ok=True)
    (folder/"lab_case.py").write_text(text)
    _forget("lab_case")
    sys.path.insert(0, str(folder))
    try:
        return code_of(importlib.import_module("lab_case").f)[0]
    finally:
        sys.path.pop(0)
        _forget("lab_case")


def _forget(name):
    "Let a module and its package be imported anew."
    for found in [n for n in sys.modules if n.partition(".")[0] == name]:
        del sys.modules[found]
    _file_of.cache_clear()
    _data_files.cache_clear()
    _MODULES.clear()
    importlib.invalidate_caches()


@pytest.mark.parametrize("case", CHANGES)
def test_the_key_changes_with_the_code(tmp_path, case):
    text = CHANGES[case]
    assert digest_in(tmp_path/"one", text) != digest_in(tmp_path/"two", text.replace("1", "2"))


@pytest.mark.parametrize("case", SAME)
def test_the_key_stays_where_nothing_is_computed_otherwise(tmp_path, case):
    before, after = SAME[case]
    assert digest_in(tmp_path/"one", before) == digest_in(tmp_path/"two", after)


IN_PACKAGE = [   # every form of import, and a data file by its name
    "from .helper import help\ndef f(w): return help()",
    "from . import helper\ndef f(w): return helper.help()",
    "import lab_package.helper\ndef f(w): return lab_package.helper.help()",
    "def f(w):\n  from lab_package.middle import aid\n  return aid()",
    "from lab_package import middle as m\ndef f(w): return m.h.help()",
    "from .helper import *\ndef f(w): return help()",
    "from pathlib import Path\ndef f(w): return (Path(__file__).parent/'tables'/'one.yaml').read_text()",
]


def test_the_key_follows_the_code_through_packages_and_their_data(tmp_path):
    def digests(helper="def help(): return 1", table="a: 1"):
        package = tmp_path/"lab_package"
        (package/"tables").mkdir(parents=True, exist_ok=True)
        files = {"__init__.py": "", "tables/one.yaml": table, "unused.py": f"# {table}", "helper.py": helper}
        files["middle.py"] = "from .helper import help as aid\nfrom . import helper\nimport lab_package.helper as h"
        for name, text in files.items():
            (package/name).write_text(text)
        return [_in_package(tmp_path, i, text) for i, text in enumerate(IN_PACKAGE)]
    base = digests()
    code_changed = digests(helper="def help(): return 2")
    data_changed = digests(table="a: 2")
    other = digests(helper="def help(): return 1\ndef more(): pass")
    assert [a != b for a, b in zip(base, code_changed)] == [True]*6 + [False]
    assert [a != b for a, b in zip(base, data_changed)] == [False]*6 + [True]
    # a module handed on through another counts as a whole
    assert [a != b for a, b in zip(base, other)] == [False]*4 + [True] + [False]*2


def _in_package(folder, i, text):
    (folder/"lab_package"/f"s{i}.py").write_text(text)
    sys.path.insert(0, str(folder))
    _forget("lab_package")
    try:
        return code_of(importlib.import_module(f"lab_package.s{i}").f)[0]
    finally:
        sys.path.pop(0)
        _forget("lab_package")


def test_versions_of_imported_packages_are_in_the_key(lab, monkeypatch):
    node = lab.node(lab_stages.make, seed=0)
    assert lab.node(lab_stages.make, seed=0).key == node.key
    assert lab.run(node).record["versions"] == {"numpy": np.__version__}
    _CODE.clear()
    monkeypatch.setattr(identity, "package_version", lambda package, build: "0.1")
    assert lab.node(lab_stages.make, seed=0).key != node.key
    _CODE.clear()


EDITED = """
from mcl_repro.lab.nodes import stage

@stage
def f(w, *, a=1):
    "Old."
    return {"a": 1}
"""

EDIT = """
import os, pathlib, sys, time
sys.path.insert(0, sys.argv[1])
import edited
from mcl_repro.lab.lab import Lab

def change(old, new):
    path = pathlib.Path(edited.__file__)
    path.write_text(path.read_text().replace(old, new))
    os.utime(path, (time.time() + 60,)*2)     # later than the import, however coarse the clock

lab = Lab("smoke", device="cpu", runs=sys.argv[1] + "/runs")
key = lab.node(edited.f).key
change("Old", "New")
assert lab.node(edited.f).key == key
change("1}", "2}")
lab.node(edited.f)
"""


def test_source_edited_after_its_import_is_noticed(tmp_path):
    (tmp_path/"edited.py").write_text(EDITED)
    out = python(EDIT, tmp_path)
    says = "SettingsError: edited was edited after it was imported (f); restart the kernel"
    assert out.returncode == 1 and says in out.stderr, out.stderr


def test_settings_are_canonical_and_checked(lab):
    key = lambda **s: lab.node(lab_stages.fit, data=lab.node(lab_stages.make, seed=0), **s).key
    assert key(seed=1) == key(seed=np.int64(1), steps=5) != key(seed=2)
    kind = lambda value: lab.node(lab_stages.fail, kind=value).key
    assert kind((1, 2)) == kind([1, 2]) != kind([2, 1])
    assert kind({"a": 1, "b": 2}) == kind({"b": 2, "a": 1})
    assert kind(1) != kind(True)
    for wrong in [float("inf"), Path("x"), {1: 2}, {"$node": "x"}, np.zeros(3), object(), {1, 2}]:
        with pytest.raises(SettingsError, match=r"setting lab_stages.fail.kind is"):
            lab.node(lab_stages.fail, kind=wrong)
    with pytest.raises(SettingsError, match="stage 'lab_stages.make' has no setting 'sede'; it has: seed, rows"):
        lab.node(lab_stages.make, sede=1)


def test_an_artefact_as_a_setting_is_its_node(lab):
    node = lab.node(lab_stages.make, seed=0)
    art = lab.run(node)
    assert lab.node(lab_stages.fit, data=art, seed=0).key == lab.node(lab_stages.fit, data=node, seed=0).key


def test_threads_are_part_of_the_key_and_set(tmp_path):
    torch = pytest.importorskip("torch")
    one, two = (Lab("smoke", device="cpu", runs=tmp_path, threads=t) for t in (1, 2))
    assert one.node(threads_seen).key != two.node(threads_seen).key
    before = torch.get_num_threads()
    assert [lab.run(lab.node(threads_seen)).result["threads"] for lab in (one, two)] == [1, 2]
    assert torch.get_num_threads() == before


def test_a_careless_stage_gives_the_same_again(lab):
    "Global random generators start from the key, and are put back."
    np.random.seed(0)
    expected = np.random.rand()
    np.random.seed(0)
    first = lab.run(lab.node(lab_stages.careless, name="a")).result
    assert np.random.rand() == expected
    other = Lab("smoke", device="cpu", runs=lab.runs.parent/"other")
    again, different = (other.run(other.node(lab_stages.careless, name=name)).result for name in "ab")
    assert again == first != different


@stage
def threads_seen(work):
    import torch
    return {"threads": torch.get_num_threads()}


# ---- records and results

def test_a_record_tells_how_it_was_made(lab):
    art = lab.run(graph(lab))
    fit = lab.run(graph(lab).settings["fits"][0])
    r = fit.record
    assert (r["stage"], r["label"], list(r["files"])) == ("lab_stages.fit", "seed=0", ["weights.npy"])
    data = {"$node": lab.node(lab_stages.make, seed=0).key}
    assert r["settings"] == {"data": data, "seed": 0, "steps": 5, "sleep": 0.02} and r["result"]["norm"] > 0
    assert r["seconds"] >= .1 and 10 < r["peak_memory_mb"] < 1e5     # five steps that sleep 0.02 s
    assert r["process"] == os.getpid() and 0 <= time.time() - r["began"] - r["seconds"] < 120
    assert r["device"] == {"type": "cpu", "threads": 1} and set(r["git"]) == {"commit", "dirty"}
    assert os.uname().nodename not in json.dumps(r) and str(lab.runs) not in json.dumps(r)
    assert read_json(art.path/"record.json") == art.record


def test_errors_of_stages(lab):
    with pytest.raises(TrainingError, match="^loss is nan at step 3; lower the learning rate") as e:
        lab.run(lab.node(lab_stages.fail, kind="user"))
    assert e.value.__notes__ == ["in stage lab_stages.fail (kind=user)"]
    with pytest.raises(StageError, match=r"stage lab_stages.fail \(kind=bug\) failed: ZeroDivisionError: a bug") as e:
        lab.run(lab.node(lab_stages.fail, kind="bug"))
    assert isinstance(e.value.__cause__, ZeroDivisionError)
    with pytest.raises(StageError, match="must return a dict of plain finite values"):
        lab.run(lab.node(lab_stages.fail, kind="nan"))
    with pytest.raises(StoreError, match="wrote a file record.json"):
        lab.run(lab.node(lab_stages.fail, kind="record"))
    with pytest.raises(StoreError, match="link is a link"):
        lab.run(lab.node(lab_stages.fail, kind="link"))
    assert not list(lab.store.objects.glob("*/*")) and not list((lab.store.folder/"tmp").iterdir())


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_does_not_depend_on_a_failure_still_runs(lab, jobs):
    if jobs > 1:
        pytest.importorskip("distributed")
    lab = Lab("smoke", device="cpu", runs=lab.runs, jobs=jobs)
    bad = lab.node(lab_stages.fail, kind="user")
    after = lab.node(lab_stages.fail, kind="none", after=bad)
    good = graph(lab, n=1, sleep=0.)
    try:
        with pytest.raises(TrainingError, match="^loss is nan at step 3; lower the learning rate") as e:
            lab.run([after, good, lab.node(lab_stages.fail, kind="bug")])
    finally:
        lab.close()
    assert e.value.__notes__[0] == "in stage lab_stages.fail (kind=user)" and "1 more failed" in e.value.__notes__[-1]
    found = [(r["stage"].partition(".")[2], r["state"]) for r in lab.status()]
    assert [state for name, state in found if name == "fail"] == ["failed", "waiting", "failed"]
    assert ("table", "done") in found
    try:
        with pytest.raises(TrainingError):
            lab.run([bad, lab.node(lab_stages.fail, kind="bug")])  # tried again, not remembered
    finally:
        lab.close()
    assert starts(lab).count("fail") == 4
    notes = [r["note"] for r in lab.status() if r["state"] == "failed"]
    assert notes[0] == "TrainingError: loss is nan at step 3; lower the learning rate"


def test_a_stage_that_kills_every_worker_ends_after_four(lab):
    pytest.importorskip("distributed")
    lab = Lab("smoke", device="cpu", runs=lab.runs, jobs=1, engine="dask")
    deadly = lab.node(lab_stages.fail, kind="deadly")
    after = lab.node(lab_stages.fail, kind="none", after=deadly)
    says = r"stage lab_stages.fail \(kind=deadly\): its worker process died four times"
    try:
        with pytest.raises(StageError, match=says) as e:
            lab.run(after)
    finally:
        lab.close()
    assert starts(lab) == ["fail"]*4 and not hasattr(e.value, "__notes__")


# ---- engines

def test_serial_and_dask_give_the_same_records(bench, undisturbed):
    pytest.importorskip("distributed")
    assert bench.run("dask", 2)[0] == 0
    assert content(bench.runs) == undisturbed


def test_workers_are_local_have_one_thread_and_may_have_children(lab):
    pytest.importorskip("distributed")
    client, cluster = _connect("dask", 2, "cpu")
    try:
        workers = client.scheduler_info(n_workers=-1)["workers"]
        assert len(workers) == 2 and all(w["nthreads"] == 1 for w in workers.values())
        assert all(a.startswith("tcp://127.0.0.1:") for a in [*workers, cluster.scheduler_address])
        assert set(client.run(lab_stages.in_worker).values()) == {("1", False)}
        pids = lambda: set(client.run(os.getpid, on_error="ignore").values())
        first = pids()
        os.kill(min(first), signal.SIGKILL)
        await_that(lambda: len(now := pids()) == 2 and now != first, "a new worker in the place of the killed one")
        second = pids()
        assert set(client.run(lab_stages.in_worker).values()) == {("1", False)}  # so has the one that took its place
    finally:
        _end(client, cluster)
    await_end(first | second)


def test_one_worker_for_each_gpu(monkeypatch):
    "Without a GPU: that each worker sees one device and owns one unit of the resource."
    pytest.importorskip("distributed")
    monkeypatch.setattr(engine, "visible_gpus", lambda: ["0", "3"])
    client, cluster = _connect("dask", None, "cuda")
    try:
        assert sorted(client.run(lambda: os.environ["CUDA_VISIBLE_DEVICES"]).values()) == ["0", "3"]
        workers = client.scheduler_info(n_workers=-1)["workers"]
        assert [w["resources"] for w in workers.values()] == [{"GPU": 1}]*2
    finally:
        _end(client, cluster)


def test_a_scheduler_by_its_address(lab, undisturbed):
    pytest.importorskip("distributed")
    client, cluster = _connect("dask", 1, "cpu")
    try:
        far = Lab("smoke", device="cpu", runs=lab.runs, engine=cluster.scheduler_address)
        far.run(graph(far))
        far.close()
        assert client.run(os.getpid)  # what was not started here is left alone
    finally:
        _end(client, cluster)
    assert content(lab.runs) == undisturbed


def test_engine_errors(lab, monkeypatch):
    with pytest.raises(SettingsError, match="engine 'ray' is not known"):
        Lab("smoke", runs=lab.runs, engine="ray")
    far = Lab("smoke", device="cpu", runs=lab.runs, engine="tcp://127.0.0.1:1")
    with pytest.raises(SettingsError, match="no Dask scheduler answers there"):
        far.run(graph(far))
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(SettingsError, match=r"pip install 'mcl_repro\[cluster\]'"):
        far.run(graph(far))
    assert not (lab.runs.parent/"starts").exists()


# ---- the store

def test_a_second_run_computes_nothing(lab):
    lab.run(graph(lab))
    before = starts(lab)
    assert lab.run(graph(lab)).result == Lab("smoke", device="cpu", runs=lab.runs).run(graph(lab)).result
    assert starts(lab) == before


def test_profiles_share_a_store(lab):
    mini = Lab("mini", device="cpu", runs=lab.runs)
    lab.run(graph(lab))
    before = starts(lab)
    mini.run(graph(mini))
    assert starts(lab) == before and mini.store.folder == lab.store.folder and mini.folder != lab.folder


def test_stores_that_cannot_be_used(lab, tmp_path):
    for name, files, says in [
        ("old", {"format.json": '{"format": 0}'}, "has format 0, this program reads 1"),
        ("other", {"thesis.txt": ""}, "not a store of ours"),
    ]:
        (tmp_path/name).mkdir()
        for file, text in files.items():
            (tmp_path/name/file).write_text(text)
        with pytest.raises(StoreError, match=says):
            Lab("smoke", store=tmp_path/name)
    (tmp_path/"file").write_text("")
    with pytest.raises(StoreError, match="is a file; give a folder"):
        Lab("smoke", store=tmp_path/"file")
    with pytest.raises(StoreError, match="give another folder"):
        below = Lab("smoke", device="cpu", runs=tmp_path/"r", store=tmp_path/"file"/"store")
        below.run(graph(below))


LOCKED = """
import os, sys, lab_stages
from mcl_repro.core.errors import StoreError
from mcl_repro.lab.lab import Lab

def run(folder):
    lab = Lab("smoke", device="cpu", runs=sys.argv[1] + folder)
    lab.run(lab_stages.graph(lab, n=1, sleep=0.))

run("/warm")     # which imports everything
before = open(os.environ["LAB_STARTS"]).read()
if os.getuid() == 0:     # for whom permissions do not count
    os.setgid(65534)
    os.setuid(65534)
try:
    run("/locked")
except StoreError as e:
    print(e)
assert open(os.environ["LAB_STARTS"]).read() == before
"""


def test_no_permission_to_write_is_said_before_any_work():
    with tempfile.TemporaryDirectory() as folder:
        locked = Path(folder)/"locked"
        locked.mkdir()
        Path(folder).chmod(0o755)
        locked.chmod(0o555)
        out = python(LOCKED, folder, LAB_STARTS=f"{folder}/starts")
        assert out.returncode == 0, out.stderr
        assert out.stdout == (
            f"store {locked}/store: no permission to write while opening it; mend the permissions or give "
            "another folder\n"
        )
        assert list(locked.iterdir()) == []


def test_a_stage_that_is_not_deterministic_is_noticed(lab):
    "Two finishers of one key: the first is kept, the second compares."
    lab.store.open()
    node = lab.node(lab_stages.make, seed=0)
    spec = node_spec(node, lab.store)
    def finish(text):
        attempt = lab.store.folder/"tmp"/f"{node.key}-{text}"
        attempt.mkdir()
        (attempt/"x").write_text(text)
        return lab.store.commit(attempt, {k: spec[k] for k in ("stage", "key")} | {"result": {}})
    finish("one")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        finish("one")
    with pytest.warns(UserWarning, match="computed twice with different results"):
        art = finish("two")
    assert (art.path/"x").read_text() == "one" and lab.store.read("lab_stages.make", node.key)


# ---- status and cleaning

def test_status_from_another_process(bench):
    held = bench.hold("fit0.step4")      # the last step, after it has told how far it is
    process = bench.launch()
    try:
        rows = lambda: {r["stage"] + r["label"][:7]: r for r in read_status(bench.runs, "smoke")}
        await_that(lambda: "5/5 steps" in rows().get("lab_stages.fitseed=0", dict(note=""))["note"], "the last step")
        assert [r["state"] for r in rows().values()] == ["done", "running", "waiting", "waiting", "waiting"]
        running = rows()["lab_stages.fitseed=0"]
        assert running["eta"] == 0 and running["seconds"] > 0
    finally:
        process.kill()
        process.wait()
        held.unlink()
    assert [r["state"] for r in read_status(bench.runs, "smoke")] == ["done"] + ["waiting"]*4  # the dead do not run
    assert read_status(bench.runs, "mini") == []


def test_status_shows_the_latest_session(lab, monkeypatch):
    monkeypatch.setenv("MCL_REPRO_SESSION", "a batch")
    for seed in (0, 1):
        one = Lab("smoke", device="cpu", runs=lab.runs)
        one.run(one.node(lab_stages.make, seed=seed))
    assert [r["label"] for r in read_status(lab.runs, "smoke")] == ["seed=0", "seed=1"]
    lab.run(lab.node(lab_stages.make, seed=2))
    assert [r["label"] for r in read_status(lab.runs, "smoke")] == [r["label"] for r in lab.status()] == ["seed=2"]


def test_time_left_comes_from_runs_before(lab):
    "Of those, from the ones with the settings most alike; here they are said to have taken 40 and 2 seconds."
    def fit(sleep, seed):
        return lab.node(lab_stages.fit, data=lab.node(lab_stages.make, seed=0), seed=seed, sleep=sleep)
    took = {.01: 40, 0.: 2}
    for sleep, seconds in took.items():
        artefact = lab.run(fit(sleep, seed=0))
        write_json(artefact.path/"record.json", {**artefact.record, "seconds": seconds})
    assert {sleep: lab.status(fit(sleep, seed=5))[-1]["eta"] for sleep in took} == took
    assert lab.status(lab.node(lab_stages.write, megabytes=1))[0]["eta"] is None


def test_cleaning_keeps_what_plans_need(lab):
    keep, drop = graph(lab, n=1, sleep=0.), graph(lab, n=1, sleep=0.001)
    lab.run([keep, drop])
    path = lab.folder/"plan.json"
    plan, only = read_plan(path), {n.key for n in with_inputs([keep])}
    write_plan(path, {**plan, "entries": {slot: e for slot, e in plan["entries"].items() if e["key"] in only}})
    (lab.store.folder/"tmp"/"dead-1").mkdir()
    (lab.store.folder/"tmp"/"dead-1"/"x").write_bytes(b"x"*1000)
    lab.store.scratch("0"*40).mkdir()

    clean = lambda **how: clean_store(lab.store.folder, lab.runs, **how)
    rows = clean()
    assert sorted(r["kind"] for r in rows) == ["artefact", "artefact", "attempt", "scratch"]
    assert sum(r["bytes"] for r in rows) > 1000 and len(list(lab.store.objects.glob("*/*"))) == 5
    with lab.store.lock("dead"):
        assert "attempt" not in {r["kind"] for r in clean()}
    clean_all(lab.store, lab.runs)
    assert {p.name for p in lab.store.objects.glob("*/*")} == only and clean() == []
    write_plan(path, {**plan, "entries": {}})
    assert len(clean()) == 3 and clean(keep=only) == []


def test_a_key_of_newer_code_replaces_the_older_in_the_plan(lab, monkeypatch):
    node = lab.node(lab_stages.make, seed=0)
    lab.run(node)
    monkeypatch.setattr(nodes, "code_of", lambda f: ("other code", {}))
    newer = lab.node(lab_stages.make, seed=0)
    assert newer.key != node.key and newer.slot == node.slot
    lab.run(newer)
    assert [r["name"].split("/")[-1] for r in clean_store(lab.store.folder, lab.runs)] == [node.key]


def test_a_stage_that_a_notebook_exports_is_the_librarys(tmp_path):
    "Workers cannot import a notebook, so a notebook's stage stands for its copy in the library, if it is the same."
    def in_notebook(source):
        linecache.cache["<cell>"] = len(source), None, source.splitlines(True), "<cell>"
        namespace = dict(vars(lab_stages), __name__="__main__")
        exec(compile(source, "<cell>", "exec"), namespace)   # as a kernel runs a cell
        return namespace["table"]
    source = "import inspect\n" + inspect.getsource(lab_stages.table)
    lab = Lab("smoke", "cpu", tmp_path, module="lab_stages")
    fits = lab.node(lab_stages.fit, data=lab.node(lab_stages.make, seed=0), seed=0)
    settings = {name: [fits] for name in lab_stages.table.stage.settings[:1]}
    assert lab.node(in_notebook(source), **settings).key == lab.node(lab_stages.table, **settings).key
    changed = source.replace("started(", "started(1 and ")
    with pytest.raises(SettingsError, match="run nbdev_export"):
        lab.node(in_notebook(changed), **settings)
