"""Small numpy stages for the lab's tests, importable in worker processes: make -> fit -> table, about 0.1 s each."""
import os, signal, sys, time
from pathlib import Path

import numpy as np

from mcl_repro.lab.lab import Lab
from mcl_repro.lab.nodes import stage


def started(what):
    "Note in the file $LAB_STARTS that a stage began; returns how often it did so far."
    log = Path(os.environ["LAB_STARTS"])
    with log.open("a") as f:
        f.write(f"{what} {os.getpid()}\n")
    return sum(line.split()[0] == what for line in log.read_text().splitlines())


def die_if(what):
    "Kill this process without ceremony when the file $LAB_STARTS.<what> asks for it; the order is carried out once."
    order = Path(f"{os.environ['LAB_STARTS']}.{what}")
    if order.exists():
        order.unlink()
        os.kill(os.getpid(), signal.SIGKILL)


def hold_if(what):
    "Wait as long as there is a file $LAB_STARTS.hold.<what>."
    while Path(f"{os.environ['LAB_STARTS']}.hold.{what}").exists():
        time.sleep(.02)


@stage
def make(work, *, seed, rows=200):
    started(f"make{seed}")
    rng = np.random.default_rng(seed)
    np.save(work.out/"x.npy", rng.normal(size=(rows, 8)).astype("float32"))
    die_if(f"make{seed}")
    return {"rows": rows}


@stage
def fit(work, *, data, seed, steps=5, sleep=0.02):
    "A training in small: keeps its state in scratch after every step, and goes on from there."
    started(f"fit{seed}")
    x = np.load(data.path/"x.npy")
    state = work.scratch/"state.npz"
    first, weights = 0, np.random.default_rng(seed).normal(size=8)
    if state.exists():
        with np.load(state) as s:
            first, weights = int(s["step"]), s["weights"]
    for step in range(first, steps):
        started(f"fit{seed}.step{step}")
        time.sleep(sleep)
        weights = weights - 0.1*(x*(x@weights)[:, None]).mean(0)
        np.savez(work.scratch/"part.npz", step=step + 1, weights=weights)
        os.replace(work.scratch/"part.npz", state)
        work.progress(step + 1, steps, "steps")
        die_if(f"fit{seed}.step{step}")
        hold_if(f"fit{seed}.step{step}")
    np.save(work.out/"weights.npy", weights)
    return {"norm": float(np.linalg.norm(weights))}


@stage
def table(work, *, fits):
    started("table")
    die_if("table")
    lines = [f"{i},{f.result['norm']!r}\n" for i, f in enumerate(fits)]
    (work.out/"table.csv").write_text("seed,norm\n" + "".join(lines))
    return {"mean": sum(f.result["norm"] for f in fits)/len(fits)}


@stage
def write(work, *, megabytes, honest=True):
    "One file; without `honest` a failure is told as torch.save tells it, without the reason."
    started("write")
    done = True
    try:
        (work.out/"block.bin").write_bytes(b"x"*int(megabytes*1e6))
    except OSError:
        if honest:
            raise
        done = False
    if not done:
        raise RuntimeError("file write failed")
    return {"megabytes": megabytes}


@stage
def fail(work, *, kind, after=None):
    from mcl_repro.core.errors import TrainingError
    started("fail")
    if kind == "user":
        raise TrainingError("loss is nan at step 3; lower the learning rate")
    if kind == "nan":
        return {"loss": float("nan")}
    if kind == "link":
        (work.out/"link").symlink_to("/etc/hostname")
    if kind == "deadly":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "record":
        (work.out/"record.json").write_text("{}")
    if kind == "bug":
        raise ZeroDivisionError("a bug")
    return {}


@stage
def careless(work, *, name):
    "Draws from global generators that nobody has seeded."
    import random
    return {"numpy": np.random.rand(), "random": random.random()}


@stage
def where(work, *, number, processes=1):
    "Leaves in the log which process computed this; returns only when so many have begun one."
    started(f"where{number}")
    end = time.time() + 90
    while len({line.split()[1] for line in Path(os.environ["LAB_STARTS"]).read_text().splitlines()}) < processes:
        assert time.time() < end, f"no {processes} processes"
        time.sleep(.02)
    (work.out/"number.txt").write_text(str(number))
    return {"number": number}


@stage
def together(work, *, recipe, fails=None):
    """A training of several processes in small: they add up their numbers.

    Process `fails` raises or is killed instead, before that or late.
    """
    import torch
    import torch.distributed as group
    rank, size = (group.get_rank(), group.get_world_size()) if group.is_initialized() else (0, 1)
    started(f"together{rank}of{size}")
    drawn = float(torch.rand(()))
    total = torch.tensor(float(rank + 1))
    if rank == fails and recipe == "raise":
        raise ZeroDivisionError(f"in process {rank}")
    if rank == fails and recipe == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if recipe == "hang":
        time.sleep(600)
    if size > 1:
        group.all_reduce(total)
    (work.scratch/f"{rank}.txt").write_text("")
    (work.out/"sum.txt").write_text(str(total.item()))
    work.progress(1, 1, "sums")
    if rank == fails and recipe == "late":
        raise ZeroDivisionError(f"after the sum, in process {rank}")
    return {"sum": total.item(), "drawn": drawn}


def in_worker():
    "Threads that this process was started with, and whether it is a daemon, which could not have children."
    import multiprocessing
    return os.environ.get("OMP_NUM_THREADS"), multiprocessing.current_process().daemon


def graph(lab, n=2, **settings):
    "make -> fit for n seeds, and a table of all."
    fits = [lab.node(fit, data=lab.node(make, seed=s), seed=s, **settings) for s in range(n)]
    return lab.node(table, fits=fits)


def main(runs, engine="serial", jobs=None, **settings):
    "What the crash tests start as a process of its own."
    lab = Lab("smoke", device="cpu", runs=runs, engine=engine, jobs=jobs)
    print("result", lab.run(graph(lab, **settings)).result, flush=True)
    lab.close()


if __name__ == "__main__":
    import lab_stages  # the stages under the name that workers import them by
    runs, engine, jobs, *given = sys.argv[1:]
    settings = dict(pair.split("=") for pair in given)
    numbers = {name: float(text) if "." in text else int(text) for name, text in settings.items()}
    lab_stages.main(runs, engine, int(jobs) or None, **numbers)
