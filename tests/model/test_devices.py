"""Several processes, split batches and precision must not change what is computed."""
import os, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import parallel_training
from mcl_repro.model import devices, training
from mcl_repro.papers import baselines, cleanclip, ubt
from mcl_repro.model.clip import build_clip
from mcl_repro.data.registry import open_data
from mcl_repro.model.devices import deterministic, gather_rows, half_precision, in_parts, own_share, tf32_as, towers_in
from mcl_repro.core.errors import SettingsError
from mcl_repro.model.training import embed_batch, read_batch, Recipe, train, training_set

PROGRAM = Path(parallel_training.__file__)


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    "What two gloo processes computed together, and one alone."
    folder, alone = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    path = os.pathsep.join([str(PROGRAM.parent.parent), str(PROGRAM.parent)])
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=path)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(PROGRAM), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [load_file(folder/f"rank{r}.safetensors") for r in (0, 1)], parallel_training.everything(alone)
    finally:
        torch.set_num_threads(threads)


def test_two_processes_compute_what_one_computes(computed):
    (first, second), alone = computed
    assert set(first) == set(second) == set(alone)
    kinds = {k.partition(".")[0] for k in alone}
    assert kinds == {"small-ViT", "smoke-RN", "trained"}
    kind = lambda name: ".".join(name.split(".")[:2])   # model and loss
    largest = {}
    for name, expected in alone.items():
        largest[kind(name)] = max(largest.get(kind(name), 0), float(expected.abs().max()))
    for name in [n for n in alone if not n.startswith("trained.")]:
        # some gradients are nothing but rounding, such as that of the bias of attention's keys
        size = max(float(alone[name].abs().max()), 1e-3 * largest[kind(name)])
        error = (first[name] - alone[name]).abs().max() / size
        assert error < 1e-5, f"{name}: {error:.1e}"
    scales = [float(v.abs().max()) for k, v in alone.items() if k.endswith("logit_scale")]
    assert max(scales) > 1e-3, "a gradient that is nothing proves nothing"


def test_two_processes_train_one_model(computed):
    "Both hold the same weights to the bit, near to those of one process: through Adam's division rounding grows."
    (first, second), alone = computed
    for name in [n for n in alone if n.startswith("trained.")]:
        assert torch.equal(first[name], second[name]), name
    torch.testing.assert_close(first["trained.loss"], alone["trained.loss"], atol=1e-4, rtol=1e-4)
    start = dict(build_clip("small-ViT", seed=2).model.named_parameters())
    def distance(a, b):
        return sum(float((a(n) - b(n)).abs().sum()) for n in start)
    trained, together = (lambda n: alone[f"trained.{n}"]), (lambda n: first[f"trained.{n}"])
    assert distance(together, trained) < 2e-3 * distance(trained, lambda n: start[n].detach())
    torch.testing.assert_close(first["trained.embeddings"], alone["trained.embeddings"], atol=2e-3, rtol=0)


def after_a_step(name, **kw):
    "Loss and gradients of one step of a training with one of the losses."
    clip, pairs = build_clip("small-ViT", seed=1), open_data("world:train:40")
    loss = parallel_training.losses(clip, pairs)[name]
    recipe = Recipe(epochs=1, batch_size=40, learning_rate=1e-6, **kw)
    history = train(clip, training_set(clip, pairs), recipe, loss=loss)
    return history[0]["loss"], {n: p.grad.to_dense() for n, p in clip.model.named_parameters() if p.grad is not None}


def names():
    clip = build_clip("small-ViT")
    return list(parallel_training.losses(clip, open_data("world:train:40")))


def test_a_split_batch_has_the_loss_and_the_gradient_of_the_whole():
    for name in names():
        loss, whole = after_a_step(name)
        largest = max(float(g.abs().max()) for g in whole.values())
        again, split = after_a_step(name, micro_batch=7)
        assert again == pytest.approx(loss, abs=1e-5) and set(split) == set(whole)
        for n, g in whole.items():
            assert (split[n] - g).abs().max() <= 1e-5 * max(float(g.abs().max()), 1e-3 * largest), (name, n)


def test_sixteen_bits_are_for_the_towers_only(monkeypatch):
    """As on a GPU: an augmentation or a product of embeddings in 16 bits would be another one.

    RoCLIP's does not even run in them.
    """
    monkeypatch.setattr(devices, "half_precision", lambda *_: torch.bfloat16)
    clip, pairs = build_clip("small-ViT", seed=1), open_data("world:train:40")
    data, towers, between = training_set(clip, pairs), set(), set()
    clip.model.visual.register_forward_hook(lambda module, given, found: towers.add(found.dtype))
    def watched(*args):
        found = embed_batch(*args)
        between.add((found[0].dtype, found[1].dtype, torch.is_autocast_enabled("cpu")))
        return found
    for module in (baselines, cleanclip, training, ubt):
        monkeypatch.setattr(module, "embed_batch", watched)
    for name, loss in parallel_training.losses(clip, pairs).items():
        between.clear()
        towers.clear()
        train(clip, data, Recipe(epochs=1, batch_size=40, learning_rate=1e-6), loss=loss)
        assert towers == {torch.bfloat16} and between == {(torch.float32, torch.float32, False)}, name


def test_the_head_of_a_classifier_is_trained_in_parts_and_precision_of_the_recipe(monkeypatch):
    clip, pairs = build_clip("small-ViT", seed=1), open_data("world:train:40")
    cleanclip.attach_head(clip, 5)
    data, sizes, loss = training_set(clip, pairs), [], cleanclip.supervised_loss(torch.arange(40) % 5)
    clip.model.visual.register_forward_hook(lambda m, x, y: sizes.append((len(x[0]), y.dtype)))
    batch = read_batch(data, torch.arange(40), "cpu")
    whole = loss(clip, batch).item()
    with in_parts(16):
        assert loss(clip, batch).item() == pytest.approx(whole, abs=1e-6)
    with in_parts(None, lambda: torch.autocast("cpu", torch.bfloat16)):
        assert loss(clip, batch).dtype == torch.float32
    in_float32 = [(rows, torch.float32) for rows in (40, 16, 16, 8)]
    assert sizes == [*in_float32, (40, torch.bfloat16)]


def test_a_split_batch_trains_a_resnet_with_frozen_batchnorm_alike():
    pairs = open_data("world:train:32")
    def weights(**kw):
        clip = build_clip("smoke-RN", seed=1)
        recipe = Recipe(epochs=1, batch_size=32, learning_rate=1e-5, frozen_batchnorm=True, **kw)
        train(clip, training_set(clip, pairs), recipe)
        return torch.cat([v.flatten().float() for v in clip.model.state_dict().values()])
    torch.testing.assert_close(weights(micro_batch=8), weights(), atol=3e-5, rtol=1e-4)
    with pytest.raises(SettingsError, match="micro_batch 8: BatchNorm"):
        clip = build_clip("smoke-RN")
        train(clip, training_set(clip, pairs), Recipe(epochs=1, batch_size=32, learning_rate=1e-5, micro_batch=8))


def test_lazy_reading_in_processes_gives_the_same_batches():
    "The loader processes of a training that is alone read everything; the share of others is asked for by rank."
    clip, pairs = build_clip("smoke-RN"), open_data("world:train:30")
    resident, lazy = training_set(clip, pairs), training_set(clip, pairs, memory_limit=0)
    rows = torch.arange(20)
    from mcl_repro.model.training import _LazyBatches
    whole = _LazyBatches(lazy, rows.view(1, 20))
    parts = []
    for rank in range(3):
        whole.place = rank, 3
        parts.append(whole[0][0])
    assert [len(p) for p in parts] == [6, 7, 7]
    assert torch.equal(torch.cat(parts), read_batch(resident, rows, "cpu").images)


def test_shares_cover_every_row_once():
    for count in range(1, 40):
        for size in range(1, 9):
            rows = [i for r in range(size) for i in range(count)[own_share(count, r, size)]]
            assert rows == list(range(count))
    x = torch.ones(3)
    assert gather_rows(x, 3) is x


@pytest.mark.parametrize("precision, says", [
    ("bf16", "unknown precision"),
    ("amp", "needs a GPU"),
    ("tf32", "needs a GPU"),
])
def test_precisions_that_a_cpu_does_not_have(precision, says):
    with pytest.raises(SettingsError, match=says):
        half_precision(precision, "cpu")


def test_switches_are_put_back():
    before = torch.backends.cudnn.allow_tf32, torch.are_deterministic_algorithms_enabled()
    with deterministic(), tf32_as("auto", "cpu"), towers_in("auto", "cpu"):
        assert torch.are_deterministic_algorithms_enabled() and not torch.is_autocast_enabled("cpu")
    assert (torch.backends.cudnn.allow_tf32, torch.are_deterministic_algorithms_enabled()) == before


COMPILED = Recipe(epochs=1, batch_size=8, learning_rate=1e-4, compiled=True)


def test_compiled_towers_keep_their_weights_names(monkeypatch):
    "Compiling is asked for and taken back; the compiler itself is torch's."
    clip, asked = build_clip("smoke-RN"), []
    monkeypatch.setattr(torch, "__file__", "/usr/torch/__init__.py")   # wherever this one lies
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: asked.append(kw))
    names = list(clip.model.state_dict())
    train(clip, training_set(clip, open_data("world:train:16")), COMPILED)
    assert asked == [{}, dict(dynamic=True)]
    assert list(clip.model.state_dict()) == names


def test_torchs_compiler_cannot_link_from_a_folder_with_a_space(monkeypatch):
    clip = build_clip("smoke-RN")
    monkeypatch.setattr(torch, "__file__", "/my models/torch/__init__.py")
    with pytest.raises(SettingsError, match="torch is installed in /my models/torch, .* leave compiled out"):
        train(clip, training_set(clip, open_data("world:train:16")), COMPILED)
    training._check_compiler(SimpleNamespace(type="cuda"))
