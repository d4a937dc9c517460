"""The benchmarks at the papers' size, here in small: both sides do the same, and the promised rows are there."""
from dataclasses import replace

import pytest
import torch

import paper_scale as P
from mcl_repro.model.training import contrastive_loss, read_batch, train
from measuring import FULL, Scale
from training_speed import bare_batches

LITTLE = Scale(steps=1)


def test_ours_and_the_plain_loop_end_with_much_the_same_loss():
    clip, twin = P.on_device("smoke-RN"), P.on_device("smoke-RN")
    data, recipe = P.data_for(clip, 8, 24)
    batches = [(x, t.to(P.device())) for x, t in bare_batches(clip, data, recipe)]
    P.plain_loop(twin.model, batches, 1e-4)
    train(clip, data, replace(recipe, schedule="constant", weight_decay=0.01))
    seen = read_batch(data, torch.arange(24), P.device())
    with torch.no_grad():
        ours, plain = (float(contrastive_loss(c, seen)) for c in (clip, twin) if c.model.eval())
    assert ours == pytest.approx(plain, abs=0.05)


def test_what_the_card_can_do():
    clip = P.on_device("smoke-RN")
    data, _ = P.data_for(clip, 8, 24)
    assert 1e5 < P.flops_per_pair(clip, read_batch(data, torch.arange(8), P.device())) < 1e9
    assert P.matrix_peak(64, 3) > 1e6


def test_training_compares_like_with_like():
    rows = {r["quantity"]: r for r in P.paper_training(LITTLE)}
    ours, bare = (rows[f"smoke-RN, batch 8: {side}"]["value"] for side in ("ours", "bare open_clip loop"))
    assert min(ours, bare) > 0
    if not torch.cuda.is_available():
        assert rows["smoke-RN, batch 8: ours / bare"]["target"] == ""
        assert not any("peak memory" in q for q in rows), "measured on a GPU only"
    share = rows["smoke-RN, batch 8: share of the matrix peak"]["value"]
    used = rows["smoke-RN, batch 8: operations"]["value"] * 1e9
    peak = rows["matrix product of side 64"]["value"] * 1e12
    assert share == pytest.approx(ours * used / peak, rel=2e-3)


def test_switches_and_images_have_their_rows():
    assert all(r["value"] > 0 for r in P.paper_switches(LITTLE))
    rows = list(P.paper_images(LITTLE))
    assert len(rows) == 6 and all(r["value"] > 0 for r in rows)


def test_the_scale_follows_the_device():
    assert P.paper_scale(LITTLE) == P.SMALL
    assert P.paper_scale(FULL) == (P.ON_GPU if torch.cuda.is_available() else P.ON_CPU)
    assert P.ON_GPU.batch_sizes == (128, 1024)
