"""The store under fire: real processes, real SIGKILL, a real full disk, damaged files, two runs at once."""
import errno, os, resource, shutil, signal, subprocess
from pathlib import Path

import pytest

import lab_stages
from lab_bench import DEADLINE, STEPS, await_end, await_that, clean_all, content, remains
from lab_stages import graph
from mcl_repro.core.errors import StoreError
from mcl_repro.lab import attempt, store
from mcl_repro.lab.lab import Lab
from mcl_repro.lab.status import read_plan


def whole(bench, undisturbed, left=()):
    "The store holds what an undisturbed run leaves, and besides it only kinds of remains that cleaning up removes."
    assert content(bench.runs) == undisturbed
    store = bench.lab().store
    rubbish = clean_all(store, bench.runs)
    assert {r["kind"] for r in rubbish} - {"damaged"} == set(left)
    assert content(bench.runs) == undisturbed and not remains(store)


# ---- killed processes

def test_a_worker_killed_in_mid_stage_is_replaced_and_its_stage_goes_on(bench, undisturbed):
    pytest.importorskip("distributed")
    bench.order("fit0.step2")
    code, out, err = bench.run("dask", 2)
    assert code == 0, err
    starts = bench.starts()
    assert starts.count("fit0") == 2 and starts.count("fit1") == 1
    # every step once, in order: the second start went on from scratch
    assert [s for s in starts if s in STEPS] == STEPS
    assert starts.count("make0") == starts.count("make1") == starts.count("table") == 1
    whole(bench, undisturbed)


def test_the_driver_killed_in_mid_stage(bench, undisturbed):
    bench.order("fit0.step2")
    assert bench.run()[0] == -signal.SIGKILL
    assert [r["state"] for r in bench.lab().status(graph(bench.lab()))] == [
        "done", "waiting", "waiting", "waiting", "waiting",
    ]
    bench.finish()
    starts = bench.starts()
    assert starts.count("make0") == 1 and starts.count("fit0") == 2 and [s for s in starts if s in STEPS] == STEPS
    whole(bench, undisturbed)


def test_the_driver_of_workers_killed(bench, undisturbed):
    pytest.importorskip("distributed")
    process = bench.launch("dask", 2)
    bench.wait_for("fit0.step1")
    process.kill()
    process.wait()
    await_end(bench.pids())  # workers do not outlive their driver
    bench.finish()
    starts = bench.starts()
    assert starts.count("make0") == starts.count("make1") == starts.count("table") == 1
    assert all(starts.count(s) <= 2 for s in STEPS) and starts.count("fit0.step0") == 1
    whole(bench, undisturbed)


def test_killed_again_and_again(bench, undisturbed):
    orders = ["make0", "fit0.step0", "fit0.step4", "make1", "fit1.step3", "table"]
    for what in orders:
        bench.order(what)
    codes = []
    while not codes or codes[-1]:
        codes.append(bench.run("serial", 0, "sleep=0.0")[0])
        assert len(codes) < 12
    assert codes == [-signal.SIGKILL]*len(orders) + [0]
    starts = bench.starts()
    assert [s for s in starts if s in STEPS] == STEPS and starts.count("make0") == 2


KILLED_AT = """
import os, signal, sys, lab_stages
runs, at, count = sys.argv[1], int(os.environ["KILL_AT"]), 0
EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree"}

def hook(event, args):
    global count
    if event in EVENTS and runs in str(args[0]):
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
lab_stages.main(runs, n=1, steps=1, sleep=0.)
print("count", count)
"""


def test_killed_at_any_step_on_the_file_system(bench, monkeypatch):
    "Before, between and after artefact, record and rename: at some of the hundred operations of a whole run."
    def finish():
        lab = bench.lab()
        lab.run(graph(lab, n=1, steps=1, sleep=0.))
        return content(bench.runs)
    monkeypatch.setenv("KILL_AT", "0")
    code, out, err = bench.run(code=KILLED_AT)
    assert code == 0, err
    total, expected = int(out.split("count")[1]), content(bench.runs)
    assert total > 60
    for i in range(12):
        shutil.rmtree(bench.runs)
        monkeypatch.setenv("KILL_AT", str(1 + i*(total - 1)//11))
        assert bench.run(code=KILLED_AT)[0] == -signal.SIGKILL
        assert all(expected[name] == found for name, found in content(bench.runs).items())  # whatever is there is whole
        assert finish() == expected


RECORD_KILL = """
import os, signal, sys, lab_stages
from mcl_repro.lab import store
point, real_flush, real_rename = os.environ["KILL_POINT"], store._flush, os.rename

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def flush(path):
    if path.name == "record.json" and point == "half a record":
        os.truncate(path, path.stat().st_size//2)
        kill()
    if path.name == "record.json" and point == "before the record":
        path.unlink()
        kill()
    real_flush(path)

def rename(a, b, **kw):
    if "objects" in str(b) and point == "before the rename":
        kill()
    real_rename(a, b, **kw)
    if "objects" in str(b) and point == "after the rename":
        kill()

store._flush, os.rename = flush, rename
lab_stages.main(sys.argv[1])
"""


@pytest.mark.parametrize("point", ["before the record", "half a record", "before the rename", "after the rename"])
def test_killed_between_artefact_and_record(bench, undisturbed, monkeypatch, point):
    monkeypatch.setenv("KILL_POINT", point)
    assert bench.run(code=RECORD_KILL)[0] == -signal.SIGKILL
    assert bench.starts() == ["make0"]
    bench.finish()
    late = point == "after the rename"
    assert bench.starts().count("make0") == (1 if late else 2)
    whole(bench, undisturbed, ["running"] if late else [])


# ---- interrupted by the user

@pytest.mark.parametrize("engine,jobs,group", [("serial", 0, False), ("dask", 2, False), ("dask", 2, True)])
def test_control_c_ends_a_run_in_the_middle_of_a_stage(bench, undisturbed, engine, jobs, group):
    "Nobody waits for the stage, which would sleep for longer than this test waits."
    if engine == "dask":
        pytest.importorskip("distributed")
    process = bench.launch(engine, jobs, f"sleep={10*DEADLINE}", start_new_session=True)
    bench.wait_for("fit0.step0")
    (os.killpg if group else os.kill)(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode != 0 and "KeyboardInterrupt" in err.splitlines()[-1]
    await_end([*bench.pids(), process.pid])
    if engine == "serial":
        assert not remains(bench.lab().store, ("tmp", "running"))
    bench.finish()
    assert bench.starts().count("make0") == 1


# ---- full disks

def mount(folder, size):
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting a small tmpfs is not permitted here: {done.stderr.strip()}")


def test_a_disk_that_runs_full(bench):
    "A real one, where mounting is permitted: a tmpfs of 3 MB."
    disk = bench.folder/"disk"
    mount(disk, "3m")
    try:
        lab = Lab("smoke", device="cpu", runs=bench.runs, store=disk/"store")
        small, large = (lab.node(lab_stages.write, megabytes=m) for m in (1., 5.))
        lab.run(small)
        says = (r"disk full while running stage lab_stages.write \(megabytes=5.0\); "
                r"this result had written .* by then, .* are free")
        with pytest.raises(StoreError, match=says):
            lab.run(large)
        with pytest.raises(StoreError, match="disk full while running stage"):
            lab.run(lab.node(lab_stages.write, megabytes=5., honest=False))
        assert [p.name for p in (lab.store.objects/"lab_stages.write").iterdir()] == [small.key]
        assert not remains(lab.store, ["tmp"])
        assert subprocess.run(["mount", "-o", "remount,size=30m", str(disk)]).returncode == 0
        assert lab.run([small, large])[1].result == {"megabytes": 5.}
        assert bench.starts() == ["write"]*4
    finally:
        subprocess.run(["umount", "-l", str(disk)])


TOO_LARGE = """
import sys, lab_stages as s
from mcl_repro.lab.lab import Lab
lab = Lab("smoke", device="cpu", runs=sys.argv[1])
lab.run([lab.node(s.make, seed=0), lab.node(s.write, megabytes=5.)])
"""


def test_a_file_that_may_not_grow(bench):
    "Everywhere else: the kernel refuses writes beyond RLIMIT_FSIZE, with EFBIG in place of ENOSPC."
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000,)*2)
    code, out, err = bench.run(code=TOO_LARGE, preexec_fn=limit)
    assert code == 1 and "StoreError" in err and "disk full" in err
    lab = bench.lab()
    assert [p.name for p in lab.store.objects.iterdir()] == ["lab_stages.make"] and not remains(lab.store, ["tmp"])
    lab.run([lab.node(lab_stages.make, seed=0), lab.node(lab_stages.write, megabytes=5.)])
    assert bench.starts() == ["make0", "write", "write"]


@pytest.mark.parametrize("name", ["record.json", "x.npy"])
def test_a_disk_full_at_the_very_end(bench, undisturbed, monkeypatch, name):
    "ENOSPC from a patched write, because a real disk cannot be made to run full at exactly this byte."
    real = store._flush
    def full(path):
        if path.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path)
    with monkeypatch.context() as patch:
        patch.setattr(store, "_flush", full)
        with pytest.raises(StoreError, match="disk full"):
            bench.finish()
    assert not list((bench.runs/"store"/"objects").glob("*/*"))
    bench.finish()
    whole(bench, undisturbed)


# ---- damaged artefacts

def flip(path):
    "One bit in the middle."
    data = bytearray(path.read_bytes())
    data[len(data)//2] ^= 1
    path.write_bytes(data)


def flip_behind_the_back(path):
    "The last bit, with time stamps that tell nothing (as when the disk itself forgets)."
    state = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    with open(path, "r+b") as f:
        f.write(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def truncate(path):
    os.truncate(path, 100)


def change_result(path):
    path.write_text(path.read_text().replace('"norm": 1', '"norm": 2'))


HARMS = {
    "bit flipped": (flip, "weights.npy"),
    "bit flipped unseen": (flip_behind_the_back, "weights.npy"),
    "truncated": (truncate, "weights.npy"),
    "missing": (Path.unlink, "weights.npy"),
    "record flipped": (flip, "record.json"),
    "record truncated": (truncate, "record.json"),
    "record missing": (Path.unlink, "record.json"),
    "record forged": (change_result, "record.json"),
}


@pytest.mark.parametrize("harm,name", HARMS.values(), ids=HARMS)
def test_a_damaged_artefact_is_never_served(bench, undisturbed, harm, name):
    lab = bench.lab()
    nodes = graph(lab).settings["fits"]
    path = lab.run(graph(lab)).path
    victim = lab.store.path(nodes[1].stage.name, nodes[1].key)/name
    harm(victim)
    shutil.rmtree(path)
    before = len(bench.starts())
    code, out, err = bench.run()  # a new process, which has not read anything yet
    assert code == 0, err
    assert [s for s in bench.starts()[before:] if "." not in s] == ["fit1", "table"]  # only what was lost
    assert "was damaged" in err and len(list((lab.store.folder/"quarantine").iterdir())) == 1
    whole(bench, undisturbed)


def test_an_input_damaged_while_the_run_goes_on(bench, undisturbed, monkeypatch):
    "Between planning and reading: the run plans once more and loses nothing else."
    real, done = attempt.run_stage, []
    def harmful(store, spec, *args):
        if spec["stage"] == "lab_stages.table" and not done:
            done.append(flip(next(store.objects.glob("lab_stages.fit/*/weights.npy"))))
        return real(store, spec, *args)
    monkeypatch.setattr(attempt, "run_stage", harmful)
    with pytest.warns(UserWarning, match="was damaged"):
        bench.finish()
    starts = [s for s in bench.starts() if "." not in s]
    fits = sorted(s for s in starts if s.startswith("fit"))
    assert fits in (["fit0", "fit0", "fit1"], ["fit0", "fit1", "fit1"])
    assert sorted(set(starts) - set(fits)) == ["make0", "make1", "table"] and len(starts) == 6
    whole(bench, undisturbed)


# ---- two runs, one store

SERIAL, DASK = ("serial", 0), ("dask", 2)


@pytest.mark.parametrize("one,other", [(SERIAL, SERIAL), (SERIAL, DASK)], ids=["serial and serial", "serial and dask"])
def test_two_runs_at_once_share_the_work(bench, undisturbed, one, other):
    if DASK in (one, other):
        pytest.importorskip("distributed")
    held = bench.hold("fit0.step0")     # until both are there
    processes = [bench.launch(*other)]
    bench.wait_for("fit0.step0")
    plan = bench.runs/"smoke"/"plan.json"
    first = read_plan(plan)["session"]
    processes.append(bench.launch(*one))
    await_that(lambda: read_plan(plan)["session"] != first, "the second run")
    held.unlink()
    outputs = [p.communicate(timeout=DEADLINE) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert len(bench.starts()) == len(set(bench.starts())) == 15  # each stage and each of its steps once
    whole(bench, undisturbed)
