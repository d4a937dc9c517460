"""What all benchmarks share: how much is measured, rows and their targets, comparisons in turns, other processes.

A speed in pairs per second says more about the machine than about the code, and on a machine that others use it changes
from minute to minute. So whatever can be a ratio is one: both sides run in the same minutes, in turns (ours, theirs,
theirs, ours, ...), and the median over the turns is kept. A neighbour's work then slows both alike. The lowest and the
highest turn stand beside it: a ratio whose turns scatter across the target has not been decided.
"""
import csv
import io
import json
import operator
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

import mcl_repro
from mcl_repro.core.errors import SettingsError
from mcl_repro.core.files import package_version, write_atomically
from mcl_repro.core.words import columns
from mcl_repro.data.registry import open_data
from mcl_repro.lab.attempt import git_state, hardware_facts, peak_memory
from mcl_repro.model.clip import build_clip
from mcl_repro.model.training import Recipe, training_set


# How much is measured

@dataclass(frozen=True)
class Scale:
    "How much every benchmark measures."
    model: str = "mini-RN"       # architecture that is trained
    batch_size: int = 128        # pairs per step
    steps: int = 16              # training steps per turn
    turns: int = 7               # repetitions of each side of a comparison
    seconds: float = 2.5         # of a turn of the training processes
    stages: int = 30             # runs through the store
    images: int = 3000           # 32 px pictures drawn per turn; fewer larger ones
    pairs: int = 3_000_000       # embeddings that are searched for poison
    width: int = 1024            # of these embeddings
    hidden: int = 512            # units of the mapping network, as in profile paper
    naive_pairs: int = 2000      # of the embeddings that the naive formula is computed for
    surrogate: str = "small-RN"  # architecture that protection_speed makes noise and triggers with
    protected: int = 10_000      # pairs whose protection is watched for memory; also a tenth of them
    folder: str | None = None    # where temporary stores go: on the disk of the results; default: the system's

    def __post_init__(self):
        if self.pairs < 20_000:
            raise SettingsError(f"{self.pairs:,} pairs are too few for detection_scale, which measures a hundredth of "
                                "them too: raise --pairs to 20,000 at least")


FULL = Scale()     # the model, the batch size and the data of profile mini; about twelve minutes
QUICK = Scale(     # the same way in seconds, to see that the benchmarks work
    model="smoke-RN", batch_size=32, steps=3, turns=2, seconds=0.5, stages=4, images=128, pairs=20_000, width=128,
    hidden=64, naive_pairs=100, surrogate="smoke-RN", protected=320,
)


# Rows and targets

COLUMNS = ("benchmark", "quantity", "value", "unit", "target", "met")
COMPARE = {">=": operator.ge, "<": operator.lt, "=": operator.eq}


def row(benchmark: str,     # name of the benchmark
        quantity: str,      # what was measured
        value: float,       # the measurement
        unit: str = "",     # of the value
        target: str = "",   # `>= 1`, `< 20` or `= 0`; nothing where a number is only of interest
        ) -> dict:          # with `met`: yes, no, or nothing without a target
    "One line of the result, the value rounded to four digits."
    met = ""
    if target:
        sign, limit = target.split()
        met = "yes" if COMPARE[sign](value, float(limit)) else "no"
    return dict(zip(COLUMNS, (benchmark, quantity, float(f"{value:.4g}"), unit, target, met)))


def not_judged(found: dict) -> dict:
    "A row whose target does not count here."
    return {**found, "met": ""}


BENCHMARKS = {}  # name -> function (Scale) -> rows, in the order in which they run


def benchmark(function):
    "Register a function `(scale: Scale) -> rows` under its name."
    BENCHMARKS[function.__name__] = function
    return function


# Comparisons

def in_turns(turns: int,   # how often each is measured
             *measures,    # functions without arguments, each returns a number
             ) -> list:    # one list of numbers per function
    "Measure things alternately, so that a change of the machine's load falls on all of them."
    found = [[] for _ in measures]
    for turn in range(turns):
        order = range(len(measures)) if turn % 2 == 0 else reversed(range(len(measures)))
        for i in order:
            found[i].append(measures[i]())
    return found


def ratio_rows(name: str, quantity: str, above: list, below: list, target: str) -> list:
    "Median, lowest and highest ratio of two lists that were measured in turns."
    ratios = np.divide(above, below)
    return [
        row(name, quantity, np.median(ratios), "ratio", target),
        row(name, f"{quantity}, lowest turn", ratios.min(), "ratio"),
        row(name, f"{quantity}, highest turn", ratios.max(), "ratio"),
    ]


def pairs_per_second(function, pairs):
    "A function that runs `function` and returns its speed."
    def measure():
        started = time.perf_counter()
        function()
        return pairs / (time.perf_counter() - started)
    return measure


def prepared(scale: Scale) -> tuple:
    "A model, pairs of the embedded world for one turn, and the recipe of one pass over them."
    clip = build_clip(scale.model)
    data = training_set(clip, open_data(f"world:train:{scale.batch_size * scale.steps}"))
    return clip, data, Recipe(epochs=1, batch_size=scale.batch_size, learning_rate=1e-3)


# The machine

def cores() -> int:
    "Cores that this process may use."
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def used_seconds() -> float | None:
    "Processor seconds that the whole machine has used so far; None where the system does not tell."
    with suppress(OSError, ValueError, AttributeError):
        numbers = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        idle, waiting = numbers[3], numbers[4]
        return (sum(numbers) - idle - waiting) / os.sysconf("SC_CLK_TCK")
    return None


def peak_mebibytes() -> float | None:
    "Highest resident set of this process so far; None where the system does not tell."
    return peak_memory(dict(type="cpu")).get("peak_memory_mb")


def machine_rows() -> list:
    "The machine by what it is, not by its name; versions; how busy it is. Rows without target."
    facts = dict(hardware_facts("cpu"))
    facts["memory"] = f"{facts['memory'] / 2**30:.0f} GiB" if "memory" in facts else ""
    for package in ("torch", "open_clip_torch", "numpy"):
        facts[package] = package_version(package, build=False)
    facts["usable cores"] = cores()
    with suppress(OSError, AttributeError):
        facts["load average at the start"] = round(os.getloadavg()[0], 2)
    facts |= {f"git {k}": v for k, v in git_state().items()}
    facts["started"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return [dict(zip(COLUMNS, ("machine", what, fact, "", "", ""))) for what, fact in facts.items()]


# Results

def write_rows(rows: list, path: Path):
    "Write rows as CSV, whole or not at all."
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def show_rows(rows: list):
    "Print rows as a table, the machine below it."
    shown, before = [], None
    for found in rows:
        name = found["benchmark"]
        if name == "machine":
            continue
        value = "" if found["value"] == "" else format(found["value"], "g")
        shown.append({**found, "benchmark": "" if name == before else name, "value": value})
        before = name
    print(columns(shown, list(COLUMNS)))
    print("; ".join(f"{r['quantity']} {r['value']}" for r in rows if r["benchmark"] == "machine"))


# Other processes

def environment() -> dict:
    "The environment of another interpreter that finds this package and these scripts."
    folders = [str(Path(mcl_repro.__file__).parent.parent), str(Path(__file__).parent)]
    path = os.pathsep.join(filter(None, [*folders, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


class Process:
    "Another interpreter in which a function answers, line by line, what it is told: `function(lines, answer)`."
    def __init__(self, module, function, settings, doing):
        code = (f"import sys, json; from {module} import {function} as go; "
                "go(sys.stdin, lambda x: print(json.dumps(x), flush=True))")
        self.doing = doing
        self.process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, env=environment())
        self.tell(json.dumps(settings))

    def tell(self, line):
        with suppress(BrokenPipeError):         # a process that has died is reported where its answer is missing
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise RuntimeError(f"a {self.doing} process ended with exit code {code}; its message stands above")
        return json.loads(line)

    def close(self):
        self.process.kill()
        with suppress(BrokenPipeError):
            self.process.communicate()
