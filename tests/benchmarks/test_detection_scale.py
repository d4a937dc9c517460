"""The benchmark of detection: what is generated, that the fast way computes what the formula says, what is judged."""
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import detection_scale as D
import speed
from mcl_repro.core.errors import SettingsError
from mcl_repro.papers import cfbd
from measuring import FULL, QUICK


def stored(folder, *names):
    return [np.load(Path(folder)/f"{n}.npy", mmap_mode="r", allow_pickle=False) for n in names]


def test_generated_pairs_look_like_those_of_a_clip():
    poisoned = np.arange(3000) < 200
    made = D.pairs_of(D.geometry_of(256, 0), poisoned, np.random.default_rng(0))
    images, texts = (normalize(x, dim=-1) for x in made)
    cosines, correlation = (images * texts).sum(-1).numpy(), (texts @ texts[:50].mean(0)).numpy()
    assert 0.2 < np.median(cosines[200:]) < 0.35 and np.median(cosines[:200]) < 0.15
    assert correlation[:200].min() > correlation[200:].max(), "the poison's captions are alike"


def test_generated_embeddings_are_as_described_and_the_same_again(tmp_path):
    for name in "abcd":
        (tmp_path/name).mkdir()
    for name, chunk in dict(a=1000, b=6000, c=1000).items():
        poisoned = D.write_embeddings(tmp_path/name, 6000, 256, seed=3, chunk=chunk)
    first, other, again = ((tmp_path/name/"images.npy").read_bytes() for name in "abc")
    assert first == again != other
    images, texts = stored(tmp_path/"a", "images", "texts")
    assert images.shape == texts.shape == (6000, 256) and images.dtype == texts.dtype == np.float16
    assert poisoned.sum() == 100
    assert np.mean(poisoned[:3000]) == pytest.approx(np.mean(poisoned), rel=0.4), "spread evenly"
    image, text = (normalize(torch.from_numpy(x.astype(np.float32)), dim=-1).numpy() for x in (images, texts))
    cosines, benign = (image * text).sum(1), text[~poisoned]
    assert 0.2 < np.median(cosines[~poisoned]) < 0.32, "pairs of a CLIP"
    assert np.median(cosines[poisoned]) < 0.12, "pairs that do not fit"
    within, across = np.mean(text[:500] @ text[500:1000].T), np.mean(image[:500] @ text[500:1000].T)
    assert within > 0.3 > 0.15 > across, "a gap between the modalities"
    assert (text[poisoned] @ text[poisoned].T).min() > 0.7
    assert np.quantile(benign[:500] @ benign[500:1000].T, 0.99) > within + 0.1, "clusters of captions"
    assert not D.write_embeddings(tmp_path/"d", 300, 16, poison=0).any()


def test_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys):
    full = shutil._ntuple_diskusage(10**12, 10**12 - 5 * 10**9, 5 * 10**9)
    monkeypatch.setattr(D.shutil, "disk_usage", lambda folder: full)
    with pytest.raises(SettingsError, match=r"3,000,000 pairs of width 1024 need 12.3 GB .* 5.0 GB are free: lower"):
        D.write_embeddings(tmp_path, 3_000_000, 1024)
    assert not list(tmp_path.iterdir())
    assert speed.main(["detection_scale", "--runs", str(tmp_path)]) == 1 and "lower --pairs" in capsys.readouterr().err
    assert [p.name for p in (tmp_path/"bench").iterdir()] == ["bench.csv"]


def test_a_clock_around_a_function_adds_up():
    seconds, module = {}, type("module", (), dict(wait=staticmethod(time.sleep)))
    D.clocked(module, ["wait"], seconds)
    module.wait(0.02)
    module.wait(0.03)
    assert 0.05 <= seconds["wait"] < 10


def test_the_formula_as_printed_and_the_fast_way_agree():
    made = D.pairs_of(D.geometry_of(32, 0), np.arange(300) < 20, np.random.default_rng(0))
    images, texts = (x.numpy() for x in made)
    mapping, suspects = D.generated_mapping(32, 16, 400), np.arange(10)
    consistency = cfbd.cross_modality_consistency(images, texts, mapping).value
    assert np.abs(D.naive_consistency(images, texts, mapping) - consistency).max() < 1e-5
    correlation = cfbd.textual_correlation(texts, suspects)
    assert np.abs(D.naive_correlation(texts, suspects) - correlation).max() < 1e-5


def test_growth_is_an_exponent():
    assert D.growth([10, 1000], [1, 100]) == pytest.approx(1)
    assert D.growth([10, 1000], [2, 20]) == pytest.approx(0.5)


def test_quick_detection_finds_the_poison():
    rows = D.detection_scale(QUICK)
    assert {r["met"] for r in rows if "difference" in r["quantity"] or "poison found" in r["quantity"]} == {"yes"}
    assert all(0 <= r["value"] < 600 for r in rows if r["unit"] == "s")


def test_mapped_tables_do_not_count_as_memory(tmp_path):
    pairs, width = 600_000, 128
    D.write_embeddings(tmp_path, pairs, width)
    cfbd.save_mapping(cfbd.MappingNetwork(width, 8), tmp_path/"mapping.safetensors")
    tables = 2 * (tmp_path/"texts.npy").stat().st_size / 2**20
    start, small, large = D.detections(tmp_path, [6000, pairs])
    assert set(large["stages"]) == set(D.STAGES) and sum(large["stages"].values()) <= large["total"]
    if large["peak"]:
        assert large["peak"] - small["peak"] < tables / 2, "scores grow with the pairs, embeddings do not"
    value, = stored(tmp_path, "value")
    assert value.shape == (pairs,)


def test_detection_is_not_judged_on_a_busy_machine_or_a_single_core(monkeypatch, tmp_path):
    def told(busy):
        def of(seconds):
            return dict(total=seconds, peak=400.0, others=busy, stages=dict.fromkeys(D.STAGES, seconds / 4))
        return [dict(peak=300.0), *map(of, (1.0, 10.0, 100.0))]
    monkeypatch.setattr(D, "detection_inputs", lambda folder, scale: (None, []))
    monkeypatch.setattr(D, "found_rows", lambda folder, poisoned: [])
    monkeypatch.setattr(D, "naive_rows", lambda folder, scale, rng: [])
    def met(busy, cores):
        monkeypatch.setattr(D, "cores", lambda: cores)
        monkeypatch.setattr(D, "detections", lambda folder, sizes: told(busy))
        rows = D.detection_scale(replace(FULL, folder=str(tmp_path)))
        return {r["quantity"]: r["met"] for r in rows if r["target"]}
    quiet = met(0.1, 2)
    assert list(quiet.values()) == ["yes", "yes", "yes"] and "3,000,000 pairs, start to end" in quiet
    for noisy in (met(0.5, 2), met(0.1, 1)):
        assert list(noisy.values()) == ["", "", "yes"], "memory is judged all the same"
