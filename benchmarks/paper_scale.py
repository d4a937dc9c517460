"""At the papers' size, RN50 and ViT-B/32 at 224 px: training beside a plain open_clip loop, images, memory, the card.

Three numbers say whether a GPU is used well:

- ours / bare: the same model, precision and pairs in a plain open_clip loop, in turns;
- share of the matrix peak: what the towers must multiply (counted by torch) times pairs per second, over the speed of
  one large matrix product measured on the same card;
- images decoded per core: how many cores it takes to keep up.

The bare loop has its images normalised and on the device beforehand, ours starts from bytes. On a CPU the same
functions run with a few pairs, so that every line is tested anywhere.
"""
import functools
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch

from measuring import benchmark, in_turns, pairs_per_second, ratio_rows, row, Scale
from mcl_repro.data.pairs import ArrayImages, Images, StoredImages
from mcl_repro.data.registry import open_data
from mcl_repro.model.clip import build_clip, embed_images, info_nce
from mcl_repro.model.devices import deterministic, half_precision, towers_in
from mcl_repro.model.training import contrastive_loss, read_batch, Recipe, rows_of, train, training_set
from mcl_repro.run.calibration import jpeg_picture
from training_speed import bare_batches


@dataclass(frozen=True)
class PaperScale:
    "How much is measured at paper scale."
    models: tuple = ("RN50", "ViT-B-32")  # architectures
    batch_sizes: tuple = (128, 1024)      # pairs per step
    pairs: int = 1280                     # in a turn of each side, or 8 steps if they are more
    turns: int = 3                        # of each side of a comparison
    matrix: int = 8192                    # side of the matrices of the peak
    images: int = 4096                    # embedded and decoded
    compiled: tuple = ("ViT-B-32",)       # architectures also measured with torch.compile, at the first batch size
    photo: tuple = (500, 375)             # width and height of the photographs that are decoded


ON_GPU = PaperScale()
ON_CPU = PaperScale(batch_sizes=(4,), pairs=8, turns=1, matrix=1024, images=64, compiled=())
SMALL = PaperScale(models=("smoke-RN",), batch_sizes=(8,), pairs=24, turns=2, matrix=64, images=32, compiled=(),
                   photo=(64, 48))


def paper_scale(scale: Scale) -> PaperScale:
    "What fits the device; little for a quick run."
    if scale.steps < 8:
        return SMALL
    return ON_GPU if torch.cuda.is_available() else ON_CPU


def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def wait():
    "Until the device has done what it was given."
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def on_device(model):
    return build_clip(model, device=device())


def speed_of(function, pairs):
    "A function that gives pairs per second, waiting for the device."
    def finished():
        function()
        wait()
    return pairs_per_second(finished, pairs)


def plain_loop(model,                    # open_clip model, trained in place
               batches: list,            # (float32 images [b, 3, s, s], int64 tokens [b, context_length]) on the device
               learning_rate: float,
               precision: str = "auto",  # see `model.devices`
               ) -> float:               # loss of the last step
    """The training loop that ours is compared with, as one writes it from open_clip's README.

    Autocast, AdamW, all 77 positions of the text tower, torch's usual memory order.
    """
    kind = next(model.parameters()).device.type
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    for images, tokens in batches:
        with towers_in(precision, kind):
            u, v = model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)
            loss = info_nce(u.float(), v.float(), model.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)
    return loss.item()


@functools.lru_cache(maxsize=2)
def pictures(count, size):
    return open_data(f"world:train:{count}").images.array(size=size)


def data_for(clip, batch_size, pairs, steps=8):
    """So many pairs of the embedded world at a model's size or a few steps' worth, and the recipe of a pass over them.

    At most 128 pairs are different.
    """
    count = max(pairs // batch_size, steps if pairs >= 1024 else 1) * batch_size
    few = open_data(f"world:train:{min(count, 128)}")
    data = training_set(clip, few.replace(images=ArrayImages(pictures(len(few), clip.image_size))))
    return rows_of(data, np.arange(count) % len(few)), Recipe(epochs=1, batch_size=batch_size, learning_rate=1e-4)


# What the card can do

def flops_per_pair(clip, batch, precision: str = "auto") -> float:
    "Floating-point operations of a training step per pair, forward and backward, on the positions that are computed."
    from torch.utils.flop_counter import FlopCounterMode
    clip.model.train()
    with FlopCounterMode(display=False) as counter:
        with towers_in(precision, clip.device.type):
            contrastive_loss(clip, batch).backward()
    clip.model.zero_grad(set_to_none=True)
    return counter.get_total_flops() / len(batch.tokens)


def matrix_peak(side: int, turns: int = 10) -> float:
    "Operations per second of a product of two square matrices in the towers' precision; the best of some turns."
    kind = half_precision("auto", device()) or torch.float32
    a, b = (torch.randn(side, side, device=device(), dtype=kind) for _ in range(2))
    speeds = [speed_of(lambda: a @ b, 1)() for _ in range(turns + 2)]
    return 2 * side**3 * max(speeds[2:])


# Training

def first_turns(sides: dict) -> dict:
    "Run each side once, so that what it needs is allocated; on a GPU the peak memory of each, in MiB."
    if not torch.cuda.is_available():
        for turn in sides.values():
            turn()
        return {}
    memory, base = {}, torch.cuda.memory_allocated()
    for side, turn in sides.items():
        torch.cuda.reset_peak_memory_stats()
        turn()
        wait()
        memory[side] = (torch.cuda.max_memory_allocated() - base) / 2**20
    return memory


def training_rows(name, clip, bare, batch_size, scale, peak):
    "Rows of one architecture, with a model for each side, and one batch size."
    data, recipe = data_for(clip, batch_size, scale.pairs)
    batches = [(x, t.to(device())) for x, t in bare_batches(clip, data, recipe)]
    used = flops_per_pair(clip, read_batch(data, torch.arange(min(batch_size, 64)), device()))
    def our_turn():
        train(clip, data, recipe)
    def bare_turn():
        plain_loop(bare.model, batches, recipe.learning_rate)
    sides = dict(ours=our_turn, bare=bare_turn)
    memory = first_turns(sides)
    ours, theirs = in_turns(scale.turns, *[speed_of(turn, len(data)) for turn in sides.values()])
    what = f"{clip.name}, batch {batch_size}"
    target = ">= 1.2" if torch.cuda.is_available() and batch_size == 128 else ""
    yield from [
        row(name, f"{what}: ours", np.median(ours), "pairs/s"),
        row(name, f"{what}: bare open_clip loop", np.median(theirs), "pairs/s"),
        *ratio_rows(name, f"{what}: ours / bare", ours, theirs, target),
        row(name, f"{what}: operations", used / 1e9, "GFLOP per pair"),
        row(name, f"{what}: share of the matrix peak", np.median(ours) * used / peak, "share"),
        *[row(name, f"{what}: peak memory, {side}", mib, "MiB") for side, mib in memory.items()],
    ]


@benchmark
def paper_training(scale: Scale):
    "Pairs per second at 224 px against a bare open_clip loop in the same precision."
    paper, name = paper_scale(scale), "paper_training"
    peak = matrix_peak(paper.matrix)
    yield row(name, f"matrix product of side {paper.matrix}", peak / 1e12, "TFLOP/s")
    for model in paper.models:
        clip, bare = on_device(model), on_device(model)
        for batch_size in paper.batch_sizes:
            yield from training_rows(name, clip, bare, batch_size, paper, peak)


# What the switches cost: kernels that repeat their bits, the compiler, float32 with and without TF32, batches in parts

def variant_speed(clip, data, recipe, turns, context):
    "Pairs per second of our loop with a recipe, after a first turn; seconds of the first turn."
    def turn():
        train(clip, data, recipe)
    with context:
        started = time.perf_counter()
        turn()
        wait()
        first = time.perf_counter() - started
        return np.median([speed_of(turn, len(data))() for _ in range(turns)]), first


def variants_of(model, size, paper):
    "Name -> context and changes of the recipe."
    alone = nullcontext()
    variants = {
        "deterministic": (deterministic(), {}),
        "usual kernels": (deterministic(False), {}),
        "float32": (alone, dict(precision="fp32")),
    }
    if torch.cuda.is_available():
        variants["TF32"] = alone, dict(precision="tf32")
    in_parts = dict(micro_batch=size // 4, frozen_batchnorm=True)
    variants[f"in parts of {size // 4}, BatchNorm frozen"] = alone, in_parts
    if model in paper.compiled:
        variants["compiled"] = alone, dict(compiled=True)
    return variants


@benchmark
def paper_switches(scale: Scale):
    "Pairs per second of our loop with other precisions, deterministic kernels, batches in parts, and compiled."
    paper, name = paper_scale(scale), "paper_switches"
    size = paper.batch_sizes[0]
    for model in paper.models:
        clip = on_device(model)
        data, recipe = data_for(clip, size, paper.pairs)
        for what, (context, changes) in variants_of(model, size, paper).items():
            speed, first = variant_speed(clip, data, replace(recipe, **changes), paper.turns, context)
            yield row(name, f"{model}, batch {size}: {what}", speed, "pairs/s")
            if what == "compiled":
                yield row(name, f"{model}, batch {size}: first turn with the compiler", first, "s")


# Embedding and decoding: pairs that do not fit into memory are decoded while the device computes

class Photographs(StoredImages):
    "One JPEG of the size of a photograph, again and again."
    def __init__(self, count, size):
        self.bytes, self.count = jpeg_picture(size), count

    def __len__(self):
        return self.count

    def read(self, row):
        return self.bytes

    def where(self, row):
        return f"photograph {row}"

    def member(self, row):
        return str(row)


def from_photographs(clip, batch_size, scale):
    "Pairs per second of our loop with pictures decoded by loader processes, and with the same pictures resident."
    data, recipe = data_for(clip, batch_size, scale.pairs)
    lazy = replace(data, images=Photographs(len(data), scale.photo), image_rows=torch.arange(len(data)))
    def speed(some):
        turn = speed_of(lambda: train(clip, some, recipe), len(some))
        return np.median([turn() for _ in range(scale.turns)])
    return speed(lazy), speed(data)


def embedding_rows(name, clip, images):
    "Images per second of a model from the device's memory."
    shape = images, 3, clip.image_size, clip.image_size
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=device())
    for precision, what in (("fp32", "float32"), ("auto", "16 bits on a GPU")):
        embed_images(clip, pixels[:500], precision=precision)
        speed = speed_of(lambda: embed_images(clip, pixels, precision=precision), len(pixels))()
        yield row(name, f"{clip.name}: embedded, {what}", speed, "images/s")


@benchmark
def paper_images(scale: Scale):
    "Images per second: embedded from the device's memory, decoded from JPEG and scaled, per core, and for training."
    paper, name = paper_scale(scale), "paper_images"
    for model in reversed(paper.models):   # the first comes last and is used below
        clip = on_device(model)
        yield from embedding_rows(name, clip, paper.images)
    what = f"{clip.name}, batch {paper.batch_sizes[0]}"
    lazy, resident = from_photographs(clip, paper.batch_sizes[0], paper)
    yield row(name, f"{what}: trained from JPEG", lazy, "pairs/s")
    yield row(name, f"{what}: from JPEG / resident", lazy / resident, "ratio")
    photographs, (width, height) = Photographs(paper.images, paper.photo), paper.photo
    together = speed_of(lambda: photographs.array(size=224), len(photographs))()
    decoded = f"decoded and scaled to 224 px from JPEG of {width} x {height}, {Images.workers} threads"
    yield row(name, decoded, together, "images/s")
    yield row(name, "the same per thread", together / Images.workers, "images/s")
