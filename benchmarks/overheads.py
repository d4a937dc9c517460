"""What the library adds: the store to a stage, imports and the command's help, drawing the embedded world."""
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from measuring import benchmark, environment, in_turns, pairs_per_second, row, Scale
from mcl_repro.data.registry import resolve
from mcl_repro.data.world import render, scenes
from mcl_repro.lab.attempt import limit_threads
from mcl_repro.lab.costs import cost_of, StageWork
from mcl_repro.lab.lab import Lab
from mcl_repro.lab.nodes import stage
from mcl_repro.model.clip import build_clip, save_clip
from mcl_repro.papers.stages import poisoned_pairs


# The store
#
# A stage of a few seconds should not notice that it is stored. Measured are stages through the real way (`lab.node`,
# `lab.run`), less the time spent in the stage's own function, which its record states. Cold is computed and stored;
# warm is found again by the same process, which compares each file with its hash only once. Once with hardly a file
# (`poisoned_pairs` of a clean set), once with a model's weights, whose hash and way to the disk depend on the disk:
# that one has no target. The first stage of a process also reads and hashes the library's code: a row of its own.

@stage
def copied_weights(work, *,
    weights: str,  # a file
    number: int,   # makes it another artefact
):
    "A stage that leaves a file as large as a model."
    shutil.copyfile(weights, work.out/"clip.safetensors")
    return dict(number=number)


@cost_of(copied_weights)
def copied_weights_cost(s):
    "A copy of some weights."
    return StageWork(kept=10**6)


def milliseconds(lab, what, settings, cold):
    "Wall time of one node through the lab; for a cold one without its own function."
    started = time.perf_counter()
    artefact = lab.run(lab.node(what, **settings))
    return 1000 * (time.perf_counter() - started - (artefact.record["seconds"] if cold else 0))


@benchmark
def store_overhead(scale: Scale) -> list:
    "Milliseconds that the store adds to a stage."
    name, rows = "store_overhead", []
    with tempfile.TemporaryDirectory(dir=scale.folder) as folder:
        lab = Lab("smoke", device="cpu", runs=Path(folder)/"runs", progress=False)
        weights = Path(folder)/"clip.safetensors"
        save_clip(build_clip(scale.model), weights)
        clean = dict(pairs=resolve("world:train:100"), attack=None, target="banana", count=0, image_size=32)
        small = [dict(clean, seed=i) for i in range(scale.stages)]
        large = [dict(weights=str(weights), number=i) for i in range(max(scale.stages // 5, 1))]
        first = milliseconds(lab, poisoned_pairs, dict(clean, seed=-1), True)
        rows.append(row(name, "first stage of this process", first, "ms"))
        megabytes = f", {weights.stat().st_size / 1e6:.0f} MB of weights"
        for what, settings, size, target in ((poisoned_pairs, small, "", "< 20"),
                                             (copied_weights, large, megabytes, "")):
            for cold in (True, False):
                times = [milliseconds(lab, what, s, cold) for s in settings]
                rows.append(row(name, ("cold" if cold else "warm") + size, np.median(times), "ms per stage", target))
    return rows


# Imports and the command's help
#
# Whole processes in a fresh interpreter, from start to exit, in turns. `import torch` alone stands beside
# `import mcl_repro.papers.ubt`: it is the part that is not ours. open_clip is imported when the first model is built,
# so that has its own row. The help must come without torch, or it would take as long as torch does.

COMMANDS = {
    "python alone": ["-c", "pass"],
    "import torch": ["-c", "import torch"],
    "import mcl_repro.papers.ubt": ["-c", "import mcl_repro.papers.ubt"],
    "import mcl_repro.papers.ubt and build a CLIP": [
        "-c", "import mcl_repro.papers.ubt; from mcl_repro.model.clip import build_clip; build_clip('smoke-RN')",
    ],
    "mcl_repro --help": ["-m", "mcl_repro", "--help"],
}
COUNT_TORCH = """
import sys
from mcl_repro.cli.main import main
try:
    main(["--help"])
except SystemExit:
    print(sum(name.partition(".")[0] == "torch" for name in sys.modules))
"""


def python(words):
    "Run a fresh interpreter beside this package; its output. Raises RuntimeError where it fails."
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment())
    if done.returncode:
        raise RuntimeError(f"python {' '.join(words)} failed: {done.stderr.strip()[-500:]}")
    return done.stdout


def process_times(commands: list,  # per command, the words after `python`
                  turns: int,      # how often each is run
                  ) -> list:       # per command, seconds of every turn
    "Times of whole processes, in turns."
    def timed(words):
        started = time.perf_counter()
        python(words)
        return time.perf_counter() - started
    if turns > 2:
        for words in commands:
            timed(words)     # once unmeasured: from the disk into memory
    return in_turns(turns, *[lambda w=words: timed(w) for words in commands])


@benchmark
def import_times(scale: Scale) -> list:
    "Seconds from starting an interpreter to its end."
    targets = {"import mcl_repro.papers.ubt": "< 3", "mcl_repro --help": "< 0.5"}
    found = zip(COMMANDS, process_times(list(COMMANDS.values()), scale.turns))
    rows = [row("import_times", what, np.median(times), "s", targets.get(what, "")) for what, times in found]
    loaded = int(python(["-c", COUNT_TORCH]).split()[-1])
    return [*rows, row("import_times", "torch modules loaded by mcl_repro --help", loaded, "modules", "= 0")]


# Drawing the world: it is drawn when it is needed and not kept on disk, so drawing must be quick

@benchmark
def world_rendering(scale: Scale) -> list:
    "Pictures per second of the embedded world, scenes included, one thread."
    def drawing(size):
        count = max(scale.images * 32**2 // size**2, 16)
        return pairs_per_second(lambda: render(scenes("train", count), size), count)
    targets = {32: ">= 3000", 64: "", 128: "", 224: ""}
    with limit_threads(dict(threads=1), ("torch",)):
        for size in targets:
            drawing(size)()               # the first picture of a size prepares its materials
        found = in_turns(scale.turns, *map(drawing, targets))
    return [row("world_rendering", f"{size} px", np.median(speeds), "images/s", targets[size])
            for size, speeds in zip(targets, found)]
