"""The benchmarks of training and of what the library adds: that they measure what they say. Speeds are not judged."""
import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch

import measuring
import overheads
import training_speed as T
from mcl_repro.lab.lab import Lab
from mcl_repro.model.clip import build_clip
from mcl_repro.model.training import train
from measuring import prepared, QUICK


def ordered(rows):
    "Whether the median of a ratio lies between its lowest and its highest turn."
    middle, lowest, highest = (r["value"] for r in rows)
    return lowest <= middle <= highest


# training

def test_both_loops_do_the_same_work():
    scale = replace(QUICK, steps=1)
    clip, data, recipe = prepared(scale)
    bare, batches = build_clip(scale.model), T.bare_batches(clip, data, recipe)
    (images, _), = batches
    assert images.shape == (scale.batch_size, 3, 32, 32) and images.is_contiguous()
    loss = T.bare_loop(bare.model, batches, recipe.learning_rate)
    assert train(clip, data, recipe)[0]["loss"] == pytest.approx(loss, rel=1e-3)


def test_speed_of_both_loops():
    rows = T.training_speed(QUICK)
    assert len(rows) == 5 and all(1 < r["value"] < 1e6 for r in rows[:2]) and ordered(rows[2:])


def test_shares_are_parts_of_a_whole():
    before = torch.get_num_threads()
    rows = {r["quantity"]: r["value"] for r in T.time_shares(QUICK)}
    assert list(rows) == ["data", "forward", "backward", "optimiser", "rest"]
    assert sum(rows.values()) == pytest.approx(1, abs=0.01) and all(0 <= v < 1 for v in rows.values())
    assert rows["forward"] + rows["backward"] > 0.2 and torch.get_num_threads() == before


def test_processes_are_counted_where_they_overlap():
    assert T.overlap_speed([[0, 1, 2, 3]], 10) == pytest.approx(10), "one step a second"
    assert T.overlap_speed([[0, 1, 2, 3, 4], [2, 3, 4, 5, 6]], 8) == pytest.approx(16)
    assert T.overlap_speed([[0, 2, 4], [1, 2, 3, 4, 5]], 10) == pytest.approx(15), "one half as fast"
    partly = T.overlap_speed([[0, 10], [4, 6]], 10)
    assert partly == pytest.approx(10 * (0.2 + 1) / 2), "steps across the ends count in part"
    with pytest.raises(ValueError, match="same time"):
        T.overlap_speed([[0, 1], [1, 2]], 8)


def test_a_training_process_answers_with_the_times_of_its_steps():
    said, settings = [], dict(threads=torch.get_num_threads(), scale=asdict(QUICK))
    T.train_on_request(iter([json.dumps(settings), "0.2", "0.1"]), said.append)
    assert said[0] == "ready" and len(said) == 3
    times = said[1]["times"]
    assert times[-1] - times[0] > 0.05 and T.overlap_speed([times], QUICK.batch_size) > 1 and said[1]["processor"] > 0


def test_processes_train_in_turns():
    rows = T.training_processes(QUICK)
    assert len(rows) == 6 and all(0 < r["value"] < 1e6 for r in rows[:2]) and ordered(rows[2:5])


def test_busy_machine_and_single_core_are_not_judged(monkeypatch):
    class Process:
        def __init__(self, scale, threads):
            pass
        def close(self):
            pass
        def answer(self):
            return "ready"
    monkeypatch.setattr(T, "TrainingProcess", Process)
    def met(busy, cores):
        def turn(workers, scale, others):
            others.append(busy)
            return 150.0 * len(workers)**0.5
        monkeypatch.setattr(T, "turn_of", turn)
        monkeypatch.setattr(T, "cores", lambda: cores)
        return [r["met"] for r in T.training_processes(QUICK) if r["target"]]
    assert [met(0.1, 2), met(0.5, 2), met(0.1, 1)] == [["yes"], [""], [""]]


@pytest.mark.skipif(not shutil.which("false"), reason="needs the command false")
def test_training_process_that_dies_is_reported_and_none_is_left(monkeypatch):
    started, real = [], T.TrainingProcess
    def process(scale, threads):
        started.append(real(scale, threads))
        return started[-1]
    monkeypatch.setattr(T, "TrainingProcess", process)
    monkeypatch.setattr(measuring.sys, "executable", shutil.which("false"))
    with pytest.raises(RuntimeError, match="a training process ended with exit code 1"):
        T.training_processes(QUICK)
    assert len(started) == 3 and all(p.process.poll() is not None for p in started)


# what the library adds

def test_a_stage_of_a_script_runs_in_a_lab(tmp_path):
    (tmp_path/"weights").write_bytes(b"1234")
    lab = Lab("smoke", device="cpu", runs=tmp_path/"runs", progress=False)
    done = lab.run(lab.node(overheads.copied_weights, weights=str(tmp_path/"weights"), number=1))
    assert done.record["files"]["clip.safetensors"]["size"] == 4


def test_what_the_store_adds():
    rows = overheads.store_overhead(QUICK)
    assert [r["quantity"].split(",")[0] for r in rows] == [
        "first stage of this process", "cold", "warm", "cold", "warm",
    ]
    assert all(-2 < r["value"] < 20_000 for r in rows)


def test_import_times_and_that_help_needs_no_torch():
    rows = {r["quantity"]: r for r in overheads.import_times(replace(QUICK, turns=1))}
    assert rows["torch modules loaded by mcl_repro --help"]["met"] == "yes"
    assert 0 < rows["mcl_repro --help"]["value"] < rows["import mcl_repro.papers.ubt"]["value"]


def test_an_interpreter_that_fails_is_told():
    assert overheads.python(["-c", "print(1)"]) == "1\n"
    with pytest.raises(RuntimeError, match="failed: no"):
        overheads.python(["-c", "raise SystemExit('no')"])


def test_small_pictures_are_drawn_faster_than_large_ones():
    rows = overheads.world_rendering(QUICK)
    assert [r["quantity"] for r in rows] == ["32 px", "64 px", "128 px", "224 px"]
    assert rows[0]["value"] > rows[-1]["value"] > 1
