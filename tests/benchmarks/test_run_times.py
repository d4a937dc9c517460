"Where the time of a run went: made-up records of two processes, as the code before and after leaves them."
import csv
import json
from dataclasses import replace
from datetime import datetime, timezone

import pytest

import run_times as R
from mcl_repro.core.files import write_json
from mcl_repro.lab.store import Store
from mcl_repro.report.run_times import (
    draw_time_line, headline_seconds, idle_cores, on_cores, read_times, span_of, table_times,
)
from measuring import QUICK

BEGAN = 1_800_000_000     # seconds since 1970


def utc(seconds):
    return datetime.fromtimestamp(int(BEGAN + seconds), timezone.utc).isoformat()


def make_run(folder, steps, old=False):
    "A run's plan and records; `steps`: key -> (stage, inputs, readers, began, seconds, process), None: still to come."
    store, session, entries = Store(folder.parent/"store"), f"{utc(0)} abcd", {}
    store.open()
    for key, (stage, inputs, readers, began, seconds, process) in steps.items():
        entries[key] = dict(stage=stage, key=key, label="", inputs=inputs, session=session)
        entries[key] |= {} if old else {"readers": readers}
        if began is None:
            continue
        known = dict(stage=stage, key=key, label="", seconds=seconds)
        times = dict(started=utc(began), finished=utc(began + seconds))
        more = {} if old else dict(began=BEGAN + began, process=process)
        write_json(store.path(stage, key)/"record.json", known | times | more)
    write_json(folder/"plan.json", dict(format=1, store="../store", session=session, entries=entries))
    return folder


STEPS = {
    "before": ("s.pairs", [], [], -500, 3, 1),                  # found in the store
    "a": ("s.train", ["before"], ["mem.table1"], 0, 10, 11),
    "b": ("s.train", [], ["ubt.fig4"], 0.5, 4, 12),
    "c": ("s.measure", ["a"], ["ubt.table1"], 10.25, 5.5, 12),
    "d": ("s.measure", ["b"], ["ubt.table3"], 10.5, 1, 11),
}


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path/"runs/mini", STEPS)


def test_only_what_the_run_computed_counts(run):
    times = read_times(run)
    assert list(times.key) == ["a", "b", "c", "d"] and span_of(times) == 15.75
    assert list(read_times(run, since=0).key) == ["before", "a", "b", "c", "d"]


def test_a_run_that_found_everything_shows_how_it_was_once_computed(tmp_path):
    warm = {key: (*step[:3], step[3] - 9000, *step[4:]) for key, step in STEPS.items()}
    assert len(read_times(make_run(tmp_path/"runs/mini", warm))) == 5


def test_idle_is_what_no_step_fills(run):
    idle = idle_cores(read_times(run))
    assert idle.seconds.tolist() == [11, 9.5]
    assert idle.idle.tolist() == pytest.approx([1 - 11 / 15.75, 1 - 9.5 / 15.75])


def test_a_table_waits_for_all_that_it_needs(run, tmp_path):
    times = read_times(run)
    assert table_times(times) == {"ubt.fig4": 4.5, "mem.table1": 10, "ubt.table3": 11.5, "ubt.table1": 15.75}
    assert headline_seconds(times) == 15.75
    unfinished = {**STEPS, "e": ("s.measure", ["a"], ["cfbd.table1"], None, None, None)}
    times = read_times(make_run(tmp_path/"other/mini", unfinished))
    assert times.attrs["waiting"] == ["cfbd.table1"] and "cfbd.table1" not in table_times(times)
    assert headline_seconds(times) is None, "one of them is still to come"


def test_older_records_take_no_more_cores_than_there_were(tmp_path):
    "Steps of two processes, one right after the other, in whole seconds: rounding must not make a third core."
    steps, ends = {}, [0.95, 0.3]
    for number in range(60):
        core, seconds = number % 2, 0.4 + (number * 7 % 13) / 4
        steps[f"k{number}"] = ("s.step", [], [], ends[core], seconds, core)
        ends[core] += seconds + 0.01
    old = read_times(make_run(tmp_path/"old/mini", steps, old=True))
    new = read_times(make_run(tmp_path/"new/mini", steps))
    assert on_cores(old).core.max() == on_cores(new).core.max() == 2 and old.process.isna().all()
    assert idle_cores(old).seconds.sum() == pytest.approx(idle_cores(new).seconds.sum())


def test_a_process_keeps_its_core_and_a_new_one_takes_over(run):
    times = read_times(run)
    assert on_cores(times).core.tolist() == [1, 2, 2, 1]
    assert on_cores(times.assign(process=[11, 12, 13, 11])).core.tolist() == [1, 2, 2, 1]


def test_the_picture_has_a_colour_for_nine_kinds_and_marks_headline_tables(run):
    import matplotlib.pyplot as plt
    times = read_times(run)
    fig = draw_time_line(times, "mini")
    bars, marks = fig.axes[0].collections[:2]
    assert len(bars.get_paths()) == 2 and len(marks.get_paths()) == 1, "core 1: a and d, a for mem.table1"
    assert "4 stages in 16 s" in fig.axes[0].get_title("left") and fig.get_figwidth() == 12.8
    legend = draw_time_line(times.assign(readers=[()] * 4)).legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["s.train", "s.measure"]
    plt.close("all")


# the script

def written(path):
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def test_the_command_prints_and_writes_a_table(run, tmp_path, capsys):
    assert R.main([str(run), "--out", str(tmp_path/"out")]) == 0
    said, table = capsys.readouterr().out, written(tmp_path/"out/run_times.csv")
    assert list(table[0]) == ["stage", "stages", "seconds", "share"]
    assert [line["stage"] for line in table] == ["s.train", "s.measure", "all"]
    assert table[-1] == {"stage": "all", "stages": "4", "seconds": "20.5", "share": "1"}
    assert "core 2 idle 39.7%" in said and "mem.table1 10 s" in said
    assert (tmp_path/"out/run_times.png").read_bytes()[:4] == b"\x89PNG"
    stages = written(tmp_path/"out/run_stages.csv")
    assert len(stages) == 4 and stages[0]["began"] == "0"
    assert sum(float(line["seconds"]) for line in stages) == 20.5
    assert any("mem.table1" in line["readers"].split() for line in stages)


def test_two_runs_stand_side_by_side(run, tmp_path, capsys):
    less = {key: step for key, step in STEPS.items() if key != "a"}
    after = make_run(tmp_path/"after/mini", {**less, "x": ("s.new", [], [], 1, 2, 11)})
    assert R.main([str(after), "--before", str(run), "--out", str(tmp_path)]) == 0
    table = {line["stage"]: line for line in written(tmp_path/"run_times.csv")}
    assert (table["s.train"]["seconds_before"], table["s.train"]["seconds_after"]) == ("14", "4")
    assert (table["s.new"]["stages_before"], table["s.new"]["stages_after"]) == ("0", "1")
    assert (tmp_path/"run_times_before.png").exists() and "before (" in capsys.readouterr().out


def test_a_folder_without_a_run_is_one_line_and_exit_2(tmp_path, capsys):
    assert R.main([str(tmp_path), "--out", str(tmp_path/"out")]) == 2
    error = f"error: no step of a run was found in {tmp_path}; make one with `mcl_repro run`\n"
    assert capsys.readouterr().err == error
    assert not (tmp_path/"out").exists()


def test_as_a_benchmark_it_tells_of_the_latest_run(run, tmp_path, capsys):
    rows = R.run_times(replace(QUICK, folder=str(tmp_path/"runs/bench")))
    told = {r["quantity"]: r["value"] for r in rows}
    assert told["mini: 4 stages, first to last"] == 15.75 and told["mini: headline tables there"] == 15.75
    assert told["mini: s.train, 2 stages"] == 14 and told["mini: core 1 idle"] == pytest.approx(0.3016)
    assert (tmp_path/"runs/bench/run_times.png").exists()
    assert R.run_times(replace(QUICK, folder=str(tmp_path/"nothing/bench"))) == []
    assert "no run in" in capsys.readouterr().err


def test_a_damaged_record_is_left_out(run):
    path = Store(run.parent/"store").path("s.train", "a")/"record.json"
    path.write_text(json.dumps({"key": "a"})[:5])
    assert "a" not in set(read_times(run).key)
