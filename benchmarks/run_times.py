"""Where the time of a run went: `python benchmarks/run_times.py runs/mini` prints seconds by kind of stage, the idle
share of each core and when the tables were there, and writes them with the time line as a picture. With `--before
FOLDER` another run of the same papers stands beside it. `make bench` does it for a run that is in `runs`.
"""
import argparse
import io
import sys
from pathlib import Path

import pandas as pd

from measuring import benchmark, row, Scale
from mcl_repro.core.errors import SettingsError, UserError
from mcl_repro.core.files import write_atomically
from mcl_repro.core.words import columns, duration
from mcl_repro.report.figures import use_style
from mcl_repro.report.run_times import (
    compared_kinds, draw_time_line, headline_seconds, idle_cores, read_times, seconds_by_kind, span_of, table_times,
)

NAME = "run_times"


# What is told

def rows_of(times, label: str = "") -> list:
    "A run as rows of a benchmark: the whole, the idle cores, and the seconds of each kind of stage."
    said = f"{label}: " if label else ""
    rows = [row(NAME, f"{said}{len(times)} stages, first to last", span_of(times), "s")]
    headline = headline_seconds(times)
    if headline is not None:
        rows.append(row(NAME, f"{said}headline tables there", headline, "s"))
    rows += [row(NAME, f"{said}core {core.core} idle", core.idle, "share") for core in idle_cores(times).itertuples()]
    for kind in seconds_by_kind(times).itertuples():
        rows.append(row(NAME, f"{said}{kind.stage}, {kind.stages} stage{'s' * (kind.stages != 1)}", kind.seconds, "s"))
    return rows


def kinds_of(times, before=None):
    "The table of seconds by kind, with a last line for all of them; of two runs where there is another one before."
    found = seconds_by_kind(times) if before is None else compared_kinds(before, times)
    numbers = [name for name in found if name != "stage"]
    whole = pd.DataFrame([{"stage": "all", **found[numbers].sum()}]).astype(found.dtypes)
    return pd.concat([found, whole], ignore_index=True)


def stages_of(times):
    "Every stage in the order of its start, in seconds since the first one began, and what it was for."
    start = times.began.min()
    moments = dict(began=(times.began - start).round(2), ended=(times.ended - start).round(2))
    readers = [" ".join(ids) for ids in times.readers]
    return times[["stage", "label", "seconds", "process"]].assign(**moments, readers=readers)


def told(table) -> list:
    "Lines of that table, for `columns`."
    def text(name, value):
        if name.startswith("share"):
            return f"{value:.1%}"
        return f"{value:,.1f}" if name.startswith("seconds") else value
    return [{name: text(name, value) for name, value in line.items()} for line in table.to_dict("records")]


def summary(times, label: str) -> str:
    "What is said of a run besides that table."
    idle = "; ".join(f"core {core.core} idle {core.idle:.1%}" for core in idle_cores(times).itertuples())
    lines = [f"{label}: {len(times)} stages in {duration(span_of(times))}; {idle}"]
    there = [f"{id} {duration(end)}" for id, end in table_times(times).items()]
    if there:
        lines.append(f"  there after: {', '.join(there)}")
    if times.attrs["waiting"]:
        lines.append(f"  still to come: {', '.join(times.attrs['waiting'])}")
    return "\n".join(lines)


# Files

def picture(times, title: str) -> bytes:
    "The time line as a PNG, 1280 pixels wide."
    import matplotlib.pyplot as plt
    use_style()
    fig, out = draw_time_line(times, title), io.BytesIO()
    fig.savefig(out, format="png", dpi=100, metadata={"Software": None})
    plt.close(fig)
    return out.getvalue()


def write_run(folder: Path, times, title: str = "", before=None, title_before: str = "") -> list:
    """`run_times.csv` (kinds of stages), `run_stages.csv` (every stage, and which tables and figures it is for) and
    `run_times.png`, and `run_times_before.png` of another run; returns their paths.
    """
    def csv(frame):
        return frame.to_csv(index=False, lineterminator="\n", float_format="%.6g")
    made = [write_atomically(folder/f"{NAME}.csv", csv(kinds_of(times, before))),
            write_atomically(folder/"run_stages.csv", csv(stages_of(times))),
            write_atomically(folder/f"{NAME}.png", picture(times, title))]
    if before is not None:
        made.append(write_atomically(folder/f"{NAME}_before.png", picture(before, title_before)))
    return made


# The benchmark

def latest_run(runs: Path) -> Path | None:
    "The folder of the run that was planned last; None where there is none."
    plans = sorted(runs.glob("*/plan.json"), key=lambda path: path.stat().st_mtime)
    return plans[-1].parent if plans else None


@benchmark
def run_times(scale: Scale) -> list:
    "Where the time of the latest run in this folder of runs went; nothing without one."
    folder = Path(scale.folder or ".")
    run = latest_run(folder.parent)
    if run is None:
        print(f"{NAME}: no run in {folder.parent}; make one with `mcl_repro run`", file=sys.stderr)
        return []
    try:
        times = read_times(run)
    except SettingsError as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        return []
    write_run(folder, times, run.name)
    return rows_of(times, run.name)


# The command

def make_parser():
    "The options of the command."
    parser = argparse.ArgumentParser(prog="python benchmarks/run_times.py", description=__doc__.partition(":")[0])
    parser.add_argument("run", metavar="FOLDER", help="a run's folder, such as runs/mini")
    parser.add_argument("--before", metavar="FOLDER", help="another run to compare it with")
    parser.add_argument("--all", action="store_true", help="also what the run found in the store")
    parser.add_argument("--out", default="runs/bench", metavar="FOLDER",
                        help="where run_times.csv and run_times.png go (default: runs/bench)")
    return parser


def main(argv: list = None) -> int:  # exit code
    "The command line; expected errors are one line on stderr."
    args = make_parser().parse_args(argv)
    since = 0. if args.all else None
    try:
        times = read_times(args.run, since)
        before = read_times(args.before, since) if args.before else None
        made = write_run(Path(args.out), times, "after" if args.before else "", before, "before")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table = kinds_of(times, before)
    print(columns(told(table), list(table)))
    if before is not None:
        print(summary(before, f"before ({args.before})"))
    print(summary(times, f"after ({args.run})" if args.before else args.run))
    print("; ".join(map(str, made)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
