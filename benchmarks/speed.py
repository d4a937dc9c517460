"""`make bench`: time the training loop, the store, the imports, the drawing, the search for poison, the protection of
pairs, and training at the papers' size; tell where the time of the latest run went; print a table and write it to
runs/bench/bench.csv.

The exit code is 0 whether or not targets are met: on a busy machine a missed target asks for a second look and is no
error. A benchmark that fails does not take the others with it; then the exit code is 1. A later benchmark joins by
`@benchmark` and an import here.
"""
import argparse
import sys
from dataclasses import replace
from pathlib import Path

from measuring import BENCHMARKS, COLUMNS, FULL, machine_rows, not_judged, QUICK, show_rows, write_rows
from mcl_repro.core.errors import SettingsError, UserError

# in the order in which they run
import training_speed      # noqa: F401  registers its benchmarks
import overheads           # noqa: F401
import detection_scale     # noqa: F401
import protection_speed    # noqa: F401
import paper_scale         # noqa: F401
import run_times           # noqa: F401


def rows_of(name, function, scale):
    "The rows of a benchmark as they come, the last one saying so where it fails."
    try:
        yield from function(scale)
    except Exception as error:
        print(f"error: {name}: {error}", file=sys.stderr)
        yield dict(zip(COLUMNS, (name, f"failed ({type(error).__name__})", "", "", "", "")))


def run_benchmarks(folder: Path,              # where `bench.csv` goes; written anew with every row
                   quick: bool = False,       # measure little, and judge nothing
                   only: list = (),           # names of benchmarks; default: all
                   pairs: int | None = None,  # embeddings for `detection_scale`; default: the scale's
                   ) -> list:                 # rows
    """Run benchmarks one after the other; one that fails is a row that says so.

    Raises SettingsError for a name that is not known.
    """
    for name in only:
        if name not in BENCHMARKS:
            raise SettingsError(f"unknown benchmark {name!r}; known: {', '.join(BENCHMARKS)}")
    folder, scale = Path(folder), replace(QUICK if quick else FULL, folder=str(folder))
    if pairs is not None:
        scale = replace(scale, pairs=pairs)
    rows = machine_rows()
    folder.mkdir(parents=True, exist_ok=True)
    for name, function in BENCHMARKS.items():
        if only and name not in only:
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        for found in rows_of(name, function, scale):
            rows.append(not_judged(found) if quick else found)
            write_rows(rows, folder/"bench.csv")
    return rows


def make_parser():
    "The options of the command."
    parser = argparse.ArgumentParser(prog="python benchmarks/speed.py", description=__doc__.partition(";")[0])
    parser.add_argument("only", nargs="*", metavar="BENCHMARK",
                        help=f"one or more of {', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="measure little, to see that everything works")
    parser.add_argument("--pairs", type=int, metavar="N",
                        help=f"embeddings for detection_scale (default: {FULL.pairs:,}, 12.3 GB on disk)")
    parser.add_argument("--runs", default="runs", metavar="FOLDER",
                        help="where bench/bench.csv is written (default: runs)")
    return parser


def main(argv: list = None) -> int:  # exit code
    "The command line; expected errors are one line on stderr."
    args = make_parser().parse_args(argv)
    folder = Path(args.runs)/"bench"
    try:
        rows = run_benchmarks(folder, args.quick, args.only, args.pairs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show_rows(rows)
    judged = [r["met"] for r in rows if r["met"]]
    verdict = "quick run, nothing is judged" if args.quick else "nothing here has a target"
    if judged:
        verdict = f"{judged.count('yes')} of {len(judged)} targets met"
    print(f"{verdict}; {folder/'bench.csv'}")
    return int(any(r["quantity"].startswith("failed (") for r in rows))


if __name__ == "__main__":
    sys.exit(main())
