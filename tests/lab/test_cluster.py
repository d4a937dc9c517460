"""Engines that bring stages to other processes: workers of a Dask scheduler, and several processes for one stage."""
import re, signal, subprocess, sys, threading

import psutil
import pytest

import lab_stages
from lab_bench import STEPS, Bench, await_end, await_that, content, environment, remains
from lab_stages import graph
from mcl_repro.core.errors import SettingsError, StoreError
from mcl_repro.core.files import read_json
from mcl_repro.lab import cluster
from mcl_repro.lab.attempt import StageError, stage_function
from mcl_repro.lab.engine import dask_client, dask_workers
from mcl_repro.lab.lab import Lab
from mcl_repro.lab.nodes import node_spec

# What a worker loads to pass for one with a GPU, and for one on a machine that has another disk.
GPU = """
from mcl_repro.lab import attempt
attempt.reset_peak_memory = lambda device: None
attempt.peak_memory = lambda device: {}
"""
BLIND = """
from mcl_repro.lab import engine
engine._sees = lambda mark: False
"""


class Scheduler(Bench):
    "A scheduler and its workers, each a process as a user would start it. All write into one log of starts."
    def __init__(self, folder, monkeypatch):
        super().__init__(folder, monkeypatch)
        self.processes = []
        told = folder/"scheduler.json"
        self.start("scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(told))
        await_that(lambda: read_json(told, default=None), "the start of a scheduler")
        self.address = read_json(told)["address"]

    def start(self, what, *words):
        command = [sys.executable, "-m", f"distributed.cli.dask_{what}", *words, "--no-dashboard"]
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        process = subprocess.Popen(command, cwd=self.folder, env=environment(), **quiet)
        self.processes.append(process)
        return process

    def worker(self, *words, loads=None):
        "Start a worker; its stages have its process id, since it has no nanny."
        if loads:
            (self.folder/"loads.py").write_text(loads)
            words += ("--preload", str(self.folder/"loads.py"))
        usual = ["--nthreads", "1", "--no-nanny", "--local-directory", str(self.folder/"local")]
        return self.start("worker", self.address, *usual, *words)

    def lab(self, device="cpu", **kwargs):
        return Lab("smoke", device=device, runs=self.runs, engine=self.address, **kwargs)

    def wait_for_any(self, what):
        await_that(lambda: self.pids(what), f"the start of any {what}")

    def close(self):
        for p in self.processes:
            p.kill()
        for p in self.processes:
            p.wait()


PATIENCE = 300      # seconds that a run waits for a worker here


@pytest.fixture
def scheduler(tmp_path, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setenv("MCL_REPRO_WAIT", str(PATIENCE))
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
    "A run begins with no worker, a second one joins in the middle, and one is killed in the middle of a training."
    lab, found = scheduler.lab(), []
    places = [lambda lab, i=i: lab.node(lab_stages.where, number=i, processes=2) for i in range(4)]
    run = threading.Thread(target=lambda: found.extend(lab.run([p(lab) for p in places])))
    run.start()
    says = f"waiting for a worker (at most {PATIENCE} s"
    await_that(lambda: says in capfd.readouterr().err, "waiting for a worker")
    assert scheduler.starts() == []
    one = scheduler.worker()
    scheduler.wait_for_any("where")
    two = scheduler.worker()
    run.join(PATIENCE)
    assert [a.result for a in found] == [{"number": i} for i in range(4)]
    assert set(scheduler.pids("where")) == {one.pid, two.pid} and len(scheduler.starts()) == 4

    scheduler.order("fit0.step2")
    lab.run(graph(lab))
    lab.close()
    dead, = [p for p in (one, two) if p.poll() is not None]
    assert dead.returncode == -signal.SIGKILL
    starts, fits = scheduler.starts(), scheduler.pids("fit0 ")
    assert len(fits) == 2 and fits[0] == dead.pid != fits[1]
    assert [s for s in starts if s in STEPS] == STEPS  # the other one went on from where it was killed
    once = [starts.count(s) for s in ("make0", "make1", "fit1", "table")]
    assert once == [1]*4, "what was finished is not computed again"
    assert content(lab.runs) == serially(scheduler, *places, graph)


def test_stages_for_a_gpu_go_to_workers_that_declare_one(scheduler, monkeypatch):
    plain = scheduler.worker()
    here = scheduler.lab()
    assert scheduler.lab("auto").device == "cpu"
    monkeypatch.setenv("MCL_REPRO_WAIT", "0")
    command = re.escape(f"start one with: dask worker {scheduler.address}")
    says = rf"no worker that declares a GPU for 0 s; {command} .*--resources GPU=1, or give device cpu"
    with pytest.raises(SettingsError, match=says):
        scheduler.lab("cuda").ready()
    monkeypatch.setenv("MCL_REPRO_WAIT", str(PATIENCE))
    with_gpu = scheduler.worker("--resources", "GPU=1", loads=GPU)
    lab = scheduler.lab("cuda")
    lab.ready()
    assert scheduler.lab("auto").device == "cuda"
    on_gpu = [lab.node(lab_stages.where, number=i, processes=2) for i in range(4)]
    anywhere = [here.node(lab_stages.where, number=i, processes=2) for i in range(4, 8)]
    lab.run(on_gpu + anywhere)
    assert {p for i in range(4) for p in scheduler.pids(f"where{i}")} == {with_gpu.pid}
    assert plain.pid in {p for i in range(4, 8) for p in scheduler.pids(f"where{i}")}
    assert {n.device["type"] for n in on_gpu} == {"cuda"} and [r["state"] for r in lab.status()] == ["done"]*8

    blind = scheduler.worker(loads=BLIND)
    with dask_client(here) as client:
        await_that(lambda: len(dask_workers(client)) == 3, "the third worker")
    says = r"worker tcp://127.0.0.1:\d+ does not see the store.s folder .*runs/store: put it on a disk"
    with pytest.raises(StoreError, match=says):
        scheduler.lab().ready()
    assert blind.poll() is None
    for process in (with_gpu, blind):
        process.kill()
        process.wait()
    monkeypatch.setenv("MCL_REPRO_WAIT", "1")
    with pytest.raises(SettingsError, match="the cluster had no worker that declares a GPU for 1 s"):
        lab.run(lab.node(lab_stages.where, number=9))
    assert scheduler.lab().run(scheduler.lab().node(lab_stages.where, number=9)).result == {"number": 9}


def test_a_scheduler_that_is_not_there(tmp_path):
    "Said at once, and not after the ten minutes that a run waits for workers."
    lab = Lab("smoke", device="cuda", runs=tmp_path, engine="tcp://127.0.0.1:1")
    assert lab.device == "cuda"  # without asking for a GPU here
    with pytest.raises(SettingsError, match="engine 'tcp://127.0.0.1:1': no Dask scheduler answers there"):
        lab.ready()
    with pytest.raises(SettingsError, match="no Dask scheduler answers there"):
        Lab("smoke", runs=tmp_path, engine="127.0.0.1:1").device
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
    assert (found.result["sum"], (found.path/"sum.txt").read_text()) == (3, "3.0")
    assert found.record["hardware"]["processes"] == 2
    assert list(found.record["files"]) == ["sum.txt"] and "processes" not in made.record["hardware"]
    alone = Lab("smoke", device="cpu", runs=bench.folder/"serial", engine="serial")
    one = alone.run(alone.node(lab_stages.together, recipe="sum"))
    assert one.key == found.key
    assert one.result["drawn"] == found.result["drawn"], "every process starts from the same seed"
    assert not remains(lab.store) and not list((lab.store.folder/"locks").glob("ranks*"))
    lab.run(both)
    assert len(bench.starts()) == 4, "nothing is computed again"  # the fourth is the serial one


def test_the_first_of_several_errors_is_told(bench):
    lab = Lab("smoke", device="cpu", runs=bench.runs, jobs=2)
    node = lab.node(lab_stages.together, recipe="raise", fails=1)
    says = r"stage lab_stages.together \(recipe=raise, fails=1\) failed: ZeroDivisionError: in process 1"
    with pytest.raises(StageError, match=says):
        lab.run(node)
    assert [(r["state"], r["note"]) for r in lab.status()] == [("failed", "ZeroDivisionError: in process 1")]
    assert not remains(lab.store, ("tmp", "running")) and lab.store.read(node.stage.name, node.key) is None


HANGS = """
import sys, lab_stages
from mcl_repro.lab.lab import Lab
lab = Lab("smoke", device="cpu", runs=sys.argv[1], jobs=2)
lab.run(lab.node(lab_stages.together, recipe="hang"))
"""


def test_no_process_outlives_the_run(bench):
    process = bench.launch(code=HANGS)
    for what in ("together0of2", "together1of2"):
        bench.wait_for(what)
    family = {p.pid for p in psutil.Process(process.pid).children(recursive=True)}
    assert set(bench.pids()) < family  # torchrun as well
    process.kill()
    process.wait()
    await_end(family)


def test_too_many_processes_for_the_gpus(tmp_path, monkeypatch):
    lab = Lab("smoke", device="cpu", runs=tmp_path, engine="torchrun", jobs=3)
    monkeypatch.setattr(Lab, "device", "cuda")
    monkeypatch.setattr(cluster, "visible_gpus", lambda: ["0", "1"])
    with pytest.raises(SettingsError, match="3 processes, but this machine shows 2 GPUs"):
        lab.ready()
    lab.jobs = None
    assert cluster.process_count(lab) == 2


def test_two_processes_train_as_one_does(tmp_path):
    "A stage of the library under torchrun: one process's loss and key, and a record that says how many there were."
    from mcl_repro.papers.stages import clean_clip
    recipe, made = dict(epochs=2, batch_size=32, learning_rate=3e-4), {}
    for engine, jobs in (("serial", None), ("torchrun", 2)):
        lab = Lab("smoke", "cpu", tmp_path/engine, engine=engine, jobs=jobs, progress=False,
                  roles={"pretrain": "world:pretrain:100"})
        made[engine] = lab.run(lab.node(clean_clip, model="small-ViT", pairs=lab.role("pretrain"), recipe=recipe))
    one, two = made["serial"], made["torchrun"]
    assert one.key == two.key
    assert two.record["hardware"]["processes"] == 2 and "processes" not in one.record["hardware"]
    assert two.result["steps"] == one.result["steps"] == 6
    assert two.result["loss"] == pytest.approx(one.result["loss"], abs=2e-3)
    assert not (tmp_path/"torchrun"/"store"/"scratch"/two.key).exists()


def test_a_stage_that_keeps_files_between_steps_stays_in_one_process():
    settings = dict(recipe=dict(epochs=1))
    assert not cluster.trains(dict(stage="mem.unlearnable_pairs", settings=settings))
    assert cluster.trains(dict(stage="mem.hacker_clip", settings=settings))
