"""MEM, EM and UAP: the steps of noise and of triggers with slopes written out by hand, on two linear towers.

The joint search from left to right is compared with the search one by one in papers/test_mem; where triggers stand in a
caption, and that noise in bytes is the noise in floats, in attacks/test_protection.
"""
import numpy as np
import pytest
import torch

from mcl_repro.lab.profiles import load_profile
from mcl_repro.model.clip import build_clip, tokenize
from mcl_repro.papers import mem
from mcl_repro.papers.mem import (
    allowed_tokens, hotflip, noise_step, Search, surrogate_loss, trigger_gradient, trigger_losses, update_noise,
    word_candidates,
)
from mcl_repro.attacks.protection import with_triggers
from mcl_repro.attacks.semantic import MASKED
from mcl_repro.model.training import Batch
from plain_clip import (
    array, before_unit, caption_features, captions, CLOSE, contrastive, contrastive_slopes, linear_clip,
    picture_features, pictures, random_units, scale_of, STD, tensor, text_tower, unit, unit_rows,
)

METHODS = {name: load_profile("mini").mem.methods[name].search for name in ("EM", "UAP")}


@pytest.fixture
def clip():
    clip = linear_clip()
    clip.model.requires_grad_(False)
    return clip


def at_pixels(clip, shown, texts):
    "Derivative of InfoNCE after pixels in 0..255 of pictures [n, 3, s, s], for unit-length texts."
    z = picture_features(clip, shown)
    slope = before_unit(z, contrastive_slopes(unit(z), texts, scale_of(clip))[0]) @ array(clip.model.image).T
    return slope.reshape(shown.shape) / (255 * np.array(STD)[:, None, None])


def stepped(images, noise, slope, step, bound, sign):
    "Eq. 5 in whole numbers of 1/255: a step along the sign, back into the bound, back into what pictures can be."
    moved = np.clip(noise + sign * step * np.sign(slope), -bound, bound)
    return np.clip(images + moved, 0, 255) - images


def certain(slope):
    "Where float32 cannot get the sign wrong."
    return np.abs(slope) > 1e-4 * np.abs(slope).max()


# ---- noise

@pytest.mark.parametrize("direction, sign", [("minimise", -1), ("maximise", 1)])
@pytest.mark.parametrize("step, bound", [(1, 8), (3, 8), (2, 5)])
def test_a_step_of_noise(clip, direction, sign, step, bound):
    images, texts = pictures(10), random_units(10, 6, 5)
    noise = np.random.default_rng(2).integers(-bound, bound + 1, images.shape)
    noise = np.clip(images.numpy() + noise, 0, 255) - images.numpy()
    search = Search(bound=bound, step=step, direction=direction)
    found = noise_step(clip, images, torch.from_numpy(noise).float(), tensor(texts).float(), search).numpy()
    slope = at_pixels(clip, images.numpy() + noise, texts)
    expected, sure = stepped(images.numpy().astype(int), noise, slope, step, bound, sign), certain(slope)
    assert sure.mean() > .99 and (found == expected)[sure].all()
    assert np.abs(expected).max() == bound and (np.abs(expected - noise) < step).any()      # both ends were met
    assert (found == found.round()).all()                                                  # n/255 for whole n


def test_em_goes_down_and_uap_up(clip):
    "As profile mini has them: from no noise they move opposite ways, where pictures let them."
    images, tokens = pictures(10), captions(10)
    nothing, none = torch.zeros(images.shape, dtype=torch.int8), torch.zeros(10, 0, dtype=torch.long)
    down, up = (update_noise(clip, images, nothing, tokens, none, Search(**{**METHODS[name], "noise_steps": 1})).numpy()
                for name in ("EM", "UAP"))
    slope = at_pixels(clip, images.numpy(), unit(caption_features(clip, tokens)))
    inside = (images.numpy() > 0) & (images.numpy() < 255) & certain(slope)
    assert (down == -np.sign(slope))[inside].all() and (up == np.sign(slope))[inside].all()


@pytest.mark.parametrize("shuffle", ["none", "captions", "throughout"])
def test_the_noise_of_a_round(clip, shuffle):
    """Four steps by hand. With `captions`, at every step another order S(T) of the captions, and every trigger stays
    with its picture; `throughout` (ours) tries every noise on another picture, too.
    """
    images, tokens = pictures(10), captions(10, context=7, high=5)
    triggers = torch.from_numpy(np.random.default_rng(4).integers(1, 38, (10, 3)))
    start = torch.from_numpy(np.random.default_rng(2).integers(-3, 4, images.shape).astype(np.int8))
    start = ((images.short() + start).clamp(0, 255) - images.short()).to(torch.int8)
    padded = torch.cat([tokens, torch.zeros(10, 3, dtype=torch.long)], 1)
    search, tried = Search(shuffle=shuffle, noise_steps=4, length=3), []
    inner = clip.model.encode_image
    clip.model.encode_image = lambda x: tried.append(x.detach()) or inner(x)
    found = update_noise(clip, images, start, padded, triggers, search, seed=6)
    heard = clip.model.heard * 4 if shuffle == "none" else clip.model.heard
    assert len(tried) == len(heard) == 4
    noise, sure, orders = start.numpy().astype(int), np.ones(images.shape, bool), set()
    for pixels, said in zip(tried, heard):
        assert torch.equal(said[:, 1:4], triggers)                                  # they stay
        others = [tuple(row) for row in torch.cat([said[:, :1], said[:, 4:]], 1).tolist()]
        assert sorted(others) == sorted(map(tuple, tokens.tolist()))
        orders.add(tuple(others))
        shown = array(pixels) * (255 * np.array(STD)[:, None, None]) + 255 * np.array([.5, .4, .3])[:, None, None]
        behind = (shown.round() - noise).astype(int)                                # which pictures carry the noise
        assert sorted(behind.reshape(10, -1).tolist()) == sorted(images.reshape(10, -1).tolist())
        assert (behind == images.numpy()).all() == (shuffle != "throughout")
        slope = at_pixels(clip, behind + noise, unit(caption_features(clip, said)))
        noise, sure = stepped(images.numpy().astype(int), noise, slope, 1, 8, -1), sure & certain(slope)
    assert len(orders) == (1 if shuffle == "none" else 4)
    assert sure.mean() > .98 and (found.numpy() == noise)[sure].all()


# ---- triggers

def test_the_surrogate_learns_pictures_with_noise_and_captions_with_triggers(clip):
    clip.model.requires_grad_(True)
    images, triggers = pictures(8), torch.from_numpy(np.random.default_rng(4).integers(1, 38, (8, 2)))
    tokens = captions(8)
    loss = surrogate_loss(Search(), 4, False, 0)(clip, Batch(images, with_triggers(tokens, triggers), None, 0))
    said = []
    for row, trigger in zip(tokens.tolist(), triggers.tolist()):
        said.append([row[0], *trigger, *row[1:-2]])
    u, v = unit(picture_features(clip, images)), unit(caption_features(clip, said))
    assert loss.item() == pytest.approx(contrastive(u, v, scale_of(clip)), abs=1e-5)
    options = torch.stack([triggers, triggers.flip(0), triggers.flip(1)])
    found = trigger_losses(clip, tokens, options, tensor(u).float(), at_once=8)
    for option, value in zip(options, found):
        v = unit(caption_features(clip, with_triggers(tokens, option)))
        assert value.item() == pytest.approx(contrastive(u, v, scale_of(clip)), abs=1e-5)


def test_the_slope_at_triggers_of_a_linear_tower(clip):
    tokens, u = captions(8), random_units(8, 6, 1)
    z = caption_features(clip, tokens)
    at_z = before_unit(z, contrastive_slopes(u, unit(z), scale_of(clip))[1])
    expected = array(clip.model.places)[None, 1:4, None] * (at_z @ array(clip.model.text).T)[:, None]
    np.testing.assert_allclose(trigger_gradient(clip, tokens, tensor(u).float(), 3), expected, **CLOSE)


def test_the_slope_at_triggers_of_open_clips_tower():
    "Against the difference of two losses, for steps of the embeddings into random directions."
    clip = build_clip("smoke-RN", seed=2)
    model = clip.model.double().eval()
    tokens = tokenize(clip, ["a red cup", "two old horses", "a cat on a mat", "snow"])[0]
    u = tensor(random_units(4, model.text_projection.shape[1], 0))
    found = trigger_gradient(clip, tokens, u, 2)
    whole, end, s = model.token_embedding(tokens).detach(), tokens.argmax(1), model.logit_scale.exp().item()
    def loss(embeddings):
        with torch.no_grad():
            return contrastive(u.numpy(), unit_rows(text_tower(model, embeddings, end)).numpy(), s)
    for seed in range(5):
        way = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        step = torch.zeros_like(whole)
        step[:, 1:3] = 1e-6 * way
        change = (loss(whole + step) - loss(whole - step)) / 2e-6
        assert change == pytest.approx((found * way).sum().item(), abs=1e-5) and abs(change) > 1e-3


def test_hotflip_takes_the_swaps_that_promise_most(clip):
    "The k smallest of (e' - e_i) . g over the tokens that are allowed, for every place of every trigger."
    rng, table = np.random.default_rng(0), array(clip.model.token_embedding.weight)
    gradient, now = rng.normal(size=(6, 3, 5)), rng.integers(0, 40, (6, 3))
    allowed = rng.choice(40, 25, replace=False)
    found = hotflip(tensor(gradient).float(), clip.model.token_embedding.weight, torch.from_numpy(allowed), 4)
    for b in range(6):
        for place in range(3):
            promised = {e: float((table[e] - table[now[b, place]]) @ gradient[b, place]) for e in allowed}
            assert found[b, place].tolist() == sorted(promised, key=promised.get)[:4]


def test_words_that_are_proposed_are_ranked_alike(clip, monkeypatch):
    "The best three of five, for a place whose right side the language model does not see yet (MEM with BERT)."
    rng, table, seen = np.random.default_rng(0), array(clip.model.token_embedding.weight), []
    gradient, now = rng.normal(size=(6, 3, 5)), rng.integers(0, 40, (6, 3))
    words = np.stack([rng.choice(40, 5, replace=False) for _ in range(6)])
    monkeypatch.setattr(mem, "semantic_candidates", lambda *given: seen.append(given[3]) or words)
    search = Search(candidates=3, word_candidates=5)
    propose = word_candidates(tensor(gradient), tensor(table), None, None, [""] * 6, search)
    found = propose(1, torch.from_numpy(now))
    assert (seen[0][:, 0] == now[:, 0]).all() and (seen[0][:, 1:] == MASKED).all()
    for b in range(6):
        promised = {e: float((table[e] - table[now[b, 1]]) @ gradient[b, 1]) for e in words[b]}
        assert found[b].tolist() == sorted(promised, key=promised.get)[:3]


def test_a_trigger_may_be_any_token_but_start_end_and_padding():
    clip = build_clip("smoke-RN")
    assert allowed_tokens(clip.tokenizer, Search()).tolist() == [i for i in range(49408) if i not in (0, 49406, 49407)]
