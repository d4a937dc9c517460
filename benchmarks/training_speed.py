"""Training: our loop against a bare one, two processes against two threads, where the time of a step goes."""
import json
import time
from contextlib import ExitStack
from dataclasses import asdict, replace

import numpy as np
import torch

from measuring import (
    benchmark, cores, in_turns, not_judged, pairs_per_second, prepared, Process, ratio_rows, row, Scale, used_seconds,
)
from mcl_repro.lab.attempt import limit_threads
from mcl_repro.model.clip import build_clip, info_nce, to_pixels
from mcl_repro.model.training import Callback, contrastive_loss, epoch_batches, train


# Against a bare loop
#
# What do the extras of `train` cost (schedule, callbacks, history, clamped scale, resumability)? The other side is the
# loop that anybody would write first: the same open_clip model and loss, AdamW as it comes, images normalised to
# float32 in advance, so that its batches cost nothing. Ours normalises uint8 images in every step, yet should be no
# slower, because it also saves: padding is not computed on, images lie channels last, the update is fused.

def bare_loop(model,                 # open_clip model, trained in place
              batches: list,         # (float32 images [b, 3, s, s], int64 tokens [b, context_length])
              learning_rate: float,
              ) -> float:            # loss of the last step
    "The plain training loop that ours is compared with."
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    for images, tokens in batches:
        image_embeddings = model.encode_image(images, normalize=True)
        text_embeddings = model.encode_text(tokens, normalize=True)
        loss = info_nce(image_embeddings, text_embeddings, model.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def bare_batches(clip, data, recipe) -> list:
    "The batches of our first epoch as a bare loop takes them: normalised, in PyTorch's usual memory order."
    return [(to_pixels(clip, data.images[data.image_rows[rows]]).contiguous(), data.tokens[rows])
            for rows in epoch_batches(len(data), recipe, 0)]


@benchmark
def training_speed(scale: Scale) -> list:
    "Pairs per second of our loop and of a bare one, in one process on one thread."
    clip, data, recipe = prepared(scale)
    bare, batches = build_clip(scale.model), bare_batches(clip, data, recipe)
    def our_turn():
        train(clip, data, recipe)
    def bare_turn():
        bare_loop(bare.model, batches, recipe.learning_rate)
    with limit_threads(dict(threads=1), ("torch",)):
        our_turn()     # first calls allocate
        bare_turn()
        ours, theirs = in_turns(scale.turns, *[pairs_per_second(f, len(data)) for f in (our_turn, bare_turn)])
    name = "training_speed"
    return [
        row(name, "our loop, one thread", np.median(ours), "pairs/s"),
        row(name, "bare loop, one thread", np.median(theirs), "pairs/s"),
        *ratio_rows(name, "our loop / bare loop", ours, theirs, ">= 1"),
    ]


# Two processes against two threads
#
# On a CPU a small model does not fill two threads: much of a step is small operations that one thread does while the
# other waits. Two processes of one thread each, at work on two trainings, get more out of two cores. That is why
# batches run one single-thread process per core.
#
# One thing is not shared alike here: two threads wait for each other in every operation, so a neighbour who takes one
# core holds up both, while of two processes only one is slowed. On a busy machine this ratio flatters us. So it is
# stated how many cores others kept busy (what the machine used less what the workers used), and above a quarter of a
# core the target is not judged.
#
# The processes stay and are asked in turns. A turn lasts a fixed time; each process notes when every step ended. Pairs
# are counted in the window in which all processes of the turn were at work; steps that overlap its ends count in part.

def overlap_speed(stamps: list,      # per process: times at which steps ended, seconds on one clock
                  batch_size: int,   # pairs per step
                  ) -> float:        # pairs per second of all together
    "Speed of processes in the window in which all of them worked. Raises ValueError where there is no such window."
    first, last = max(s[0] for s in stamps), min(s[-1] for s in stamps)
    if not last > first:
        raise ValueError("the processes did not work at the same time: measure for longer")
    steps = 0
    for ends in map(np.asarray, stamps):
        began, ended = np.interp([first, last], ends, range(len(ends)))
        steps += ended - began
    return batch_size * steps / (last - first)


class Stamps(Callback):
    "Note when steps end; stop when the time is over."
    def __init__(self, seconds):
        self.seconds, self.times, self.end = seconds, [], None

    def before_training(self, state):
        self.end = time.monotonic() + self.seconds

    def after_step(self, state, loss):
        self.times.append(time.monotonic())
        state.stop = self.times[-1] > self.end and len(self.times) > 2


def train_on_request(lines, answer):
    "The life of a training process: settings, then one line of seconds per turn."
    settings = json.loads(next(lines))
    torch.set_num_threads(settings["threads"])
    clip, data, recipe = prepared(Scale(**settings["scale"]))
    def turn(seconds):
        stamps = Stamps(seconds)
        before = time.process_time()
        train(clip, data, replace(recipe, epochs=10**6), callbacks=[stamps])
        return dict(times=stamps.times, processor=time.process_time() - before)
    turn(0)
    answer("ready")
    for line in lines:
        answer(turn(float(line)))


class TrainingProcess(Process):
    "A process that trains on request."
    def __init__(self, scale, threads):
        settings = dict(threads=threads, scale=asdict(scale))
        super().__init__("training_speed", "train_on_request", settings, "training")


def turn_of(workers, scale, others):
    "Let processes train at the same time; their joint speed. The cores that others used meanwhile join `others`."
    before, started = used_seconds(), time.monotonic()
    for w in workers:
        w.tell(scale.seconds)
    answers = [w.answer() for w in workers]
    if before is not None:
        own, wall = sum(a["processor"] for a in answers), time.monotonic() - started
        others.append(max(used_seconds() - before - own, 0) / wall)
    return overlap_speed([a["times"] for a in answers], scale.batch_size)


@benchmark
def training_processes(scale: Scale) -> list:
    """Pairs per second of two processes of one thread, and of one process of two threads.

    Not judged on a single core or a busy machine.
    """
    others = []
    with ExitStack() as stack:
        workers = [TrainingProcess(scale, threads) for threads in (1, 1, 2)]
        for w in workers:
            stack.callback(w.close)
        for w in workers:
            w.answer()
        two, one = workers[:2], workers[2:]
        pair, alone = in_turns(scale.turns, lambda: turn_of(two, scale, others), lambda: turn_of(one, scale, others))
    name, busy = "training_processes", np.median(others or [0])
    rows = [
        row(name, "two processes of one thread, together", np.median(pair), "pairs/s"),
        row(name, "one process of two threads", np.median(alone), "pairs/s"),
        *ratio_rows(name, "two processes / one process", pair, alone, ">= 1.35"),
        row(name, "kept busy by others", busy, "cores"),
    ]
    return list(map(not_judged, rows)) if cores() < 2 or busy > 0.25 else rows


# Where the time of a step goes
#
# Without touching the loop: the loss function is given with a clock around it, the optimiser tells before and after its
# update through PyTorch's own hooks, and a callback marks the end of a step. Between these marks lie
#   end of a step .. start of the loss     data (picking and copying the batch, setting the mode)
#   start of the loss .. its end           forward (normalising the images included)
#   end of the loss .. before the update   backward
#   before the update .. end of the step   optimiser
# and what remains of the wall time (building the optimiser, checking losses at the end) is the rest. Clocks of a CPU
# only: on a GPU the calls return before the work is done.

PARTS = ("data", "forward", "backward", "optimiser")


class Clock(Callback):
    "Adds up the seconds of the four parts of a step."
    def __init__(self):
        self.seconds, self.last = dict.fromkeys(PARTS, 0.0), None

    def lap(self, part):
        now = time.perf_counter()
        self.seconds[part] += now - self.last
        self.last = now

    def before_training(self, state):
        state.optimizer.register_step_pre_hook(lambda *_: self.lap("backward"))
        self.last = time.perf_counter()

    def loss(self, clip, batch):
        self.lap("data")
        value = contrastive_loss(clip, batch)
        self.lap("forward")
        return value

    def after_step(self, state, loss):
        self.lap("optimiser")


@benchmark
def time_shares(scale: Scale) -> list:
    "Shares of the wall time of our loop, one thread."
    clip, data, recipe = prepared(scale)
    clock = Clock()
    with limit_threads(dict(threads=1), ("torch",)):
        train(clip, data, recipe)
        started = time.perf_counter()
        for _ in range(scale.turns):
            train(clip, data, recipe, loss=clock.loss, callbacks=[clock])
    wall = time.perf_counter() - started
    shares = clock.seconds | {"rest": wall - sum(clock.seconds.values())}
    return [row("time_shares", part, seconds / wall, "share of wall time") for part, seconds in shares.items()]
