"""The benchmarks: that they measure what they say, and that the command leaves a table behind.

Speeds are not judged here.
"""
import csv, os, platform, shutil, subprocess, sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import mcl_repro
from mcl_repro.benchmarks import speed as bench
# the second registers its benchmarks: now, not into what a test puts in their place
from mcl_repro.benchmarks import paper_scale as paper_bench
from mcl_repro.model.clip import embed_tokens
from mcl_repro.attacks.protection import with_triggers
from mcl_repro.core.errors import SettingsError
from mcl_repro.lab.attempt import hardware_facts
from mcl_repro.model.clip import build_clip, embed_images, info_nce
from mcl_repro.model.training import train

ROOT = Path(mcl_repro.__file__).parent.parent


def call(*words):
    return subprocess.run(
        [sys.executable, "-m", "mcl_repro.benchmarks.speed", *map(str, words)], capture_output=True, text=True,
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, timeout=300,
    )


def test_command_writes_what_it_prints(tmp_path):
    done = call("--quick", "world_rendering", "store_overhead", "--runs", tmp_path)
    assert done.returncode == 0, done.stderr
    with open(tmp_path/"bench"/"bench.csv", newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0]) == ["benchmark", "quantity", "value", "unit", "target", "met"]
    assert list(dict.fromkeys(r["benchmark"] for r in rows)) == ["machine", "store_overhead", "world_rendering"]
    assert all(float(r["value"]) > -2 for r in rows if r["benchmark"] != "machine")
    assert all(r["quantity"] in done.stdout for r in rows) and "bench.csv" in done.stdout
    assert not any(r["met"] for r in rows) and "nothing is judged" in done.stdout
    assert [p.name for p in (tmp_path/"bench").iterdir()] == ["bench.csv"], "the temporary store is gone"


def test_machine_is_described_without_its_name():
    rows = {r["quantity"]: str(r["value"]) for r in bench.machine_rows()}
    assert {"cpu", "cores", "python", "torch", "open_clip_torch", "git commit"} <= set(rows)
    text = "\n".join(rows.values())
    assert platform.node() not in text.split() and str(Path.home()) not in text and str(ROOT) not in text
    assert bench.machine_rows()[0] == bench.machine_rows()[0] and "usable cores" not in hardware_facts("cpu"), (
        "the cached facts are left alone"
    )


def test_unknown_benchmark_is_one_line_and_exit_2(tmp_path, capsys):
    assert bench.main(["speed_of_light", "--runs", str(tmp_path/"runs")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: unknown benchmark 'speed_of_light'; known: ") and error.count("\n") == 1
    assert not (tmp_path/"runs").exists()


def test_full_run_judges_and_goes_on_after_a_failure(tmp_path, monkeypatch, capsys):
    def broken(scale):
        yield bench.row("broken", "measured before", 1)
        raise RuntimeError("fell over")
    def good(scale):
        return [
            bench.row("good", "speed", 2, "ratio", ">= 1"), bench.row("good", "wait", 2, "s", "< 1"),
            bench.row("good", "size", 2),
        ]
    monkeypatch.setattr(bench, "BENCHMARKS", dict(broken=broken, good=good))
    assert bench.main(["--runs", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "error: broken: fell over" in said.err and "1 of 2 targets met" in said.out
    with open(tmp_path/"bench"/"bench.csv", newline="", encoding="utf-8") as f:
        rows = [r for r in csv.DictReader(f) if r["benchmark"] != "machine"]
    assert [(r["quantity"], r["value"], r["met"]) for r in rows] == [
        ("measured before", "1.0", ""), ("failed (RuntimeError)", "", ""), ("speed", "2.0", "yes"),
        ("wait", "2.0", "no"), ("size", "2.0", ""),
    ]
    monkeypatch.setattr(bench, "BENCHMARKS", dict(good=good))
    assert bench.main(["--runs", str(tmp_path)]) == 0


def test_both_loops_do_the_same_work():
    scale = replace(bench.QUICK, steps=1)
    clip, data, recipe = bench._prepared(scale)
    bare, batches = build_clip(scale.model), bench.bare_batches(clip, data, recipe)
    assert len(batches) == 1 and batches[0][0].shape == (scale.batch_size, 3, 32, 32) and batches[0][0].is_contiguous()
    loss = bench.bare_loop(bare.model, batches, recipe.learning_rate)
    assert train(clip, data, recipe)[0]["loss"] == pytest.approx(loss, rel=1e-3)


def test_shares_are_parts_of_a_whole():
    before = torch.get_num_threads()
    rows = {r["quantity"]: r["value"] for r in bench.time_shares(bench.QUICK)}
    assert list(rows) == ["data", "forward", "backward", "optimiser", "rest"] and sum(rows.values()) == pytest.approx(
        1, abs=0.01
    )
    assert all(0 <= v < 1 for v in rows.values()) and torch.get_num_threads() == before


def test_processes_are_counted_where_they_overlap():
    assert bench.overlap_speed([[0, 1, 2, 3, 4], [2, 3, 4, 5, 6]], 8) == pytest.approx(16)
    assert bench.overlap_speed([[0, 10], [4, 6]], 10) == pytest.approx(10 * (0.2 + 1) / 2), (
        "steps across the ends count in part"
    )
    with pytest.raises(ValueError, match="same time"):
        bench.overlap_speed([[0, 1], [1, 2]], 8)


def test_busy_machine_and_single_core_are_not_judged(monkeypatch):
    class Process:
        def __init__(self, scale, threads):
            pass
        def close(self):
            pass
        def answer(self):
            return "ready"
    monkeypatch.setattr(bench, "_TrainingProcess", Process)
    def met(busy, cores):
        monkeypatch.setattr(
            bench, "_turn_of", lambda workers, scale, others: others.append(busy) or 150.0 * len(workers) ** 0.5
        )
        monkeypatch.setattr(bench, "_cores", lambda: cores)
        return [r["met"] for r in bench.training_processes(bench.QUICK) if r["target"]]
    assert [met(.1, 2), met(.5, 2), met(.1, 1)] == [["yes"], [""], [""]]


@pytest.mark.skipif(not shutil.which("false"), reason="needs the command false")
def test_training_process_that_dies_is_reported_and_none_is_left(monkeypatch):
    started, real = [], bench._TrainingProcess
    def process(scale, threads):
        started.append(real(scale, threads))
        return started[-1]
    monkeypatch.setattr(bench, "_TrainingProcess", process)
    monkeypatch.setattr(bench.sys, "executable", shutil.which("false"))
    with pytest.raises(RuntimeError, match="a training process ended with exit code 1"):
        bench.training_processes(bench.QUICK)
    assert len(started) == 3 and all(p.process.poll() is not None for p in started)


def test_import_times_and_that_help_needs_no_torch():
    rows = {r["quantity"]: r for r in bench.import_times(replace(bench.QUICK, turns=1))}
    assert rows["torch modules loaded by mcl_repro --help"]["met"] == "yes"
    assert 0 < rows["mcl_repro --help"]["value"] < rows["import mcl_repro.papers.ubt"]["value"]


def stored(folder, *names):
    return [np.load(Path(folder)/f"{n}.npy", mmap_mode="r", allow_pickle=False) for n in names]


def test_generated_embeddings_are_as_described_and_the_same_again(tmp_path):
    for name in "ab":
        (tmp_path/name).mkdir()
        poisoned = bench.write_embeddings(tmp_path/name, 6000, 256, seed=3, chunk=1000 if name == "a" else 6000)
    images, texts = stored(tmp_path/"a", "images", "texts")
    assert (
        images.shape == texts.shape == (6000, 256)
        and images.dtype == texts.dtype == np.float16
        and poisoned.sum() == 100
    )
    assert np.mean(poisoned[:3000]) == pytest.approx(np.mean(poisoned), rel=.4), "spread evenly"
    unit = [x.astype(np.float32) / np.linalg.norm(x.astype(np.float32), axis=1, keepdims=True) for x in (images, texts)]
    cosines = (unit[0] * unit[1]).sum(1)
    assert 0.2 < np.median(cosines[~poisoned]) < 0.32 and np.median(cosines[poisoned]) < 0.12, (
        "pairs of a CLIP, and pairs that do not fit"
    )
    within, across = np.mean(unit[1][:500] @ unit[1][500:1000].T), np.mean(unit[0][:500] @ unit[1][500:1000].T)
    assert within > .3 > .15 > across, "a gap between the modalities"
    alike = unit[1][poisoned] @ unit[1][poisoned].T
    assert (
        alike.min() > 0.7
        and np.quantile(unit[1][~poisoned][:500] @ unit[1][~poisoned][500:1000].T, 0.99) > within + 0.1
    ), "clusters of captions"
    again = tmp_path/"c"
    again.mkdir()
    bench.write_embeddings(again, 6000, 256, seed=3, chunk=1000)
    assert (
        (again / "images.npy").read_bytes()
        == (tmp_path / "a" / "images.npy").read_bytes()
        != (tmp_path / "b" / "images.npy").read_bytes()
    )
    clean = tmp_path/"d"
    clean.mkdir()
    assert not bench.write_embeddings(clean, 300, 16, poison=0).any()


def test_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        bench.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**12, 10**12 - 5 * 10**9, 5 * 10**9)
    )
    with pytest.raises(
        SettingsError, match=r"3,000,000 pairs of width 1024 need 12.3 GB .* 5.0 GB are free: lower --pairs"
    ):
        bench.write_embeddings(tmp_path, 3_000_000, 1024)
    assert not list(tmp_path.iterdir())
    assert bench.main(["detection_scale", "--runs", str(tmp_path)]) == 1 and "lower --pairs" in capsys.readouterr().err
    assert [p.name for p in (tmp_path/"bench").iterdir()] == ["bench.csv"]


def test_too_few_pairs_are_refused_at_once(tmp_path, capsys):
    assert bench.main(["--pairs", "500", "--runs", str(tmp_path/"runs")]) == 2
    assert (
        capsys.readouterr().err.startswith("error: 500 pairs are too few for detection_scale")
        and not (tmp_path / "runs").exists()
    )


def test_mapped_tables_do_not_count_as_memory(tmp_path):
    pairs, width = 600_000, 128
    bench.write_embeddings(tmp_path, pairs, width)
    bench.cfbd.save_mapping(bench.cfbd.MappingNetwork(width, 8), tmp_path/"mapping.safetensors")
    tables = 2 * (tmp_path/"texts.npy").stat().st_size / 2**20
    start, small, large = bench._detections(tmp_path, [6000, pairs])
    assert set(large["stages"]) == set(bench._STAGES) and sum(large["stages"].values()) <= large["total"]
    if large["peak"]:
        assert large["peak"] - small["peak"] < tables / 2, "scores grow with the pairs, embeddings do not"
    value, = stored(tmp_path, "value")
    assert value.shape == (pairs,)


def test_detection_is_not_judged_on_a_busy_machine_or_a_single_core(monkeypatch, tmp_path):
    def told(busy):
        return [dict(peak=300.0)] + [
            dict(total=s, peak=400.0, others=busy, stages=dict.fromkeys(bench._STAGES, s / 4))
            for s in (1.0, 10.0, 100.0)
        ]
    monkeypatch.setattr(bench, "_detection_inputs", lambda folder, scale: (None, []))
    monkeypatch.setattr(bench, "_found_rows", lambda folder, poisoned: [])
    monkeypatch.setattr(bench, "_naive_rows", lambda folder, scale, rng: [])
    def met(busy, cores):
        monkeypatch.setattr(bench, "_cores", lambda: cores)
        monkeypatch.setattr(bench, "_detections", lambda folder, sizes: told(busy))
        return {
            r["quantity"]: r["met"]
            for r in bench.detection_scale(replace(bench.FULL, folder=str(tmp_path)))
            if r["target"]
        }
    quiet = met(.1, 2)
    assert list(quiet.values()) == ["yes", "yes", "yes"] and "3,000,000 pairs, start to end" in quiet
    assert list(met(.5, 2).values()) == list(met(.1, 1).values()) == ["", "", "yes"], "memory is judged all the same"


def test_loop_and_search_choose_the_same_triggers():
    parts = bench._Protecting(bench.QUICK)
    found, loss = parts.text()
    for way in (dict(), dict(ours=True), dict(ours=True, once=True)):
        looped, loop_loss = parts.loop(**way)
        assert torch.equal(looped, found) and loop_loss == pytest.approx(loss, abs=1e-4)
    clip, tokens = parts.clip, with_triggers(parts.tokens, parts.triggers)
    before = info_nce(embed_images(clip, parts.noisy), embed_tokens(clip, tokens), clip.model.logit_scale.exp())
    assert loss < before.item() and (found != parts.triggers).any()


def test_loop_computes_everything_for_each_candidate(monkeypatch):
    parts, seen = bench._Protecting(bench.QUICK), dict(pictures=0, captions=0)
    pictures, captions = embed_images, parts.clip.model.encode_text
    def counted(what, function):
        def call(*args, **kw):
            seen[what] += 1
            return function(*args, **kw)
        return call
    monkeypatch.setattr(bench, "embed_images", counted("pictures", pictures))
    parts.loop()
    assert seen["pictures"] == 2 + 3 * 16, "for the gradient, for the start, for each candidate of each place"
    seen["pictures"] = 0
    monkeypatch.setattr(parts.clip.model, "encode_text", counted("captions", captions))
    parts.loop(once=True)
    assert seen == dict(pictures=1, captions=1 + 3 * 16)


def test_protection_times_add_up_and_have_their_target(monkeypatch):
    monkeypatch.setattr(bench, "_protection_memory", lambda scale: [])
    rows = {r["quantity"]: r for r in bench.protection_speed(replace(bench.QUICK, turns=1))}
    first = list(rows.values())[:3]
    assert rows["one round altogether"]["value"] == pytest.approx(sum(r["value"] for r in first), rel=.01)
    assert {r["unit"] for r in first} == {"s per 1,000 pairs"} and all(r["value"] > 0 for r in first)
    assert rows["text search: ours / plain loop"]["target"] == ">= 3"
    assert rows["tokens that the plain loop chose otherwise"]["met"] == "yes"


def test_memory_is_measured_where_nothing_is_kept(tmp_path, monkeypatch):
    seen, real = [], train
    def peeking(clip, data, recipe, callbacks):
        real(clip, data, recipe, callbacks=callbacks)
        seen.extend([data, callbacks[0].material.clean])
    monkeypatch.setattr(bench, "train", peeking)
    told, free = [], bench.training._free_memory
    bench._protect_on_request(
        iter([bench.json.dumps(dict(folder=str(tmp_path), scale=bench.asdict(replace(bench.QUICK, steps=1)))), "40"]),
        told.append,
    )
    assert len(seen) == 2 and not any(data.resident for data in seen) and len(told) == 2
    assert (
        isinstance(np.load(tmp_path / "noise-1.npy", mmap_mode="r", allow_pickle=False), np.memmap)
        and bench.training._free_memory is free
    )
    assert np.abs(np.load(tmp_path/"noise-1.npy", allow_pickle=False)).max() == 1


def test_memory_rows_judge_growth(monkeypatch):
    peaks = {1000: (300., 400.), 10_000: (300., 460.)}
    monkeypatch.setattr(
        bench, "_protecting_peaks", lambda scale, pairs: [dict(anonymous=p, resident=500.0) for p in peaks[pairs]]
    )
    rows = {r["quantity"]: r for r in bench._protection_memory(replace(bench.QUICK, protected=10_000))}
    judged = rows["peak anonymous memory, 10,000 / 1,000 pairs"]
    assert (judged["value"], judged["met"]) == (1.15, "no")
    assert rows["growth of the peak per pair"]["value"] == pytest.approx(60 * 2**20 / 9000, rel=1e-3)
    monkeypatch.setattr(bench, "_protecting_peaks", lambda scale, pairs: [dict(anonymous=None, resident=None)] * 2)
    assert bench._protection_memory(bench.QUICK) == [], "a system that does not tell"


def test_paper_scale_on_a_cpu_is_small_and_compares_like_with_like():
    "Both sides of the comparison see the same pairs in the same precision; what is measured on a GPU only is left out."
    scale = bench.Scale(steps=1)
    rows = {r["quantity"]: r for r in paper_bench.paper_training(scale)}
    ours, bare = (rows[f"smoke-RN, batch 8: {side}"]["value"] for side in ("ours", "bare open_clip loop"))
    assert (
        min(ours, bare) > 0
        and rows["smoke-RN, batch 8: ours / bare"]["target"] == ""
        and not any("peak memory" in q for q in rows)
        or torch.cuda.is_available()
    )
    share, used, peak = (
        rows[q]["value"]
        for q in (
            "smoke-RN, batch 8: share of the matrix peak", "smoke-RN, batch 8: operations", "matrix product of side 64",
        )
    )
    assert share == pytest.approx(ours * used * 1e9 / (peak * 1e12), rel=2e-3)
    assert paper_bench.paper_scale(bench.FULL) == (
        paper_bench.ON_GPU if torch.cuda.is_available() else paper_bench.ON_CPU
    ) and paper_bench.ON_GPU.batch_sizes == (128, 1024)
