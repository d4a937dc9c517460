"""How good is a scan? `scan` where the truth is known: attacks, poison counts, several targets, captions of several
kinds, what the web does by itself, and clean sets for false alarms.

The tool has two methods: contrast, which is ours, and cfbd, CFBD's detector as `scan` runs it on a set of which nothing
is trusted: the mapping network learns from the better-fitting half of the set itself. This study runs both on the same
sets of the embedded world and writes one row per set and method. The table that the tool quotes is made again by

    .venv/bin/python benchmarks/scan_study.py --profile mini --out mcl_repro/tools/scan_study.csv

What it is not: a study on photographs. The model is mini-RN, trained on 60,000 pairs of the world, every set has 6,000
pairs, and every set is drawn once, so a row has no interval. The settings of contrast were found on sets of this world,
which flatters it.
"""
import argparse
import sys

import numpy as np
import pandas as pd

from mcl_repro.core.errors import UserError
from mcl_repro.data.registry import resolve
from mcl_repro.lab.lab import Lab
from mcl_repro.measures.metrics import detection_rates, placements
from mcl_repro.papers.plan import Experiments
from mcl_repro.papers.scan_sets import (
    pair_embeddings, planted, planted_duplicates, planted_embeddings, planted_mistakes, planted_poison,
    robustness_points, robustness_pool,
)
from mcl_repro.papers.stages import arrays
from mcl_repro.tools.scanning import (
    better_half, Embedded, learn_mapping, METHODS, pair_fit, rank_by_cfbd, rank_by_contrast, sizes_for,
)

# The sets
#
# attack: the attacks of CFBD's tables, as profile and seed 0 make them for the papers' notebooks: 144 poisoned pairs,
# 125 under LC, 96 under mmPoison.
# poison, targets, captions, duplicates, wrong: BadNets' patch, put together from a pool of embeddings; where nothing
# else is said 144 pairs, one target, one of the 80 templates for each caption. natural: captions that really name the
# target, as BadCLIP's; one: the same template for all. duplicates: clean pictures under one boilerplate caption.
# wrong: a share of the clean pairs passes its captions on. The last two also without any poison.
# clean: other draws of the world, some of web style (2% of whose captions are wrong), some curated.

AXES = dict(
    poison=[0.003, 0.006, 0.012, 0.024, 0.08], targets=[1, 2, 4, 8], captions=["one", "templates", "natural"],
    duplicates=[0, 50, 200], wrong=[0.0, 0.01, 0.05],
)
TARGETS = ("banana", "lemon", "carrot", "cactus", "guitar", "teapot", "bicycle", "whale")
BOILERPLATE = "a birthday cake with candles in the form of a number icon"
CLEAN = tuple(f"world:{style}:6000:{seed}" for style in ("train", "curated") for seed in (1, 2, 3, 4, 5))


def study_nodes(lab: Lab,
                attacks: list = (),    # printed names; none means all of CFBD's
                axes: dict = AXES,
                clean: tuple = CLEAN,  # sources
                ) -> dict:             # nodes: `base`, `attacks` by name, `pool` (None without axes), `clean` by source
    """Everything that has to be embedded; the clean CLIP and the poisoned sets are those of the papers' notebooks.

    A clean set is embedded once, and a poisoned one costs its poisoned rows only.
    """
    settings = lab.profile.cfbd
    e = Experiments(lab, ["cfbd.table1"], attacks=dict(settings.attacks), attack_names=list(attacks),
                    counts=settings.counts)
    pairs, first = lab.role("finetune"), next(iter(e.attacks.values()))
    pool = None
    if axes:
        pool = lab.node(robustness_pool, clip=e.clean, pairs=pairs, attack=first, targets=list(TARGETS),
                        boilerplate=BOILERPLATE, count=500)
    return dict(
        base=lab.node(pair_embeddings, clip=e.clean, pairs=pairs),
        clean={s: lab.node(pair_embeddings, clip=e.clean, pairs=resolve(s)) for s in clean},
        attacks={a: lab.node(planted_embeddings, clip=e.clean, poisoned=e.chain(a).poisoned) for a in e.attacks},
        pool=pool,
    )


def plant(clean: tuple,               # images and texts [n, d]
          pool: dict,                 # arrays of `robustness_pool`
          point: dict,                # of `robustness_points`
          rng: np.random.Generator,
          ) -> tuple:                 # images, texts, rows that are poisoned
    "One set put together from a pool, as `scan_sets.scan_point` does."
    n = len(clean[0])
    bad = planted_poison(pool, round(point["poison"] * n), point["targets"], point["captions"], rng)
    odd = planted_duplicates(clean[0], pool["boilerplate"][0], point["duplicates"], bad[0], rng)
    mixed = planted_mistakes(*clean, round(point["wrong"] * n), np.concatenate([bad[0], odd[0]]), rng)
    rows, *new = (np.concatenate(part) for part in zip(bad, odd, mixed))
    def laid_over(table, x):
        table = table.copy()
        table[rows] = x
        return table
    return *(laid_over(c, x) for c, x in zip(clean, new)), bad[0]


def study_sets(lab: Lab,
               nodes: dict,           # of `study_nodes`
               axes: dict = AXES,
               share: float = 0.024,  # of poison where it is not the experiment
               ):                     # yields experiment, level, images, texts, poisoned rows
    "All sets, one after the other."
    nothing = np.zeros(0, int)
    base = lab.run(nodes["base"])
    clean = planted(base, None)
    for name, node in nodes["attacks"].items():
        changed = lab.run(node)
        yield "attack", name, *planted(base, changed), np.load(changed.path/"rows.npy", allow_pickle=False)
    pool = arrays(lab.run(nodes["pool"]), "pool") if nodes["pool"] else None
    whole = tuple(np.array(c) for c in clean)
    for i, point in enumerate(robustness_points(share, axes) if pool else ()):
        yield point["experiment"], point["level"], *plant(whole, pool, point, np.random.default_rng([0, i]))
    yield "clean", lab.profile.roles["finetune"], *clean, nothing
    for source, node in nodes["clean"].items():
        yield "clean", source, *planted(lab.run(node), None), nothing


# One set, one method: what `scan` does after embedding

def number(x):
    "A finite number, or None."
    return float(x) if x is not None and np.isfinite(x) else None


def scan_row(images, texts,         # [n, d] embeddings; anything that slices
             poisoned: np.ndarray,  # rows that are poisoned; may be none
             method: str,           # of METHODS
             seed: int = 0,
             ) -> dict:             # precision, recall, false_positive_rate, attacked, AUROC; None where undefined
    "How good a method of `scan` is on a set, nothing of which is trusted."
    rows = np.arange(len(images))
    embedded = Embedded(images, texts, rows, rows, None, 0)
    fit, sizes, flags = pair_fit(embedded), sizes_for(len(images), method), np.isin(rows, poisoned)
    if method == "contrast":
        score, flagged, _, cores, _ = rank_by_contrast(embedded, fit, sizes, {}, seed, None)
    else:
        mapping = learn_mapping(embedded, better_half(fit, seed=seed), seed)
        score, flagged, _, cores, _ = rank_by_cfbd(embedded, mapping, sizes, {}, seed, None)
    rates = detection_rates(flagged, flags)
    return dict(
        pairs=len(flags), poisoned=int(flags.sum()), flagged=int(flagged.sum()), precision=number(rates["precision"]),
        recall=number(rates["tpr"]), false_positive_rate=number(rates["fpr"]), attacked=any(c.counts for c in cores),
        AUROC=float(placements(score, flags).mean()) if flags.any() else None,
    )


def scan_study(lab: Lab,
               attacks: list = (),        # as in `study_nodes`
               axes: dict = AXES,
               clean: tuple = CLEAN,
               methods: tuple = METHODS,
               say=None,                  # called with each row
               ) -> pd.DataFrame:         # experiment, level, method, and what `scan_row` gives
    "Every method on every set."
    nodes, rows = study_nodes(lab, attacks, axes, clean), []
    several = [*nodes["clean"].values(), *nodes["attacks"].values()]
    lab.run([nodes["base"], *several, *filter(None, [nodes["pool"]])])
    for experiment, level, images, texts, poisoned in study_sets(lab, nodes, axes):
        for method in methods:
            found = scan_row(images, texts, poisoned, method)
            rows.append(dict(experiment=experiment, level=str(level), method=method, **found))
            if say:
                say(rows[-1])
    return pd.DataFrame(rows)


def main(argv: list = None) -> int:  # exit code
    "The command line; expected errors are one line on stderr."
    parser = argparse.ArgumentParser(prog="python benchmarks/scan_study.py",
                                     description="How good the methods of scan are where the truth is known.")
    parser.add_argument("--profile", default="mini", help="how big (default: mini)")
    parser.add_argument("--runs", default="runs", help="whose store is used (default: runs)")
    parser.add_argument("--out", default="scan_study.csv", help="the table (default: scan_study.csv)")
    args = parser.parse_args(argv)
    def say(r):
        print(r["experiment"], r["level"], r["method"], r["recall"], r["attacked"], file=sys.stderr)
    try:
        table = scan_study(Lab(args.profile, "cpu", args.runs), say=say)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table.round(4).to_csv(args.out, index=False, lineterminator="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
