"""Engines that bring stages to other processes: workers of a Dask scheduler, and several processes for one stage."""
import os, signal, subprocess, sys, threading, time
from pathlib import Path

import psutil
import pytest

import lab_stages
from lab_stages import graph
from mcl_repro.lab import cluster as module
from mcl_repro.core.errors import SettingsError, StoreError
from mcl_repro.lab.attempt import StageError
from mcl_repro.lab.lab import Lab
from test_crash import HERE, STEPS, Bench, content, gone
from mcl_repro.lab.attempt import stage_function
from mcl_repro.lab.nodes import node_spec
from mcl_repro.lab.store import read_record

# What a worker loads to pass for one with a GPU, and for one on a machine that has another disk.
GPU = "import mcl_repro.lab as lab\nlab._reset_peak = lambda device: None\nlab._peak = lambda device: {}\n"
BLIND = "import mcl_repro.lab as lab\nlab._sees = lambda mark: False\n"


class Scheduler(Bench):
    "A scheduler and its workers, each a process as a user would start it. All write into one log of starts."
    def __init__(self, folder, monkeypatch):
        super().__init__(folder, monkeypatch)
        self.processes = []
        self.start("scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(folder/"scheduler.json"))
        end = time.time() + 90
        while (found := read_record(folder/"scheduler.json")) is None:
            assert time.time() < end
            time.sleep(.05)
        self.address = found["address"]

    def start(self, what, *words):
        paths = os.pathsep.join([str(HERE), str(HERE.parent)])
        process = subprocess.Popen(
            [sys.executable, "-m", f"distributed.cli.dask_{what}", *words, "--no-dashboard"], cwd=self.folder,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.processes.append(process)
        return process

    def worker(self, *words, loads=None):
        "Start a worker; its stages have its process id, since it has no nanny."
        if loads:
            (self.folder/"loads.py").write_text(loads)
            words += ("--preload", str(self.folder/"loads.py"))
        return self.start(
            "worker", self.address, "--nthreads", "1", "--no-nanny", "--local-directory", str(self.folder / "local"),
            *words,
        )

    def lab(self, device="cpu", **kwargs):
        return Lab("smoke", device=device, runs=self.runs, engine=self.address, **kwargs)
    def wait_for_any(self, what):
        end = time.time() + 90
        while not self.processes_of(what):
            assert time.time() < end
            time.sleep(.02)

    def processes_of(self, what):
        return [int(line.split()[1]) for line in self.log.read_text().splitlines() if line.startswith(what)]

    def close(self):
        for p in self.processes:
            p.kill()
        for p in self.processes:
            p.wait()


@pytest.fixture
def scheduler(tmp_path, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setenv("MCL_REPRO_WAIT", "90")
    found = Scheduler(tmp_path, monkeypatch)
    try:
        yield found
    finally:
        found.close()


def serially(bench, *nodes):
    "The same nodes in this process, with the same log; what that leaves."
    lab = Lab("smoke", device="cpu", runs=bench.folder/"serial")
    lab.run([node(lab) for node in nodes])
    return content(lab.runs)


# ---- workers of a scheduler

def test_workers_that_join_late_and_are_killed(scheduler, capfd):
    """A run begins with no worker, a second one joins in the middle and takes work, and one is killed in the middle of
    a training.
    """
    lab, found = scheduler.lab(), []
    places = [lambda lab, i=i: lab.node(lab_stages.where, number=i, processes=2) for i in range(4)]
    run = threading.Thread(target=lambda: found.extend(lab.run([p(lab) for p in places])))
    run.start()
    end = time.time() + 89
    while "waiting for a worker (at most 90 s" not in capfd.readouterr().err:
        assert time.time() < end
        time.sleep(.1)
    assert scheduler.starts() == []
    one = scheduler.worker()
    scheduler.wait_for_any("where")
    two = scheduler.worker()
    run.join(120)
    assert [a.result for a in found] == [{"number": i} for i in range(4)]
    assert set(scheduler.processes_of("where")) == {one.pid, two.pid} and len(scheduler.starts()) == 4

    scheduler.order("fit0.step2")
    lab.run(graph(lab))
    lab.close()
    dead, = [p for p in (one, two) if p.poll() is not None]
    assert dead.returncode == -signal.SIGKILL
    starts, fits = scheduler.starts(), scheduler.processes_of("fit0 ")
    assert len(fits) == 2 and fits[0] == dead.pid != fits[1]
    assert [s for s in starts if s in STEPS] == STEPS  # the other one went on from where it was killed
    assert all(starts.count(s) == 1 for s in ("make0", "make1", "fit1", "table")), (
        "what was finished is not computed again"
    )
    assert content(lab.runs) == serially(scheduler, *places, graph)


def test_stages_for_a_gpu_go_to_workers_that_declare_one(scheduler, monkeypatch):
    plain = scheduler.worker()
    here = scheduler.lab()
    assert scheduler.lab("auto").device == "cpu"
    monkeypatch.setenv("MCL_REPRO_WAIT", "0")
    with pytest.raises(
        SettingsError,
        match=rf"no worker that declares a GPU for 0 s; start one with: dask worker {scheduler.address} "
        r".*--resources GPU=1, or give device cpu",
    ):
        scheduler.lab("cuda").ready()
    monkeypatch.setenv("MCL_REPRO_WAIT", "90")
    with_gpu = scheduler.worker("--resources", "GPU=1", loads=GPU)
    lab = scheduler.lab("cuda")
    lab.ready()
    assert scheduler.lab("auto").device == "cuda"
    on_gpu = [lab.node(lab_stages.where, number=i, processes=2) for i in range(4)]
    anywhere = [here.node(lab_stages.where, number=i, processes=2) for i in range(4, 8)]
    lab.run(on_gpu + anywhere)
    assert {p for i in range(4) for p in scheduler.processes_of(f"where{i}")} == {with_gpu.pid}
    assert plain.pid in {p for i in range(4, 8) for p in scheduler.processes_of(f"where{i}")}
    assert {n.device["type"] for n in on_gpu} == {"cuda"} and [r["state"] for r in lab.status()] == ["done"]*8

    blind = scheduler.worker(loads=BLIND)
    with pytest.raises(
        StoreError, match=r"worker tcp://127.0.0.1:\d+ does not see the store.s folder .*runs/store: put it on a disk"
    ):
        for _ in range(100):
            scheduler.lab().ready()
            time.sleep(.1)
    assert blind.poll() is None
    with_gpu.kill()
    with_gpu.wait()
    blind.kill()
    blind.wait()
    monkeypatch.setenv("MCL_REPRO_WAIT", "1")
    with pytest.raises(SettingsError, match="the cluster had no worker that declares a GPU for 1 s"):
        lab.run(lab.node(lab_stages.where, number=9))
    assert scheduler.lab().run(scheduler.lab().node(lab_stages.where, number=9)).result == {"number": 9}


def test_a_scheduler_that_is_not_there(tmp_path):
    lab = Lab("smoke", device="cuda", runs=tmp_path, engine="tcp://127.0.0.1:1")
    began = time.time()
    assert lab.device == "cuda"  # without asking for a GPU here
    with pytest.raises(SettingsError, match="engine 'tcp://127.0.0.1:1': no Dask scheduler answers there"):
        lab.ready()
    with pytest.raises(SettingsError, match="no Dask scheduler answers there"):
        Lab("smoke", runs=tmp_path, engine="127.0.0.1:1").device
    assert time.time() - began < 20
    with pytest.raises(SettingsError, match="device 'gpu' is not known"):
        Lab("smoke", device="gpu", runs=tmp_path, engine="127.0.0.1:1")


def test_the_engine_comes_from_the_environment_and_is_in_no_key(tmp_path, monkeypatch):
    serial = Lab("smoke", device="cpu", runs=tmp_path)
    key = graph(serial).key
    for engine in ("dask", "torchrun", "tcp://127.0.0.1:1"):
        monkeypatch.setenv("MCL_REPRO_ENGINE", engine)
        lab = Lab("smoke", device="cpu", runs=tmp_path)
        assert (lab.engine, graph(lab).key) == (engine, key)
    assert Lab("smoke", device="cpu", runs=tmp_path, engine="serial").engine == "serial"
    monkeypatch.setenv("MCL_REPRO_ENGINE", "slurm")
    with pytest.raises(SettingsError, match="engine 'slurm' is not known; give serial, dask, torchrun, or the address"):
        Lab("smoke", runs=tmp_path)


def test_a_worker_with_other_versions_computes_nothing(tmp_path):
    lab = Lab("smoke", device="cpu", runs=tmp_path)
    spec = node_spec(lab.node(lab_stages.make, seed=0), lab.store)
    assert stage_function(spec) is lab_stages.make
    with pytest.raises(SettingsError, match="this worker has numpy .*, the run was planned with 1.0"):
        stage_function({**spec, "versions": {"numpy": "1.0"}})
    with pytest.raises(SettingsError, match="this worker has other code"):
        stage_function({**spec, "code": "x"})


# ---- several processes for one stage

@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setenv("MCL_REPRO_ENGINE", "torchrun")
    return Bench(tmp_path, monkeypatch)


def test_two_processes_make_one_artefact(bench):
    lab = Lab("smoke", device="cpu", runs=bench.runs, jobs=2)
    both = [lab.node(lab_stages.together, recipe="sum"), lab.node(lab_stages.make, seed=0)]
    found, made = lab.run(both)
    assert sorted(bench.starts()) == ["make0", "together0of2", "together1of2"]
    assert (
        found.result["sum"] == 3
        and (found.path / "sum.txt").read_text() == "3.0"
        and found.record["hardware"]["processes"] == 2
    )
    assert list(found.record["files"]) == ["sum.txt"] and "processes" not in made.record["hardware"]
    alone = Lab("smoke", device="cpu", runs=bench.folder/"serial", engine="serial")
    one = alone.run(alone.node(lab_stages.together, recipe="sum"))
    assert one.key == found.key and one.result["drawn"] == found.result["drawn"], (
        "every process starts from the same seed"
    )
    store = lab.store
    assert not [p for kind in ("tmp", "scratch", "running", "failed") for p in (store.folder/kind).iterdir()]
    assert [p.name for p in (store.folder/"locks").iterdir() if p.name.startswith("ranks")] == []
    lab.run(both)
    assert len(bench.starts()) == 4, "nothing is computed again"  # the fourth is the serial one


def test_the_first_of_several_errors_is_told(bench):
    lab = Lab("smoke", device="cpu", runs=bench.runs, jobs=2)
    node = lab.node(lab_stages.together, recipe="raise", fails=1)
    with pytest.raises(
        StageError, match=r"stage lab_stages.together \(recipe=raise, fails=1\) failed: ZeroDivisionError: in process 1"
    ):
        lab.run(node)
    assert [(r["state"], r["note"]) for r in lab.status()] == [("failed", "ZeroDivisionError: in process 1")]
    assert (
        not [p for kind in ("tmp", "running") for p in (lab.store.folder / kind).iterdir()]
        and lab.store.read(node.stage.name, node.key) is None
    )


HANGS = """
import sys, lab_stages
from mcl_repro.lab.lab import Lab
lab = Lab('smoke', device='cpu', runs=sys.argv[1], jobs=2)
lab.run(lab.node(lab_stages.together, recipe='hang'))
"""


def test_no_process_outlives_the_run(bench):
    process = bench.launch(code=HANGS)
    for what in ("together0of2", "together1of2"):
        bench.wait_for(what)
    family = {p.pid for p in psutil.Process(process.pid).children(recursive=True)}
    assert bench.pids() < family  # torchrun as well
    process.kill()
    process.wait()
    assert gone(family) is True


def test_too_many_processes_for_the_gpus(tmp_path, monkeypatch):
    lab = Lab("smoke", device="cpu", runs=tmp_path, engine="torchrun", jobs=3)
    monkeypatch.setattr(Lab, "device", "cuda")
    monkeypatch.setattr(module, "visible_gpus", lambda: ["0", "1"])
    with pytest.raises(SettingsError, match="3 processes, but this machine shows 2 GPUs"):
        lab.ready()
    lab.jobs = None
    assert module.process_count(lab) == 2


def test_two_processes_train_as_one_does(tmp_path):
    """A stage of the library under torchrun: the loss of one process, a record that says how many there were, and the
    key of serial.
    """
    from mcl_repro.papers.stages import clean_clip
    made = {}
    for engine, jobs in (("serial", None), ("torchrun", 2)):
        lab = Lab(
            "smoke", "cpu", tmp_path / engine, engine=engine, jobs=jobs, progress=False,
            roles={"pretrain": "world:pretrain:100"},
        )
        made[engine] = lab.run(
            lab.node(
                clean_clip, model="small-ViT", pairs=lab.role("pretrain"),
                recipe=dict(epochs=2, batch_size=32, learning_rate=3e-4),
            )
        )
    one, two = made["serial"], made["torchrun"]
    assert one.key == two.key and two.record["hardware"]["processes"] == 2 and "processes" not in one.record["hardware"]
    assert two.result["steps"] == one.result["steps"] == 6 and two.result["loss"] == pytest.approx(
        one.result["loss"], abs=2e-3
    )
    assert not (tmp_path/"torchrun"/"store"/"scratch"/two.key).exists()


def test_a_stage_that_keeps_files_between_steps_stays_in_one_process():
    assert not module.trains(
        dict(stage="mem.unlearnable_pairs", settings=dict(recipe=dict(epochs=1)))
    ) and module.trains(dict(stage="mem.hacker_clip", settings=dict(recipe=dict(epochs=1))))
