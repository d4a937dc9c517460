"""What the benchmarks share, and the command: rows, turns, the machine, a table that is left behind."""
import csv
import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import measuring
import mcl_repro
import speed
from measuring import in_turns, machine_rows, QUICK, ratio_rows, row, write_rows
from mcl_repro.core.errors import SettingsError
from mcl_repro.lab.attempt import hardware_facts

ROOT = Path(mcl_repro.__file__).parent.parent


def written(folder):
    "The rows of a result."
    with open(folder/"bench.csv", newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def test_a_row_is_judged_by_its_target():
    assert row("b", "q", 1.23456, "s", "< 1.3") == dict(
        benchmark="b", quantity="q", value=1.235, unit="s", target="< 1.3", met="yes",
    )
    assert [row("b", "q", v, target=">= 1")["met"] for v in (0.99, 1, 1.01)] == ["no", "yes", "yes"]
    assert row("b", "q", 0, target="= 0")["met"] == "yes"
    assert row("b", "q", 3)["met"] == ""


def test_turns_alternate_and_their_median_is_kept():
    seen = []
    assert in_turns(3, lambda: seen.append("a") or 1, lambda: seen.append("b") or 2) == [[1, 1, 1], [2, 2, 2]]
    assert "".join(seen) == "abbaab"
    assert [r["value"] for r in ratio_rows("b", "q", [2, 4, 9], [1, 4, 3], ">= 1")] == [2, 1, 3]


def test_the_processor_time_of_the_machine_grows():
    before = measuring.used_seconds()
    sum(range(10**6))
    assert before is None or before <= measuring.used_seconds()


def test_machine_is_described_without_its_name():
    rows = {r["quantity"]: str(r["value"]) for r in machine_rows()}
    assert {"cpu", "cores", "python", "torch", "open_clip_torch", "git commit"} <= set(rows)
    text = "\n".join(rows.values())
    assert platform.node() not in text.split() and str(Path.home()) not in text and str(ROOT) not in text
    assert machine_rows()[0] == machine_rows()[0]
    assert "usable cores" not in hardware_facts("cpu"), "the cached facts are left alone"


def test_rows_are_written_as_csv(tmp_path):
    machine = machine_rows()
    write_rows([*machine, row("b", "q", 2, "s", "< 3")], tmp_path/"bench.csv")
    lines = written(tmp_path)
    assert (lines[0]["benchmark"], lines[-1]["met"], len(lines)) == ("machine", "yes", len(machine) + 1)
    assert [p.name for p in tmp_path.iterdir()] == ["bench.csv"]


def test_command_writes_what_it_prints(tmp_path):
    words = ["--quick", "world_rendering", "store_overhead", "--runs", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "benchmarks/speed.py", *words], capture_output=True, text=True, cwd=ROOT, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    rows = written(tmp_path/"bench")
    assert list(rows[0]) == ["benchmark", "quantity", "value", "unit", "target", "met"]
    assert list(dict.fromkeys(r["benchmark"] for r in rows)) == ["machine", "store_overhead", "world_rendering"]
    assert all(float(r["value"]) > -2 for r in rows if r["benchmark"] != "machine")
    assert all(r["quantity"] in done.stdout for r in rows) and "bench.csv" in done.stdout
    assert not any(r["met"] for r in rows) and "nothing is judged" in done.stdout
    assert [p.name for p in (tmp_path/"bench").iterdir()] == ["bench.csv"], "the temporary store is gone"


def test_all_benchmarks_are_registered():
    assert set(measuring.BENCHMARKS) == {
        "training_speed", "training_processes", "time_shares", "store_overhead", "import_times", "world_rendering",
        "detection_scale", "protection_speed", "paper_training", "paper_switches", "paper_images",
        "run_times",
    }


def test_unknown_benchmark_is_one_line_and_exit_2(tmp_path, capsys):
    assert speed.main(["speed_of_light", "--runs", str(tmp_path/"runs")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: unknown benchmark 'speed_of_light'; known: ")
    assert error.count("\n") == 1 and not (tmp_path/"runs").exists()


def test_full_run_judges_and_goes_on_after_a_failure(tmp_path, monkeypatch, capsys):
    def broken(scale):
        yield row("broken", "measured before", 1)
        raise RuntimeError("fell over")
    def good(scale):
        return [row("good", "speed", 2, "ratio", ">= 1"), row("good", "wait", 2, "s", "< 1"), row("good", "size", 2)]
    monkeypatch.setattr(speed, "BENCHMARKS", dict(broken=broken, good=good))
    assert speed.main(["--runs", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "error: broken: fell over" in said.err and "1 of 2 targets met" in said.out
    rows = [r for r in written(tmp_path/"bench") if r["benchmark"] != "machine"]
    assert [(r["quantity"], r["value"], r["met"]) for r in rows] == [
        ("measured before", "1.0", ""), ("failed (RuntimeError)", "", ""), ("speed", "2.0", "yes"),
        ("wait", "2.0", "no"), ("size", "2.0", ""),
    ]
    monkeypatch.setattr(speed, "BENCHMARKS", dict(good=good))
    assert speed.main(["--runs", str(tmp_path)]) == 0


def test_too_few_pairs_are_refused_at_once(tmp_path, capsys):
    with pytest.raises(SettingsError, match="raise --pairs to 20,000"):
        replace(QUICK, pairs=1000)
    assert speed.main(["--pairs", "500", "--runs", str(tmp_path/"runs")]) == 2
    assert capsys.readouterr().err.startswith("error: 500 pairs are too few for detection_scale")
    assert not (tmp_path/"runs").exists()
