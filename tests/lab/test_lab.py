"""Profiles, keys, store, engines, status and cleaning of the lab; the killing is in test_crash.py."""
import importlib, inspect, json, linecache, os, signal, subprocess, sys, tempfile, time, warnings
from pathlib import Path

import numpy as np
import pytest

import lab_stages
from lab_stages import graph

from mcl_repro.core.errors import DataError, SettingsError, StoreError, TrainingError, UserError
from mcl_repro.lab.attempt import StageError
from mcl_repro.lab.cleaning import clean_store
from mcl_repro.lab.lab import Lab
from mcl_repro.lab.nodes import stage
from mcl_repro.lab.profiles import load_profile
from mcl_repro.lab.status import read_status
from mcl_repro.lab.store import Store
from test_crash import bench, content, gone, undisturbed  # noqa: F401 (fixtures)
from mcl_repro.lab import engine
from mcl_repro.lab import identity
from mcl_repro.lab.engine import _connect, _end
from mcl_repro.lab.identity import _CODE, _data_files, _file_of, _MODULES, code_of
from mcl_repro.lab.nodes import node_spec
from mcl_repro.lab.status import with_inputs

HERE = Path(__file__).parent


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_STARTS", str(tmp_path/"starts"))
    return Lab("smoke", device="cpu", runs=tmp_path/"runs")


def starts(lab):
    return [l.split()[0] for l in (lab.runs.parent/"starts").read_text().splitlines()]


def python(code, *args, **kwargs):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, env=env, timeout=120, **kwargs
    )


# ---- imports and profiles

def test_import_is_quick_and_without_torch():
    out = python(
        "import sys, time; t = time.process_time(); import mcl_repro.lab; print(time.process_time() - t, "
        '"torch" in sys.modules, "dask" in sys.modules)'
    )
    seconds, torch, dask = out.stdout.split()
    assert (torch, dask) == ("False", "False") and float(seconds) < 1


@pytest.mark.parametrize("name", ["smoke", "mini", "paper"])
def test_profiles_of_the_package(name):
    profile = load_profile(name)
    assert all(isinstance(v, str) and ":" in v for v in profile["roles"].values())
    assert set(profile["roles"]) == set(load_profile("mini")["roles"])


@pytest.fixture
def profiles(tmp_path):
    path = tmp_path/"profiles.yaml"
    path.write_text(
        "a:\n  train: {epochs: 2, lr: 1e-3, amp: false, name: x, sizes: [1, 2], limit: null}\n  roles: {train: "
        '"world:train:10"}\n'
        "b: {extends: a, train: {epochs: 9}}\nc: {extends: d}\nd: {extends: c}\n"
    )
    return lambda *args, **kwargs: load_profile(*args, path=path, **kwargs)


def test_a_profile_extends_another_and_is_changed_by_type(profiles, tmp_path):
    with pytest.raises(SettingsError, match="extends"):
        profiles("b")
    path = tmp_path/"profiles.yaml"
    path.write_text(path.read_text().rpartition("c: ")[0])
    assert profiles("b").train == {"epochs": 9, "lr": 0.001, "amp": False, "name": "x", "sizes": [1, 2], "limit": None}
    changed = profiles(
        "b", {"train.lr": 1, "train.amp": True, "train.limit": 5, "train.sizes": (3,)}, {"train": "my.csv"}
    )
    assert (changed.train.lr, type(changed.train.lr), changed.train.amp, changed.train.limit, changed.train.sizes) == (
        1.0, float, True, 5, [3],
    )
    assert changed.roles == {"train": "my.csv"} and profiles("a").roles == {"train": "world:train:10"}
    for wrong in [
        {"train.epochs": 2.5}, {"train.epochs": True}, {"train.amp": 1}, {"train.name": 3}, {"train.sizes": 3},
    ]:
        with pytest.raises(SettingsError, match="is .* in the profile, not"):
            profiles("a", wrong)
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

CASES = {  # what is changed: (before, after, whether the key has to change)
    "comment": ("def f(w): return 1", "# new\ndef f(w):\n    return 1  # one", False),
    "docstring": ('def f(w): "Old."; return 1', 'def f(w):\n    "New."\n    return 1', False),
    "hint": ("def f(w, *, a: int = 1) -> dict: return a", "def f(w, *, a=1): return a", False),
    "unused": ("def f(w): return 1", "def f(w): return 1\ndef g(): return 2\nX = 3", False),
    "body": ("def f(w): return 1", "def f(w): return 2", True),
    "default": ("def g(x=1): return x\ndef f(w): return g()", "def g(x=2): return x\ndef f(w): return g()", True),
    "constant": ("X = 1\ndef f(w): return X", "X = 2\ndef f(w): return X", True),
    "constant changed later": ("X = {}\ndef f(w): return X", "X = {}\nX[1] = 2\ndef f(w): return X", True),
    "lambda": ("g = lambda: 1\ndef f(w): return g()", "g = lambda: 2\ndef f(w): return g()", True),
    "conditional definition": (
        "try: import nothing\nexcept ImportError:\n    def g(): return 1\ndef f(w): return g()",
        "try: import nothing\nexcept ImportError:\n    def g(): return 2\ndef f(w): return g()", True,
    ),
    "decorator": (
        "def d(g): return g\n@d\ndef f(w): return 1", "def d(g): return lambda w: 2\n@d\ndef f(w): return 1", True,
    ),
    "base class": (
        "class A:\n  def m(s): return 1\nclass B(A): pass\ndef f(w): return B().m()",
        "class A:\n  def m(s): return 2\nclass B(A): pass\ndef f(w): return B().m()", True,
    ),
    "special method": (
        "class A:\n  def __len__(s): return 1\ndef f(w): return len(A())",
        "class A:\n  def __len__(s): return 2\ndef f(w): return len(A())", True,
    ),
    "method by text": (
        'class A:\n  def m(s): return 1\ndef f(w): return getattr(A(), "m")()',
        'class A:\n  def m(s): return 2\ndef f(w): return getattr(A(), "m")()', True,
    ),
    "method by computed text": (
        'class A:\n  def on_m(s): return 1\ndef f(w, *, k="m"): return getattr(A(), f"on_{k}")()',
        'class A:\n  def on_m(s): return 2\ndef f(w, *, k="m"): return getattr(A(), f"on_{k}")()', True,
    ),
    "property": (
        "class A:\n  @property\n  def p(s): return 1\ndef f(w): return A().p",
        "class A:\n  @property\n  def p(s): return 2\ndef f(w): return A().p", True,
    ),
    "patched method": (
        "from fastcore.basics import patch\nclass A: pass\n@patch\ndef m(self: A): return 1\ndef f(w): return A().m()",
        "from fastcore.basics import patch\nclass A: pass\n@patch\ndef m(self: A): return 2\ndef f(w): return A().m()",
        True,
    ),
    "unused patched method": (
        "from fastcore.basics import patch\nclass A: pass\ndef f(w): return A()",
        "from fastcore.basics import patch\nclass A: pass\n@patch\ndef m(self: A): return 2\ndef f(w): return A()",
        False,
    ),
    "registered subclass": (
        "T = []\nclass A:\n  def __init_subclass__(c): T.append(c)\nclass B(A):\n  def m(s): return 1\ndef f(w): "
        "return [c().m() for c in T + A.__subclasses__()]",
        "T = []\nclass A:\n  def __init_subclass__(c): T.append(c)\nclass B(A):\n  def m(s): return 2\ndef f(w): "
        "return [c().m() for c in T + A.__subclasses__()]",
        True,
    ),
    "recursion": (
        "def f(w): return g()\ndef g(): return f(1) or 1", "def f(w): return g()\ndef g(): return f(1) or 2", True,
    ),
    "long chain of calls": (
        "def f(w): return g0()\n"
        + "".join(f"def g{i}(): return g{i + 1}()\n" for i in range(1500))
        + "def g1500(): return 1",
        "def f(w): return g0()\n"
        + "".join(f"def g{i}(): return g{i + 1}()\n" for i in range(1500))
        + "def g1500(): return 2",
        True,
    ),
    "nested function": (
        "def f(w):\n  def g(): return 1\n  return g()", "def f(w):\n  def g(): return 2\n  return g()", True,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_key_follows_the_code(tmp_path, case):
    before, after, changes = CASES[case]
    _MODULES.clear()
    found = []
    for i, text in enumerate([before, after]):
        (tmp_path/f"lab_case{i}").mkdir()
        path = tmp_path/f"lab_case{i}"/"lab_case.py"
        path.write_text(text)
        sys.path.insert(0, str(path.parent))
        sys.modules.pop("lab_case", None)
        _file_of.cache_clear()
        importlib.invalidate_caches()
        try:
            found.append(code_of(importlib.import_module("lab_case").f)[0])
        finally:
            sys.path.pop(0)
            sys.modules.pop("lab_case", None)
            _file_of.cache_clear()
            _MODULES.clear()
    assert (found[0] != found[1]) is changes


def test_the_key_follows_the_code_through_packages_and_their_data(tmp_path):
    """Imports of every form, in the package the stage is from; a data file by its name; the versions of what is
    imported.
    """
    def digest(helper="def help(): return 1", table="a: 1"):
        package = tmp_path/"lab_package"
        package.mkdir(exist_ok=True)
        (package/"__init__.py").write_text("")
        (package/"tables").mkdir(exist_ok=True)
        (package/"tables"/"one.yaml").write_text(table)
        (package/"unused.py").write_text(f"# {table}")
        (package/"helper.py").write_text(helper)
        (package / "middle.py").write_text(
            "from .helper import help as aid\nfrom . import helper\nimport lab_package.helper as h"
        )
        return [
            _in_package(tmp_path, i, text)
            for i, text in enumerate(
                [
                    "from .helper import help\ndef f(w): return help()",
                    "from . import helper\ndef f(w): return helper.help()",
                    "import lab_package.helper\ndef f(w): return lab_package.helper.help()",
                    "def f(w):\n  from lab_package.middle import aid\n  return aid()",
                    "from lab_package import middle as m\ndef f(w): return m.h.help()",
                    "from .helper import *\ndef f(w): return help()",
                    'from pathlib import Path\ndef f(w): return (Path(__file__).parent/"tables"/"one.yaml").read_text()',
                ]
            )
        ]
    base = digest()
    code_changed = digest(helper="def help(): return 2")
    data_changed = digest(table="a: 2")
    other = digest(helper="def help(): return 1\ndef more(): pass")
    assert [a != b for a, b in zip(base, code_changed)] == [True]*6 + [False]
    assert [a != b for a, b in zip(base, data_changed)] == [False]*6 + [True]
    # a module handed on through another counts as a whole
    assert [a != b for a, b in zip(base, other)] == [False]*4 + [True] + [False]*2


def _in_package(folder, i, text):
    (folder/"lab_package"/f"s{i}.py").write_text(text)
    sys.path.insert(0, str(folder))
    _file_of.cache_clear()
    _data_files.cache_clear()
    _MODULES.clear()
    importlib.invalidate_caches()
    for name in [n for n in sys.modules if n.startswith("lab_package")]:
        del sys.modules[name]
    try:
        return code_of(importlib.import_module(f"lab_package.s{i}").f)[0]
    finally:
        sys.path.pop(0)
        _file_of.cache_clear()
        _data_files.cache_clear()
        _MODULES.clear()
        for name in [n for n in sys.modules if n.startswith("lab_package")]:
            del sys.modules[name]


def test_versions_of_imported_packages_are_in_the_key(lab, monkeypatch):
    node = lab.node(lab_stages.make, seed=0)
    assert lab.node(lab_stages.make, seed=0).key == node.key and lab.run(node).record["versions"] == {
        "numpy": np.__version__
    }
    _CODE.clear()
    monkeypatch.setattr(identity, "library_version", lambda package: "0.1")
    assert lab.node(lab_stages.make, seed=0).key != node.key
    _CODE.clear()


def test_source_edited_after_its_import_is_noticed(tmp_path):
    text = (
        "from mcl_repro.lab.nodes import stage; from mcl_repro.lab.lab import Lab\n@stage\ndef f(w, *, "
        'a=1):\n    "Old."\n    return {"a": 1}\n'
    )
    (tmp_path/"edited.py").write_text(text)
    script = '''import sys, time; sys.path.insert(0, sys.argv[1]); import edited, pathlib; from mcl_repro.lab.lab import Lab
lab = Lab("smoke", device="cpu", runs=sys.argv[1] + "/runs"); old = lab.node(edited.f).key; time.sleep(.05)
p = pathlib.Path(edited.__file__); p.write_text("# a comment\\n" + p.read_text().replace("Old", "New")); assert lab.node(edited.f).key == old
p.write_text(p.read_text().replace("1}", "2}")); lab.node(edited.f)'''
    out = python(script, tmp_path)
    assert (
        out.returncode == 1
        and "SettingsError: edited was edited after it was imported (f); restart the kernel" in out.stderr
    ), out.stderr


def test_settings_are_canonical_and_checked(lab):
    key = lambda **s: lab.node(lab_stages.fit, data=lab.node(lab_stages.make, seed=0), **s).key
    assert key(seed=1) == key(seed=np.int64(1), steps=5) != key(seed=2)
    assert (
        lab.node(lab_stages.fail, kind=(1, 2)).key
        == lab.node(lab_stages.fail, kind=[1, 2]).key
        != lab.node(lab_stages.fail, kind=[2, 1]).key
    )
    assert lab.node(lab_stages.fail, kind={"a": 1, "b": 2}).key == lab.node(lab_stages.fail, kind={"b": 2, "a": 1}).key
    assert lab.node(lab_stages.fail, kind=1).key != lab.node(lab_stages.fail, kind=True).key
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
    assert [lab.run(lab.node(threads_seen)).result["threads"] for lab in (one, two)] == [
        1,
        2,
    ] and torch.get_num_threads() == before


def test_a_careless_stage_gives_the_same_again(lab):
    "Global random generators start from the key, and are put back."
    np.random.seed(0)
    expected = np.random.rand()
    np.random.seed(0)
    first = lab.run(lab.node(lab_stages.careless, name="a")).result
    assert np.random.rand() == expected
    other = Lab("smoke", device="cpu", runs=lab.runs.parent/"other")
    assert (
        other.run(other.node(lab_stages.careless, name="a")).result
        == first
        != other.run(other.node(lab_stages.careless, name="b")).result
    )


@stage
def threads_seen(work):
    import torch
    return {"threads": torch.get_num_threads()}


# ---- records and results

def test_a_record_tells_how_it_was_made(lab):
    art = lab.run(graph(lab))
    fit = lab.run(graph(lab).settings["fits"][0])
    r = fit.record
    assert (r["stage"], r["label"], r["result"]["norm"] > 0, list(r["files"])) == (
        "lab_stages.fit", "seed=0", True, ["weights.npy"],
    )
    assert r["settings"] == {
        "data": {"$node": lab.node(lab_stages.make, seed=0).key},
        "seed": 0,
        "steps": 5,
        "sleep": 0.02,
    }
    assert .1 < r["seconds"] < 30 and 10 < r["peak_memory_mb"] < 1e5 and r["device"] == {"type": "cpu", "threads": 1}
    assert (
        os.uname().nodename not in json.dumps(r)
        and str(lab.runs) not in json.dumps(r)
        and {"commit", "dirty"} == set(r["git"])
    )
    assert json.loads((art.path/"record.json").read_text()) == art.record


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
    assert [
        (r["stage"], r["state"]) for r in lab.status() if r["stage"] in ("lab_stages.fail", "lab_stages.table")
    ] == [
        ("lab_stages.fail", "failed"), ("lab_stages.fail", "waiting"), ("lab_stages.table", "done"),
        ("lab_stages.fail", "failed"),
    ]
    try:
        with pytest.raises(TrainingError):
            lab.run([bad, lab.node(lab_stages.fail, kind="bug")])  # tried again, not remembered
    finally:
        lab.close()
    assert starts(lab).count("fail") == 4
    assert (
        next(r["note"] for r in lab.status() if r["state"] == "failed")
        == "TrainingError: loss is nan at step 3; lower the learning rate"
    )


def test_a_stage_that_kills_every_worker_ends_after_four(lab):
    pytest.importorskip("distributed")
    lab = Lab("smoke", device="cpu", runs=lab.runs, jobs=1, engine="dask")
    deadly = lab.node(lab_stages.fail, kind="deadly")
    after = lab.node(lab_stages.fail, kind="none", after=deadly)
    try:
        with pytest.raises(
            StageError, match=r"stage lab_stages.fail \(kind=deadly\): its worker process died four times"
        ) as e:
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
        info = client.scheduler_info(n_workers=-1)
        assert (
            all(a.startswith("tcp://127.0.0.1:") and w["nthreads"] == 1 for a, w in info["workers"].items())
            and len(info["workers"]) == 2
        )
        assert cluster.scheduler_address.startswith("tcp://127.0.0.1:")
        assert set(client.run(lab_stages.in_worker).values()) == {("1", False)}
        pids = set(client.run(os.getpid).values())
        os.kill(min(pids), signal.SIGKILL)
        end = time.time() + 60
        while len(now := set(client.run(os.getpid, on_error="ignore").values())) < 2 or now == pids:
            assert time.time() < end
            time.sleep(.1)
        assert set(client.run(lab_stages.in_worker).values()) == {("1", False)}  # so has the one that took its place
        pids |= now
    finally:
        _end(client, cluster)
    assert gone(pids) is True


def test_one_worker_for_each_gpu(monkeypatch):
    "Without a GPU: that each worker sees one device and owns one unit of the resource."
    pytest.importorskip("distributed")
    monkeypatch.setattr(engine, "visible_gpus", lambda: ["0", "3"])
    client, cluster = _connect("dask", None, "cuda")
    try:
        assert sorted(client.run(lambda: os.environ["CUDA_VISIBLE_DEVICES"]).values()) == ["0", "3"]
        assert [w["resources"] for w in client.scheduler_info(n_workers=-1)["workers"].values()] == [{"GPU": 1}]*2
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
        [(tmp_path/name/f).write_text(t) for f, t in files.items()]
        with pytest.raises(StoreError, match=says):
            Lab("smoke", store=tmp_path/name)
    (tmp_path/"file").write_text("")
    with pytest.raises(StoreError, match="is a file; give a folder"):
        Lab("smoke", store=tmp_path/"file")
    with pytest.raises(StoreError, match="give another folder"):
        below = Lab("smoke", device="cpu", runs=tmp_path/"r", store=tmp_path/"file"/"store")
        below.run(graph(below))


def test_no_permission_to_write_is_said_before_any_work(lab):
    """As another user where we are root, for whom permissions do not count; all imports are done before that user is
    taken on.
    """
    script = '''import os, sys, lab_stages; from mcl_repro.lab.lab import Lab; from mcl_repro.core.errors import StoreError
def run(where): lab = Lab("smoke", device="cpu", runs=where); lab.run(lab_stages.graph(lab, n=1, sleep=0.))
run(sys.argv[1] + "/warm"); before = open(os.environ["LAB_STARTS"]).read()
if os.getuid() == 0: os.setgid(65534); os.setuid(65534)
try: run(sys.argv[1] + "/locked")
except StoreError as e: print(e)
assert open(os.environ["LAB_STARTS"]).read() == before'''
    with tempfile.TemporaryDirectory() as folder:
        locked = Path(folder)/"locked"
        locked.mkdir()
        Path(folder).chmod(0o755)
        locked.chmod(0o555)
        os.environ["LAB_STARTS"] = f"{folder}/starts"
        out = python(script, folder)
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
    process = bench.launch("serial", 0, "sleep=0.4", start_new_session=True)
    bench.wait_for("fit0.step2")
    try:
        rows = {r["stage"] + r["label"][:7]: r for r in read_status(bench.runs, "smoke")}
        assert [r["state"] for r in rows.values()] == ["done", "running", "waiting", "waiting", "waiting"]
        running = rows["lab_stages.fitseed=0,"]
        assert "steps" in running["note"] and 0 < running["eta"] < 5 and running["seconds"] > 0
    finally:
        process.kill()
        process.wait()
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
    lab.run(graph(lab, n=1, sleep=.1))
    lab.run(graph(lab, n=1, sleep=0.))
    slow, quick = (
        lab.status(lab.node(lab_stages.fit, data=lab.node(lab_stages.make, seed=0), seed=5, sleep=s))[-1]["eta"]
        for s in (0.1, 0.0)
    )
    assert slow >= .5 > quick > 0
    assert lab.status(lab.node(lab_stages.write, megabytes=1))[0]["eta"] is None


def test_cleaning_keeps_what_plans_need(lab):
    keep, drop = graph(lab, n=1, sleep=0.), graph(lab, n=1, sleep=0.001)
    lab.run([keep, drop])
    plan = lab.folder/"plan.json"
    entries = json.loads(plan.read_text())
    only = {n.key for n in with_inputs([keep])}
    plan.write_text(
        json.dumps({**entries, "entries": {k: e for k, e in entries["entries"].items() if e["key"] in only}})
    )
    (lab.store.folder/"tmp"/"dead-1").mkdir()
    (lab.store.folder/"tmp"/"dead-1"/"x").write_bytes(b"x"*1000)
    lab.store.scratch("0"*40).mkdir()
    rows = clean_store(lab.store.folder, lab.runs)
    assert (
        sorted(r["kind"] for r in rows) == ["artefact", "artefact", "attempt", "scratch"]
        and sum(r["bytes"] for r in rows) > 1000
    )
    assert len(list(lab.store.objects.glob("*/*"))) == 5
    with lab.store.lock("dead"):
        assert "attempt" not in {r["kind"] for r in clean_store(lab.store.folder, lab.runs)}
    clean_store(lab.store.folder, lab.runs, delete=True)
    assert {p.name for p in lab.store.objects.glob("*/*")} == only and clean_store(lab.store.folder, lab.runs) == []
    assert (
        len(clean_store(lab.store.folder, lab.runs, days=0)) == 3
        and len(clean_store(lab.store.folder, lab.runs, days=0, keep=only)) == 0
    )


def test_a_key_of_newer_code_replaces_the_older_in_the_plan(lab, monkeypatch):
    node = lab.node(lab_stages.make, seed=0)
    lab.run(node)
    monkeypatch.setattr(identity, "code_of", lambda f: ("other code", {}))
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
