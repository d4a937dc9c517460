"""What must hold on a GPU: the CPU's numbers within stated tolerances, the same bytes twice, less memory for parts.

`make test DEVICE=cuda` runs these.
"""
import os, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mcl_repro.model.clip import build_clip, embed_images, embed_texts, encode_text, text_length
from mcl_repro.data.registry import open_data
from mcl_repro.model.devices import deterministic
from mcl_repro.lab.lab import Lab
from mcl_repro.papers.mem import Search, update_noise
from mcl_repro.papers.stages import classification, clean_clip
from mcl_repro.model.training import contrastive_loss, embed_batch, read_batch, Recipe, train, training_set

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no GPU here; make test DEVICE=cuda runs it where there is one"
    ),
]
TESTS = Path(__file__).resolve().parent.parent
MODELS = ("mini-RN", "mini-ViT")


def trained(model, device, pairs=256, **kw):
    clip, data = build_clip(model, seed=1, device=device), open_data(f"world:train:{pairs}")
    recipe = Recipe(**{**dict(epochs=2, batch_size=32, learning_rate=5e-4, warmup_steps=4), **kw})
    history = train(clip, training_set(clip, data), recipe)
    return clip, [h["loss"] for h in history]


def bits(clip):
    return torch.cat([v.detach().cpu().flatten().double() for v in clip.model.state_dict().values()])


@pytest.mark.parametrize("model", MODELS)
def test_one_batch_in_float32_is_that_of_the_cpu(model):
    "Loss to 1e-5, gradients to 1e-3 of the largest: summed in another order."
    found = {}
    for device in ("cpu", "cuda"):
        clip = build_clip(model, seed=1, device=device)
        clip.model.train()
        data = training_set(clip, open_data("world:train:64"))
        torch.backends.cudnn.allow_tf32 = False
        value = contrastive_loss(clip, read_batch(data, torch.arange(64), device))
        value.backward()
        found[device] = value.item(), torch.cat([p.grad.flatten().cpu() for p in clip.model.parameters()])
    assert found["cuda"][0] == pytest.approx(found["cpu"][0], abs=1e-5)
    difference = (found["cuda"][1] - found["cpu"][1]).abs().max() / found["cpu"][1].abs().max()
    assert difference < 1e-3, f"{difference:.1e}"


@pytest.mark.parametrize("model", MODELS)
def test_training_in_float32_follows_the_cpu(model):
    "Losses of two epochs to 2%: rounding grows from step to step."
    (_, ours), (_, cpu) = (trained(model, device, precision="fp32") for device in ("cuda", "cpu"))
    assert ours == pytest.approx(cpu, rel=2e-2)


@pytest.mark.parametrize("model", MODELS)
def test_sixteen_bits_train_as_well(model):
    "Losses of two epochs to 5% of those in float32."
    (_, half), (_, full) = (trained(model, "cuda", precision=p) for p in ("auto", "fp32"))
    assert half == pytest.approx(full, rel=5e-2)


@pytest.mark.parametrize("model", MODELS)
def test_embeddings_are_those_of_the_cpu(model):
    pairs = open_data("world:train:100")
    for embed, what in ((embed_images, pairs.images), (embed_texts, list(pairs.captions))):
        on = {d: embed(build_clip(model, seed=1, device=d), what) for d in ("cpu", "cuda")}
        assert on["cuda"].device.type == "cpu" and (on["cuda"] - on["cpu"]).abs().max() < 1e-4
    clip = build_clip(model, seed=1, device="cuda")
    half = embed_images(clip, pairs.images, precision="auto")
    assert ((half * embed_images(clip, pairs.images)).sum(1) > 0.99).all() and half.dtype == torch.float32


def test_captions_of_a_known_length_are_those_of_an_unknown_one():
    clip = build_clip("mini-RN", seed=1, device="cuda")
    data = training_set(clip, open_data("world:train:64"))
    tokens = data.tokens.to("cuda")
    with torch.no_grad():
        ours, whole = encode_text(clip.model, tokens, length=text_length(data.tokens)), clip.model.encode_text(tokens)
    torch.testing.assert_close(ours, whole, atol=1e-4, rtol=1e-4)


def test_losses_are_float32_whatever_the_towers_compute_in():
    clip = build_clip("mini-ViT", seed=1, device="cuda")
    batch = read_batch(training_set(clip, open_data("world:train:32")), torch.arange(32), "cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        u, v = embed_batch(clip, batch.images, batch.tokens, batch.length)
        value = contrastive_loss(clip, batch)
    assert u.dtype == v.dtype == value.dtype == torch.float32
    torch.testing.assert_close(u.norm(dim=1), torch.ones(32, device="cuda"), atol=1e-5, rtol=0)


@pytest.mark.parametrize("model", MODELS)
def test_the_same_bytes_twice_with_the_switch(model):
    with deterministic():
        first, second = (bits(trained(model, "cuda")[0]) for _ in range(2))
    assert torch.equal(first, second)


def test_stages_give_the_same_bytes_in_two_stores(tmp_path):
    files = []
    for name in ("a", "b"):
        lab = Lab("smoke", device="cuda", runs=tmp_path/name, progress=False)
        clean = lab.node(clean_clip, model="smoke-RN", pairs=lab.role("pretrain"), recipe=dict(lab.profile.pretrain))
        attack = dict(lab.profile.attacks["BadNet"])
        measured = lab.node(classification, clip=clean, test=lab.role("zeroshot"), attack=attack, target="banana")
        made = lab.run([clean, measured])
        files.append([a.record["files"] for a in made])
        assert made[0].record["device"] == {"type": "cuda"}
        assert made[0].record["peak_gpu_memory_mb"] > 0
        assert "gpu" in made[0].record["hardware"]
    assert files[0] == files[1]


def test_parts_need_less_memory_and_give_the_same_loss():
    found = {}
    for size in (None, 16):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        _, losses = trained("ViT-B-32", "cuda", pairs=256, batch_size=256, epochs=1, micro_batch=size)
        found[size] = losses[0], torch.cuda.max_memory_allocated() - base
    assert found[16][0] == pytest.approx(found[None][0], rel=2e-2)
    assert found[16][1] < 0.8 * found[None][1], found


def test_a_resnet_of_public_size_trains_in_channels_last():
    clip, losses = trained("RN50", "cuda", pairs=64, epochs=1)
    weight = clip.model.visual.layer1[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and np.isfinite(losses).all()


def test_noise_on_a_gpu_stays_in_its_bound():
    clip = build_clip("mini-RN", seed=1, device="cuda")
    data = training_set(clip, open_data("world:train:32"))
    triggers = torch.full((32, 3), 518)
    start = torch.zeros(data.images.shape, dtype=torch.int8, device="cuda")
    noise = update_noise(clip, data.images, start, data.tokens.to("cuda"), triggers.to("cuda"), Search(bound=8))
    assert noise.abs().max() <= 8 and noise.abs().float().mean() > 1


def test_two_processes_on_one_gpu_compute_what_one_computes(tmp_path):
    "Over gloo, as NCCL wants a GPU for each. The ResNet's BatchNorm is frozen here as on the CPU."
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = dict(os.environ, PYTHONPATH=path, TEST_DEVICE="cuda")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(TESTS/"parallel_training.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (tmp_path/"alone").mkdir()
    os.environ["TEST_DEVICE"] = "cuda"
    try:
        import parallel_training
        alone, together = parallel_training.everything(tmp_path/"alone"), load_file(tmp_path/"rank0.safetensors")
    finally:
        del os.environ["TEST_DEVICE"]
    for name in [n for n in alone if n.endswith(".loss")]:
        torch.testing.assert_close(together[name], alone[name].cpu(), atol=2e-3, rtol=2e-3)
