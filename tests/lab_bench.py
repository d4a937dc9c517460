"What the tests of the lab share: runs in processes of their own, and what such a run leaves."
import os, subprocess, sys, time
from pathlib import Path

from lab_stages import graph
from mcl_repro.lab.cleaning import clean_store
from mcl_repro.lab.lab import Lab

TESTS = Path(__file__).parent
DEADLINE = 120     # seconds, far more than anything here takes
RUN_ONLY = ("started", "finished", "seconds", "began", "process", "peak_memory_mb", "checksum", "hardware", "git")
STEPS = [f"fit0.step{i}" for i in range(5)]


def environment(**more):
    "For a process that imports this package and the tests' stages, from whatever folder."
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **more}


def await_that(condition, what):
    "Return once `condition()` is true."
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(.02)


class Bench:
    "One folder of runs with its log of starts."
    def __init__(self, folder, monkeypatch):
        self.folder, self.runs, self.log = folder, folder/"runs", folder/"starts"
        self.log.touch()
        monkeypatch.setenv("LAB_STARTS", str(self.log))

    def launch(self, engine="serial", jobs=0, *settings, code=None, **kwargs):
        "A run in a process of its own: of the graph of lab_stages, or of `code`."
        what = ["-c", code] if code else [str(TESTS/"lab_stages.py")]
        command = [sys.executable, *what, str(self.runs), engine, str(jobs), *settings]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen(command, env=environment(), **pipes, **kwargs)

    def run(self, *args, **kwargs):
        "The same to its end: exit code, output, errors."
        process = self.launch(*args, **kwargs)
        out, err = process.communicate(timeout=DEADLINE)
        return process.returncode, out, err

    def lab(self):
        return Lab("smoke", device="cpu", runs=self.runs)

    def finish(self):
        lab = self.lab()
        return lab.run(graph(lab))

    def order(self, what):
        "The next stage or step with this name kills its process."
        Path(f"{self.log}.{what}").touch()

    def hold(self, what):
        "The next step with this name waits at its end until the returned file is gone."
        order = Path(f"{self.log}.hold.{what}")
        order.touch()
        return order

    def lines(self):
        return self.log.read_text().splitlines()

    def starts(self):
        return [line.split()[0] for line in self.lines()]

    def pids(self, what=""):
        "Processes that began what starts so, in order."
        return [int(line.split()[1]) for line in self.lines() if line.startswith(what)]

    def wait_for(self, what):
        await_that(lambda: what in self.starts(), f"the start of {what}")


def content(runs):
    "Everything in the store that must not depend on what happened on the way: files, and records without times."
    store, found = Lab("smoke", device="cpu", runs=runs).store, {}
    for path in sorted(store.objects.glob("*/*")):
        record = store.read(path.parent.name, path.name).record
        files = {name: (path/name).read_bytes() for name in record["files"]}
        lasting = {k: v for k, v in record.items() if k not in RUN_ONLY}
        found[path.relative_to(store.objects).as_posix()] = files, lasting
    return found


def clean_once(store, runs, **how):
    "Agree to what a cleaning says; returns it."
    rows = clean_store(store.folder, runs, **how)
    return clean_store(store.folder, runs, yes=len(rows), **how)


def clean_all(store, runs, **how):
    "Set aside what may go, then delete what was set aside; returns what was there to go."
    rows = clean_once(store, runs, **how)
    clean_once(store, runs, **how)
    return rows


def remains(store, kinds=("tmp", "scratch", "running", "failed")):
    "What is left in the store besides artefacts."
    return [path for kind in kinds for path in (store.folder/kind).iterdir()]


def await_end(pids):
    "Return once none of these processes is left."
    await_that(lambda: not any(map(alive, pids)), f"the end of {pids}")


def alive(pid):
    try:
        if os.path.isdir("/proc"):
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        return os.kill(pid, 0) is None
    except OSError:
        return False
