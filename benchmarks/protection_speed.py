"""Protecting pairs with MEM: seconds of a round by its parts, the search for triggers against plain loops, memory.

How many rounds there are depends on the data and on the stopping rule, so the unit is one round: an epoch of the
surrogate's training, the steps of the noise (PGD), and the search for triggers, in seconds per 1,000 pairs.

What the search is compared with is the loop that the text of the paper suggests (section 3.3): at each of the L places
take one of the k candidates after the other, put it into all captions of the batch, embed pictures and captions,
compute the loss, keep the best. That is 1 + L k times everything. Ours embeds the pictures once and sends the captions
of all candidates of a place through the text tower together. Candidates come from the same gradient on both sides and
count as part of both. A single ratio would hide where it comes from, so three loops are measured:

  the loop's captions                            the loop's pictures        what is left for ours to gain
  `encode_text` of open_clip                     anew for each candidate    everything
  our text tower, which leaves padding out       anew for each candidate    pictures once, candidates together
  our text tower                                 once                       candidates together

The first is what somebody would write, and the one with a target. The last shows what candidates gain by going
together. On one thread of a CPU that is little: there a tower is limited by its arithmetic.
"""
import functools
import json
import tempfile
import threading
from contextlib import closing, suppress
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from measuring import (
    benchmark, in_turns, pairs_per_second, peak_mebibytes, Process, ratio_rows, row, Scale,
)
from mcl_repro.attacks.protection import with_triggers
from mcl_repro.data.registry import open_data
from mcl_repro.lab.attempt import limit_threads
from mcl_repro.model import training
from mcl_repro.model.clip import build_clip, embed_images, encode_text, info_nce
from mcl_repro.model.training import epoch_batches, Recipe, train, training_set
from mcl_repro.papers import mem

NAME = "protection_speed"


def loop_triggers(clip,                    # the surrogate, in evaluation mode
                  material: mem.Material,  # numbers of the search, allowed tokens
                  images: torch.Tensor,    # uint8 [b, 3, s, s], with their noise
                  tokens: torch.Tensor,    # int64 [b, t], clean captions
                  triggers: torch.Tensor,  # int64 [b, L], now
                  encode=None,             # function tokens -> text features; default: open_clip's
                  once: bool = False,      # embed the pictures once and not for each candidate
                  ) -> tuple:              # triggers int64 [b, L], and their loss
    """Better triggers by a plain loop over candidates that computes everything anew.

    Chooses like `mem.batch_triggers` with a beam of 1. Source: MEM 3.3.
    """
    search, known = material.search, embed_images(clip, images)
    @torch.no_grad()
    def loss(triggers):
        u = known if once else embed_images(clip, images)
        v = (encode or clip.model.encode_text)(with_triggers(tokens, triggers))
        return float(info_nce(u, torch.nn.functional.normalize(v, dim=-1), clip.model.logit_scale.exp()))
    gradient = mem.trigger_gradient(clip, with_triggers(tokens, triggers), known, search.length)
    candidates = mem.hotflip(gradient, clip.model.token_embedding.weight.detach(), material.allowed, search.candidates)
    best = loss(triggers)
    for place in range(search.length):
        before = triggers
        for candidate in candidates[:, place].T:
            other = before.clone()
            other[:, place] = candidate
            value = loss(other)
            if value < best:
                triggers, best = other, value
    return triggers, best


# Time

def material_of(clip, pairs, search):
    "Pairs of the embedded world for a search, five captions a picture, with the start of their triggers."
    found = open_data(f"world:retrieval_flickr8k_train:{-(-pairs // 5)}")
    material = mem.Material(found, training_set(clip, found), search, mem.allowed_tokens(clip.tokenizer, search))
    return material, torch.from_numpy(mem.first_triggers(clip.tokenizer, len(found), search)).long()


class Protecting:
    "The parts of a round, each as a function: a surrogate after an epoch, and a batch with its first noise."
    def __init__(self, scale):
        self.clip = build_clip(scale.surrogate)
        self.recipe = Recipe(epochs=1, batch_size=scale.batch_size, learning_rate=1e-3)
        self.material, triggers = material_of(self.clip, scale.batch_size * scale.steps, mem.Search())
        clean, self.rows = self.material.clean, torch.arange(scale.batch_size)
        self.data = replace(clean, tokens=with_triggers(clean.tokens, triggers))
        self.images = clean.images[clean.image_rows[self.rows]]
        self.tokens = clean.tokens[self.rows]
        self.triggers = triggers[self.rows]
        self.before = torch.zeros(self.images.shape, dtype=torch.int8)
        self.surrogate()
        self.before = self.noise()
        self.noisy = (self.images.short() + self.before).clamp(0, 255).to(torch.uint8)

    def surrogate(self):
        train(self.clip, self.data, self.recipe)
        self.clip.model.eval()

    def noise(self):
        return mem.update_noise(self.clip, self.images, self.before, self.tokens, self.triggers, self.material.search)

    def text(self):
        return mem.batch_triggers(self.clip, self.material, self.images, self.before, self.tokens, self.triggers,
                                  self.rows)

    def loop(self, ours=False, once=False):
        encode = functools.partial(encode_text, self.clip.model) if ours else None
        return loop_triggers(self.clip, self.material, self.noisy, self.tokens, self.triggers, encode, once)


def protection_times(scale):
    "Rows on the seconds of a round's parts, and on the search for triggers against the loops."
    parts, search = Protecting(scale), mem.Search()
    different = (parts.text()[0] != parts.loop()[0]).sum()
    trained = len(epoch_batches(len(parts.data), parts.recipe, 0)) * scale.batch_size
    of_a_batch = [parts.noise, parts.text, parts.loop, functools.partial(parts.loop, ours=True),
                  functools.partial(parts.loop, ours=True, once=True)]
    measures = [pairs_per_second(parts.surrogate, trained),
                *[pairs_per_second(part, scale.batch_size) for part in of_a_batch]]
    speeds = in_turns(min(scale.turns, 5), *measures)
    ours, plain, unpadded, embedded_once = speeds[2:]
    seconds = [1000 / np.median(s) for s in speeds]
    whats = ["surrogate, one epoch", f"noise, {search.noise_steps} steps",
             f"text search, {search.length} places, {search.candidates} candidates"]
    unit = "s per 1,000 pairs"
    return [
        *[row(NAME, what, s, unit) for what, s in zip(whats, seconds)],
        row(NAME, "one round altogether", sum(seconds[:3]), unit),
        row(NAME, "text search by the plain loop", seconds[3], unit),
        *ratio_rows(NAME, "text search: ours / plain loop", ours, plain, ">= 3"),
        *ratio_rows(NAME, "text search: ours / loop without padding", ours, unpadded, ""),
        *ratio_rows(NAME, "text search: ours / loop without padding, pictures embedded once", ours, embedded_once, ""),
        row(NAME, "tokens that the plain loop chose otherwise", different, "tokens", "= 0"),
    ]


# Memory
#
# Noise is as large as the pictures, and one picture of COCO has five captions with a noise each: at 224 px the noise of
# COCO takes some 90 GB. It lies in a mapped file, and pictures are read when their batch is due. So the memory must not
# grow with the number of pairs, but for tokens, triggers and captions, about two kilobytes a pair.
#
# A round is run in a fresh process, for a tenth of the pairs and, in another one, for all of them, on a machine that is
# told to have no free memory, so that nothing is kept that need not be. The triggers have one place and the noise one
# step: more of them would take longer, but no more memory. What counts is anonymous memory, which has no file behind
# it: pages of a mapped file can be dropped at any time, though the system counts them as resident. There is no highest
# value of it to be read afterwards, so it is looked at every few milliseconds.

def anonymous_mebibytes():
    "Resident memory of this process that is no page of a file, now; None where the system does not tell."
    with suppress(OSError, StopIteration):
        line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("RssAnon"))
        return int(line.split()[1]) / 1024
    return None


class Watch(threading.Thread):
    "Looks at the anonymous memory every few milliseconds and keeps the highest, `peak`."
    def __init__(self, seconds=0.005):
        super().__init__(daemon=True)
        self.seconds, self.over, self.peak = seconds, threading.Event(), anonymous_mebibytes()

    def run(self):
        while self.peak is not None and not self.over.wait(self.seconds):
            self.peak = max(self.peak, anonymous_mebibytes())

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.join()


def lazy_round(scale, clip, pairs, folder):
    "One round of MEM over so many pairs, with noise in mapped files and pictures read when they are due."
    material, _ = material_of(clip, pairs, mem.Search(noise_steps=1, length=1))
    recipe = Recipe(epochs=1, batch_size=scale.batch_size, learning_rate=1e-3)
    rounds = mem.Rounds(clip, material, Path(folder), recipe, scale.steps, stop_below=0.0)
    train(clip, rounds.data, recipe, callbacks=[rounds])


def protect_on_request(lines, answer):
    "The life of a protecting process: settings, then per round a line with the number of pairs; it answers with peaks."
    settings = json.loads(next(lines))
    scale = Scale(**settings["scale"])
    one_thread = limit_threads(dict(threads=1), ("torch",))
    of_training, of_mem = (patch.object(module, "free_memory", lambda device: 0) for module in (training, mem))
    with one_thread, of_training, of_mem, Watch() as watch:
        clip = build_clip(scale.surrogate)
        def peaks():
            return dict(anonymous=watch.peak, resident=peak_mebibytes())
        answer(peaks())
        for line in lines:
            lazy_round(scale, clip, int(line), settings["folder"])
            answer(peaks())


def protecting_peaks(scale, pairs):
    "Peaks of a fresh process before any pair and after a round."
    with tempfile.TemporaryDirectory(dir=scale.folder) as folder:
        settings = dict(folder=str(folder), scale=asdict(scale))
        process = Process("protection_speed", "protect_on_request", settings, "protecting")
        with closing(process):
            before = process.answer()
            process.tell(pairs)
            return before, process.answer()


def protection_memory(scale):
    "Rows on the memory of a round for a tenth of the pairs and for all; nothing where the system does not tell."
    sizes = (scale.protected // 10, scale.protected)
    (before, few), (_, many) = [protecting_peaks(scale, n) for n in sizes]
    if before["anonymous"] is None:
        return []
    told = dict(zip(sizes, (few, many)))
    growth = 2**20 * (many["anonymous"] - few["anonymous"]) / (sizes[1] - sizes[0])
    ratio = many["anonymous"] / few["anonymous"]
    side = build_clip(scale.surrogate).image_size
    return [
        row(NAME, "anonymous memory before any pair", before["anonymous"], "MiB"),
        *[row(NAME, f"peak anonymous memory, {n:,} pairs", t["anonymous"], "MiB") for n, t in told.items()],
        row(NAME, f"peak anonymous memory, {sizes[1]:,} / {sizes[0]:,} pairs", ratio, "ratio", "< 1.1"),
        row(NAME, "growth of the peak per pair", growth, "bytes"),
        row(NAME, "noise of a pair, old and new, and its picture: not kept", 3 * 3 * side**2, "bytes"),
        *[row(NAME, f"peak resident memory, mapped files included, {n:,} pairs", t["resident"], "MiB")
          for n, t in told.items()],
    ]


@benchmark
def protection_speed(scale: Scale) -> list:
    "A round of MEM by its parts, one thread; the search for triggers against plain loops; memory with the pairs."
    with limit_threads(dict(threads=1), ("torch",)):
        rows = protection_times(scale)
    return rows + protection_memory(scale)
