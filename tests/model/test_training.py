"""Rows of a token table that no batch has used wait with their decay; what comes out is AdamW's result all the same."""
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from mcl_repro.data.registry import open_data
from mcl_repro.model import training
from mcl_repro.core.libraries import import_open_clip
from mcl_repro.model.clip import build_clip, token_table, zero_shot_weights
from mcl_repro.model.training import (
    Callback, is_spared, load_checkpoint, parameter_groups, Recipe, RowAdamW, save_checkpoint, train, training_set,
    TrainingState,
)

OPEN_CLIP = import_open_clip()
RECIPE = Recipe(epochs=3, batch_size=16, learning_rate=1e-3, warmup_steps=3, seed=1)
PAIRS = "world:train:64"


class EveryRow(torch.optim.AdamW):
    "torch's own, which computes all rows in every step."
    lazy = None

    def __init__(self, model, recipe):
        super().__init__(parameter_groups(model, recipe.weight_decay), lr=recipe.learning_rate,
                         betas=tuple(recipe.betas), eps=1e-8, fused=True)


class Rows(torch.nn.Module):
    "A token table and one more matrix, enough for an optimiser; gradients do not depend on weights."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.token_embedding, self.other = torch.nn.Embedding(50, 4), torch.nn.Parameter(torch.randn(4, 4))

    def forward(self, tokens):
        slope = torch.randn(4, 4, generator=torch.Generator().manual_seed(int(tokens.sum())))
        return (self.token_embedding(tokens) @ slope).sum() + (self.other * slope).sum()


def steps(optimizer_of, count, recipe=RECIPE, change=None):
    "Weights after some steps on tokens that come up late, early, or never."
    model, draw = Rows(), torch.Generator().manual_seed(5)
    optimizer = optimizer_of(model, recipe)
    for step in range(count):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (step + 1)
        optimizer.zero_grad()
        model(torch.randint(0, 5 + 2 * step, (3, 6), generator=draw)).backward()
        if change:
            change(step, model)
        optimizer.step()
    return model, optimizer


def test_used_rows_are_adamws_to_the_bit_and_the_others_have_decayed():
    recipe = replace(RECIPE, weight_decay=.3)
    (lazy, optimizer), (dense, _) = steps(RowAdamW, 15, recipe), steps(EveryRow, 15, recipe)
    start, used = Rows().token_embedding.weight, optimizer.lazy.memory["rows"]
    never = sorted({*range(50)} - {*used.tolist()})
    assert 10 < len(used) < 45 and never
    assert torch.equal(lazy.token_embedding.weight[never], start[never])     # nobody has read them
    optimizer.lazy.close()
    assert torch.equal(lazy.other, dense.other)
    found, expected = lazy.token_embedding.weight, dense.token_embedding.weight
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
    assert not torch.allclose(found[never], start[never], rtol=1e-2)
    assert (found[used] != expected[used]).float().mean() < .5     # only rows that came late have rounded otherwise


def test_a_row_is_up_to_date_when_it_is_looked_up_whoever_asks():
    recipe = replace(RECIPE, weight_decay=.3)
    (lazy, _), (dense, _) = steps(RowAdamW, 8, recipe), steps(EveryRow, 8, recipe)
    with torch.no_grad():
        torch.testing.assert_close(lazy.token_embedding(torch.arange(50)), dense.token_embedding.weight, rtol=2e-6,
                                   atol=0)


def test_a_gradient_of_all_rows_is_taken_too():
    "As the mean over processes is, and the gradient of a loss on the weights themselves."
    whole = lambda step, model: setattr(model.token_embedding.weight, "grad",
                                        model.token_embedding.weight.grad.to_dense())
    (one, first), (other, second) = steps(RowAdamW, 9), steps(RowAdamW, 9, change=whole)
    for optimizer in (first, second):
        optimizer.lazy.close()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


def test_a_step_without_captions_leaves_the_table_as_torch_does():
    def without(step, model):
        if step % 2:
            model.token_embedding.weight.grad = None
    (lazy, optimizer), (dense, _) = steps(RowAdamW, 9, change=without), steps(EveryRow, 9, change=without)
    optimizer.lazy.close()
    torch.testing.assert_close(lazy.token_embedding.weight, dense.token_embedding.weight, rtol=2e-6, atol=0)


def test_float16s_scaler_counts_the_table_in():
    def scaled(infinite):
        model = Rows()
        optimizer, scaler = RowAdamW(model, RECIPE), torch.amp.GradScaler("cpu", init_scale=1024.)
        scaler.scale(model(torch.tensor([[1, 2, 2]]))).backward()
        if infinite:
            model.token_embedding.weight.grad = model.token_embedding.weight.grad * float("inf")
        scaler.step(optimizer)
        scaler.update()
        optimizer.lazy.close()
        return model
    plain = Rows()
    optimizer = RowAdamW(plain, RECIPE)
    plain(torch.tensor([[1, 2, 2]])).backward()
    optimizer.step()
    optimizer.lazy.close()
    assert all(torch.equal(a, b) for a, b in zip(scaled(True).parameters(), Rows().parameters()))
    for a, b in zip(scaled(False).parameters(), plain.parameters()):
        torch.testing.assert_close(a, b)
    assert not torch.equal(plain.other, Rows().other)


# ---- in the loop

def trained(model="smoke-RN", callbacks=(), checkpoint=None, recipe=RECIPE, **kw):
    clip = build_clip(model, seed=2)
    data = training_set(clip, open_data(PAIRS))
    history = train(clip, data, recipe, callbacks=callbacks, checkpoint=checkpoint, **kw)
    return clip, [h["loss"] for h in history], data


def test_a_training_is_that_of_torchs_adamw(monkeypatch):
    clip, losses, data = trained()
    monkeypatch.setattr(training, "RowAdamW", EveryRow)
    dense, expected, _ = trained()
    assert losses == pytest.approx(expected, abs=1e-5)
    used = data.tokens.unique()
    never = torch.ones(len(token_table(clip.model).weight), dtype=torch.bool)
    never[used] = False
    found, other = (token_table(c.model).weight.detach() for c in (clip, dense))
    start = token_table(build_clip("smoke-RN", seed=2).model).weight.detach()
    torch.testing.assert_close(found[never], other[never], rtol=2e-6, atol=0)
    assert (found[used] - other[used]).norm() < 2e-3 * (other[used] - start[used]).norm()
    assert torch.equal(found[never], start[never] * clip.origin.factors[0]) and len(clip.origin.factors) == 1
    table, = (p for n, p in clip.model.named_parameters() if n == "token_embedding.weight")
    assert table is token_table(clip.model).weight and not token_table(clip.model).sparse


class Killed(Exception):
    pass


class KillAt(Callback):
    def __init__(self, step):
        self.step = step

    def after_step(self, state, loss):
        if state.step == self.step:
            raise Killed


def same(one, other):
    a, b = one.model.state_dict(), other.model.state_dict()
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.mark.parametrize("step", [3, 6, 11])
def test_a_killed_training_goes_on_to_the_same_bits(tmp_path, step):
    undisturbed, _, data = trained()
    with pytest.raises(Killed):
        trained(callbacks=[KillAt(step)], checkpoint=tmp_path/"c.safetensors")
    again, losses, _ = trained(checkpoint=tmp_path/"c.safetensors")
    assert same(again, undisturbed) and again.origin.factors == undisturbed.origin.factors and len(losses) == 3
    from safetensors.torch import load_file
    held = {k: len(v) for k, v in load_file(tmp_path/"c.safetensors").items() if k.endswith((".rows", ".exp_avg"))
            and v.ndim}
    rows = next(v for k, v in held.items() if k.endswith(".rows"))
    assert rows <= len(data.tokens.unique()) < 1000
    assert rows in [v for k, v in held.items() if k.endswith(".exp_avg")] and max(held.values()) < 1000


class Look(Callback):
    "Classifies in mid-epoch, with prompts whose tokens no caption has; sees the table with all its decay."
    def __init__(self):
        self.seen = []

    def after_step(self, state, loss):
        self.seen.append(zero_shot_weights(state.clip, ["cup", "sun"], ["a tattoo of a {}", "graffiti: {}"]))


def test_looking_on_changes_nothing_and_shows_what_torchs_adamw_has(monkeypatch):
    look, dense = Look(), Look()
    recipe = replace(RECIPE, weight_decay=20., learning_rate=1e-3)
    assert same(trained(callbacks=[look], recipe=recipe)[0], trained(recipe=recipe)[0])
    monkeypatch.setattr(training, "RowAdamW", EveryRow)
    trained(callbacks=[dense], recipe=recipe)
    assert len(look.seen) == len(dense.seen) == 12
    for found, expected in zip(look.seen, dense.seen):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_a_locked_text_tower_stays_as_it_is():
    clip = build_clip("smoke-RN", seed=2)
    token_table(clip.model).weight.requires_grad_(False)
    before = token_table(clip.model).weight.clone()
    train(clip, training_set(clip, open_data(PAIRS)), RECIPE)
    assert torch.equal(token_table(clip.model).weight, before) and clip.origin is None


def test_moments_of_all_rows_go_on_as_such(tmp_path, monkeypatch):
    "A restart point of a training whose optimiser computed all rows."
    with monkeypatch.context() as patch:
        patch.setattr(training, "RowAdamW", EveryRow)
        expected, _, _ = trained()
        with pytest.raises(Killed):
            trained(callbacks=[KillAt(6)], checkpoint=tmp_path/"c.safetensors")
    found, _, _ = trained(checkpoint=tmp_path/"c.safetensors")
    a, b = (token_table(c.model).weight for c in (found, expected))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert found.origin.factors == () or len(found.origin.factors) == 1


# ---- which weights decay

def parameters_of(name):
    "Names and parameters of an open_clip model, of which nothing but shapes is made."
    config = OPEN_CLIP.get_model_config(name)
    with torch.device("meta"):
        return list(OPEN_CLIP.CLIP(**config).named_parameters())


SHORTCUTS = [f"visual.layer{k}.0.downsample.1.weight" for k in (1, 2, 3, 4)]

@pytest.mark.parametrize("name, more", [
    ("RN50", SHORTCUTS), ("RN101", SHORTCUTS), ("ViT-B-32", ["visual.class_embedding"]),
])
def test_the_public_code_lets_some_vectors_decay_that_open_clip_spares(name, more):
    known = parameters_of(name)
    # the two rules in the words of their sources
    open_clips = {n for n, p in known if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n}
    cleanclips = {n for n, _ in known if not all(key not in n for key in ("bn", "ln", "bias", "logit_scale"))}
    assert {n for n, p in known if is_spared(n, p)} == open_clips
    assert {n for n, p in known if is_spared(n, p, "public_code")} == cleanclips
    assert sorted(open_clips - cleanclips) == more and cleanclips <= open_clips
    biases = {n for n, p in known if is_spared(n, p, "all_but_biases")}
    assert biases == {n for n, _ in known if "bias" in n} < cleanclips
    # positions are matrices and decay under every rule
    assert not any("positional_embedding" in n for n in open_clips)


def test_a_recipes_rule_reaches_the_optimiser():
    clip = build_clip("smoke-RN")
    names = {p: n for n, p in clip.model.named_parameters()}
    decayed = {}
    for decay in ("standard", "public_code", "all_but_biases"):
        groups = RowAdamW(build_clip("smoke-RN").model, replace(RECIPE, decay=decay)).param_groups
        assert [g["weight_decay"] for g in groups] == [.1, 0.]
        assert sum(len(g["params"]) for g in groups) == len(names)
        decayed[decay] = len(groups[0]["params"])
    assert decayed["standard"] < decayed["public_code"] < decayed["all_but_biases"]
    clip.model.visual.requires_grad_(False)
    assert not any(names[p].startswith("visual.") for g in parameter_groups(clip.model, .1) for p in g["params"])


def test_moments_find_their_weights_whatever_the_rule_of_decay(tmp_path):
    clip = build_clip("smoke-RN")
    data, recipe = training_set(clip, open_data("world:train:16")), replace(RECIPE, epochs=1)
    train(clip, data, recipe, checkpoint=tmp_path/"c.safetensors")
    def opened(decay):
        own = build_clip("smoke-RN", seed=5)
        state = TrainingState(own, RowAdamW(own.model, replace(recipe, decay=decay)), recipe, 1)
        assert load_checkpoint(state, tmp_path/"c.safetensors")
        return {n: state.optimizer.state[p]["exp_avg"] for n, p in own.model.named_parameters()}
    one, other = opened("standard"), opened("all_but_biases")
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    assert sum(v.abs().sum() > 0 for v in one.values()) > 20


def test_a_checkpoint_with_moments_of_other_weights_is_put_aside(tmp_path, capsys):
    clip = build_clip("smoke-RN")
    state = TrainingState(clip, RowAdamW(clip.model, RECIPE), RECIPE, 1)
    save_checkpoint(state, tmp_path/"c.safetensors")
    stored = load_file(tmp_path/"c.safetensors")
    stored["optimizer.visual.gone.exp_avg"] = torch.zeros(3)
    save_file(stored, tmp_path/"c.safetensors", metadata=dict(state="{}"))
    assert not load_checkpoint(state, tmp_path/"c.safetensors") and "of another model" in capsys.readouterr().out
    assert (tmp_path/"c.safetensors.damaged").exists()
