"""CFBD's detection in millions of pairs: time, memory, growth, and whether it computes what the formula says.

CFBD is meant for the owner of a web-sized set, so it is measured at the size of CC3M: three million pairs of embeddings
of width 1024, float16, 12 GB in two memory-mapped files, on two cores. The embeddings are generated: what a CLIP would
need hours for is here a minute's work, and where the poison lies is known. They take over from CLIP what matters for
the work and for whether there is anything to find:

- Both modalities lie in cones of their own (Liang et al. 2022, Mind the Gap): text around m_T, images around m_I, the
  cosine of the two is 0.2.
- Captions come in clusters of very different sizes: s = sqrt(0.2) k + sqrt(0.4) n, with one of 1000 centres k and
  something of their own, n; the text is sqrt(0.4) m_T + s.
- An image shows a part of what its caption says: sqrt(0.4) m_I + f s + sqrt(0.6 (1 - f^2)) n', with f of mean 0.33 and
  deviation 0.05, so that pairs have cosines of about 0.2 to 0.35. For one pair in a hundred f is 0.17 +- 0.03: its
  caption fits badly, as happens on the web.
- A pair in a thousand is poisoned: f = 0, a trigger takes a part of the image's place in its cone, and the caption is
  one of 80 that share most of what they say, in a cluster that benign captions have too.

How well the poison is found here says that the benchmark does real work. How well CFBD finds real poison is the subject
of the notebook papers/cfbd.
"""
import functools
import json
import shutil
import tempfile
import time
from contextlib import closing, ExitStack
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

from measuring import (
    benchmark, cores, FULL, in_turns, not_judged, pairs_per_second, peak_mebibytes, Process, ratio_rows, row, Scale,
    used_seconds,
)
from mcl_repro.core.errors import SettingsError
from mcl_repro.lab.attempt import limit_threads
from mcl_repro.measures.metrics import detection_rates
from mcl_repro.model.training import Recipe
from mcl_repro.papers import cfbd

NAME = "detection_scale"
CLUSTERS, TEMPLATES = 1000, 80


# Generated embeddings

def unit_rows(rng, *shape):
    "Random directions."
    x = rng.standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(x / np.linalg.norm(x, axis=-1, keepdims=True))


def towards(direction, cosine, other):
    "A direction with the given cosine to `direction`, all else random."
    return normalize(cosine * direction + (1 - cosine**2)**0.5 * other, dim=-1)


def geometry_of(width, seed):
    "The directions that generated embeddings are made of: cones, clusters, trigger and the captions of the poison."
    rng = np.random.default_rng([seed, 1])
    text, other, away, common = unit_rows(rng, 4, width)
    return dict(text=text, image=towards(text, 0.2, other), trigger=away, clusters=unit_rows(rng, CLUSTERS, width),
                templates=towards(common, 0.7**0.5, unit_rows(rng, TEMPLATES, width)))


def pairs_of(geometry, poisoned, rng):
    "Image and text embeddings, float32 [n, width] of about unit length, of pairs that are poisoned or not (bool [n])."
    n, width, poisoned = len(poisoned), len(geometry["text"]), torch.from_numpy(poisoned)
    def noise():
        return torch.from_numpy(rng.random((n, width), dtype=np.float32)).sub_(0.5).mul_((12 / width)**0.5)
    cluster = torch.from_numpy((CLUSTERS * rng.random(n)**2).astype(np.int64))        # the first are the largest
    badly = rng.random(n) < 0.01
    mean, deviation = np.where(badly, 0.17, 0.33), np.where(badly, 0.03, 0.05)
    fit = torch.from_numpy(mean + deviation * rng.standard_normal(n)).float()
    fit[poisoned] = 0
    own, centre = noise(), (0.4**0.5 * geometry["image"]).repeat(n, 1)
    cluster[poisoned] = CLUSTERS - 1
    own[poisoned] = geometry["templates"][torch.from_numpy(rng.integers(0, TEMPLATES, int(poisoned.sum())))]
    centre[poisoned] = 0.25**0.5 * geometry["image"] + 0.15**0.5 * geometry["trigger"]
    said = geometry["clusters"][cluster].mul_(0.2**0.5).add_(own, alpha=0.4**0.5)
    rest = (0.6 * (1 - fit**2)).sqrt()[:, None]
    images = noise().mul_(rest).addcmul_(said, fit[:, None]).add_(centre)
    return images, said.add_(geometry["text"], alpha=0.4**0.5)


def write_embeddings(folder: Path,            # gets `images.npy` and `texts.npy`, float16 [pairs, width]
                     pairs: int,              # how many
                     width: int,              # of an embedding
                     seed: int = 0,           # of the geometry and of every pair
                     poison: float = 1e-3,    # share of poisoned pairs; at least 100 of them unless it is 0
                     chunk: int = 8192,       # rows at a time, each chunk from its own seed
                     ) -> np.ndarray:         # bool [pairs], which are poisoned: evenly, so a part is a set of its kind
    "Generate embeddings of pairs. Raises SettingsError, before anything is written, where the disk has no room."
    need, free = 4 * pairs * width, shutil.disk_usage(folder).free
    if need + 2**30 > free:
        raise SettingsError(
            f"{pairs:,} pairs of width {width} need {need / 1e9:.1f} GB and a spare GB in {folder}, where "
            f"{free / 1e9:.1f} GB are free: lower --pairs, or name a folder on another disk with --runs"
        )
    count = max(round(poison * pairs), 100) if poison else 0
    poisoned = np.random.default_rng([seed, 2]).permutation(pairs) < count
    geometry = geometry_of(width, seed)
    with ExitStack() as stack:
        files = [stack.enter_context(open(Path(folder)/f"{name}.npy", "wb")) for name in ("images", "texts")]
        for f in files:
            np.lib.format.write_array_header_1_0(f, dict(descr="<f2", fortran_order=False, shape=(pairs, width)))
        for first in range(0, pairs, chunk):
            made = pairs_of(geometry, poisoned[first:first + chunk], np.random.default_rng([seed, 3, first]))
            for f, x in zip(files, made):
                x.half().numpy().tofile(f)
    return poisoned


# The detecting process
#
# The detector runs in a process of its own, whose peak memory is then that of the detection: `VmHWM` of
# /proc/self/status, the highest resident set so far. (`ru_maxrss` would not do: on Linux a new program inherits the
# peak of the one that started it.) Pages of a memory-mapped file count in it as long as they are mapped, whether or not
# the memory is needed elsewhere; `cfbd` gives them back after every chunk.
#
# The process is asked for a hundredth of the rows, for a tenth and for all of them, in this order, so that each peak is
# that of the sizes up to it. Where the time goes is seen from outside: functions of `detect` get a clock around them.

STAGES = dict(
    cross_modality_consistency="consistency, mapping network included", fit_mixture="mixture",
    fine_stage="textual correlation, threshold, guard",
)


def clocked(module, names, seconds):
    "Let functions of a module add the time they take to `seconds`, by their names."
    def with_clock(name, function):
        @functools.wraps(function)
        def timed(*args, **kwargs):
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] = seconds.get(name, 0) + time.perf_counter() - started
        return timed
    for name in names:
        setattr(module, name, with_clock(name, getattr(module, name)))


def stored_pairs(folder):
    "The generated tables, memory-mapped."
    return [np.load(Path(folder)/f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("images", "texts")]


def detect_on_request(lines, answer):
    "The life of the detecting process: settings, then per detection a line with the number of pairs, from the first."
    settings, seconds = json.loads(next(lines)), {}
    folder = Path(settings["folder"])
    (images, texts), mapping = stored_pairs(folder), cfbd.load_mapping(folder/"mapping.safetensors")
    clocked(cfbd, STAGES, seconds)
    def detection(pairs):
        seconds.clear()
        before, started = time.process_time(), time.perf_counter()
        found = cfbd.detect(images[:pairs], texts[:pairs], mapping)
        total, processor = time.perf_counter() - started, time.process_time() - before
        told = dict(total=total, processor=processor, stages=dict(seconds), peak=peak_mebibytes())
        kept = dict(value=found.consistency.value, correlation=found.correlation, rows=found.split.poisoned,
                    flagged=found.flagged)
        for name, values in kept.items():
            np.save(folder/f"{name}.npy", values)
        return told
    with limit_threads(dict(threads=settings["threads"]), ("torch",)):
        answer(dict(peak=peak_mebibytes()))
        for line in lines:
            answer(detection(int(line)))


def detecting_threads():
    return min(2, cores())


def detections(folder, sizes):
    "Answers of the detecting process: before any pair, and for each number of pairs, with the cores that others used."
    settings = dict(folder=str(folder), threads=detecting_threads())
    process = Process("detection_scale", "detect_on_request", settings, "detecting")
    with closing(process):
        told = [process.answer()]
        for pairs in sizes:
            before, started = used_seconds(), time.monotonic()
            process.tell(pairs)
            found = process.answer()
            wall = time.monotonic() - started
            others = 0 if before is None else max(used_seconds() - before - found["processor"], 0) / wall
            told.append(dict(found, others=others))
    return told


# What must be there before: the tables, and a mapping network, which is trained on clean pairs of the same geometry. An
# owner trains it once and for all, so its time is not part of a detection.

def generated_mapping(width, hidden, pairs, seed=0):
    "A mapping network trained on clean pairs of the generated geometry."
    made = pairs_of(geometry_of(width, seed), np.zeros(pairs, bool), np.random.default_rng([seed, 4]))
    images, texts = (normalize(x, dim=-1) for x in made)
    recipe = Recipe(epochs=2, batch_size=128, learning_rate=1e-3, seed=seed)
    return cfbd.train_mapping(images, texts, np.arange(pairs), recipe, hidden)


def detection_inputs(folder, scale):
    "Write tables and mapping network; which pairs are poisoned, and rows with the seconds that took."
    started = time.perf_counter()
    poisoned = write_embeddings(folder, scale.pairs, scale.width)
    written = time.perf_counter()
    mapping = generated_mapping(scale.width, scale.hidden, min(scale.pairs // 5, 20_000))
    cfbd.save_mapping(mapping, Path(folder)/"mapping.safetensors")
    trained = time.perf_counter()
    made = f"{scale.pairs:,} pairs of width {scale.width} generated (not part of detection)"
    learnt = f"mapping network of {scale.hidden} hidden units trained (likewise)"
    return poisoned, [row(NAME, made, written - started, "s"), row(NAME, learnt, trained - written, "s")]


# The formula as it is printed
#
# A fast way is worth nothing unless it computes the same. Here is the plain reading of Eqs. 1 to 6, in float64 except
# for the network: one pair at a time, one cosine at a time, and the whole matrix of cosines of every caption with the q
# captions of D_p, n x q numbers, before its mean is taken. The detector keeps a score per pair, since the mean of
# cosines with q unit vectors is one scalar product with their mean.

def cosine(a, b):
    return a @ b / np.sqrt((a @ a) * (b @ b))


def naive_consistency(images: np.ndarray,  # [n, d]
                      texts: np.ndarray,   # [n, d]
                      mapping,             # a mapping network
                      ) -> np.ndarray:     # float64 [n]
    "Eqs. 1 to 4 pair by pair."
    found = []
    for image, text in zip(images.astype(np.float64), texts.astype(np.float64)):
        with torch.no_grad():
            generated = mapping(torch.from_numpy(image / np.sqrt(image @ image)).float()[None])[0].double().numpy()
        found.append(abs(max(cosine(image, generated), 0) - max(cosine(image, text), 0)))
    return np.array(found)


def naive_correlation(texts: np.ndarray,  # [n, d]
                      rows: np.ndarray,   # [q], of D_p
                      ) -> np.ndarray:    # float64 [n]; members of D_p are compared with themselves too
    "Eq. 6 cosine by cosine, all of them kept."
    texts = texts.astype(np.float64)
    cosines = np.empty((len(texts), len(rows)))
    for i, text in enumerate(texts):
        for j, other in enumerate(rows):
            cosines[i, j] = cosine(text, texts[other])
    return cosines.mean(1)


def compared(what, naive, swift, stored, pairs, scale):
    "Rows on one score: difference of the stored values to the naive ones, and the speed of both ways."
    with limit_threads(dict(threads=detecting_threads()), ("torch",)):
        speeds = in_turns(min(scale.turns, 3), *[pairs_per_second(f, pairs) for f in (swift, naive)])
    difference = np.abs(naive() - stored).max()
    return [row(NAME, f"{what}: largest difference to the naive formula", difference, "", "< 1e-05"),
            *ratio_rows(NAME, f"{what}: chunked / naive", *speeds, "")]


def naive_rows(folder, scale, rng):
    "The whole detection's scores against the naive formula on D_p and some other pairs, and the speed of both ways."
    def stored(file):
        return np.load(Path(folder)/f"{file}.npy", allow_pickle=False)
    suspects, mapping = stored("rows"), cfbd.load_mapping(Path(folder)/"mapping.safetensors")
    others = np.setdiff1d(rng.choice(scale.pairs, scale.naive_pairs, replace=False), suspects)
    some = np.concatenate([suspects, others])
    images, texts = (table[some] for table in stored_pairs(folder))
    rows, value, correlation = np.arange(len(suspects)), stored("value")[some], stored("correlation")[some]
    # D_p's are stored without their likeness to themselves
    correlation[rows] = (correlation[rows] * (len(rows) - 1) + 1) / len(rows)
    consistency = compared(
        "consistency", lambda: naive_consistency(images, texts, mapping),
        lambda: cfbd.cross_modality_consistency(images, texts, mapping).value, value, len(some), scale,
    )
    return consistency + compared(
        "correlation", lambda: naive_correlation(texts, rows), lambda: cfbd.textual_correlation(texts, rows),
        correlation, len(some), scale,
    )


# Rows

def growth(sizes, seconds):
    "Exponent a of seconds ~ pairs^a between two sizes."
    return float(np.log(seconds[1] / seconds[0]) / np.log(sizes[1] / sizes[0]))


def time_rows(sizes, told):
    "Seconds of the stages at full size, of all sizes, and how they grow."
    totals, largest = [t["total"] for t in told], told[-1]
    parts = {what: largest["stages"][function] for function, what in STAGES.items()}
    parts["coarse split"] = totals[-1] - sum(parts.values())
    return [
        *[row(NAME, f"{sizes[-1]:,} pairs: {what}", seconds, "s") for what, seconds in parts.items()],
        *[row(NAME, f"{n:,} pairs, start to end", seconds, "s", "< 120" if n >= FULL.pairs else "")
          for n, seconds in zip(sizes, totals)],
        row(NAME, "growth: exponent over the last factor of ten", growth(sizes[1:], totals[1:]), "", "< 1.1"),
        row(NAME, "growth: exponent over both", growth(sizes[::2], totals[::2])),
    ]


def memory_rows(sizes, told):
    "Peak memory before any pair and up to every size; nothing where the system does not tell."
    if not told[0]["peak"]:
        return []
    rows = [row(NAME, "peak memory before any pair", told[0]["peak"], "MiB")]
    for n, found in zip(sizes, told[1:]):
        rows.append(row(NAME, f"peak memory, {n:,} pairs", found["peak"], "MiB", "< 2048" if n == sizes[-1] else ""))
    return rows


def found_rows(folder, poisoned):
    "What was found of the poison."
    flagged = np.isin(np.arange(len(poisoned)), np.load(Path(folder)/"flagged.npy", allow_pickle=False))
    rates = detection_rates(flagged, poisoned)
    return [row(NAME, f"poison found, of {poisoned.sum():,} pairs", rates["tpr"], "share", ">= 0.99"),
            row(NAME, f"benign pairs flagged, of {(~poisoned).sum():,}", rates["fp"], "pairs")]


@benchmark
def detection_scale(scale: Scale) -> list:
    """Time, memory and growth of CFBD's detection over memory-mapped embeddings.

    Times are not judged on a single core or a busy machine.
    """
    sizes = [scale.pairs // 100, scale.pairs // 10, scale.pairs]
    with tempfile.TemporaryDirectory(dir=scale.folder) as folder:
        poisoned, rows = detection_inputs(folder, scale)
        told = detections(folder, sizes)
        busy, times = told[-1]["others"], time_rows(sizes, told[1:])
        if cores() < 2 or busy > 0.25:
            times = list(map(not_judged, times))
        return [*rows, *times, row(NAME, "kept busy by others", busy, "cores"), *memory_rows(sizes, told),
                *found_rows(folder, poisoned), *naive_rows(folder, scale, np.random.default_rng(0))]
