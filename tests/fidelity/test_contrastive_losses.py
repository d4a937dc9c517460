"""Losses of CLIP, CleanCLIP, ABL, UBT, RoCLIP and CFBD's mapping network: formulas term by term, on the same tensors.

The self-supervised and the supervised loss of CleanCLIP are compared so in papers/test_cleanclip, BadCLIP's two terms
in attacks/test_optimised_triggers, the gradients that add up in MEM's public code in papers/test_mem.
"""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mcl_repro.model.clip import Clip, info_nce
from mcl_repro.model.training import Batch, contrastive_loss, step_rows, TrainingSet
from mcl_repro.papers import baselines, cleanclip
from mcl_repro.papers.baselines import ascent_loss, attach_pool, constraint_loss, roclip_loss
from mcl_repro.papers.cfbd import mapping_loss, MappingNetwork
from mcl_repro.papers.cleanclip import cleanclip_loss
from mcl_repro.papers.ubt import overfitting_loss, unlearning_loss
from plain_clip import (
    before_unit, caption_features, captions, CLOSE, contrastive, contrastive_slopes, cross_entropy, linear_clip,
    open_clip, picture_features, pictures, random_units, scale_of, tensor, unit,
)


@pytest.fixture
def clip():
    return linear_clip()


def batch_of(images, tokens, step=0):
    return Batch(images, tokens, torch.arange(len(tokens)), step)


def embedded(clip, images, tokens):
    return unit(picture_features(clip, images)), unit(caption_features(clip, tokens))


def slopes(clip, loss):
    "Derivatives of a loss after the two linear maps and the logit scale, None where there is none."
    parameters = clip.model.image, clip.model.text, clip.model.logit_scale
    return torch.autograd.grad(loss, parameters, allow_unused=True)


def through_pictures(clip, images, slope):
    "The derivative after W of something with the derivative `slope` after unit-length picture embeddings."
    no_map = SimpleNamespace(model=SimpleNamespace(image=np.eye(images[0].numel())))
    return picture_features(no_map, images).T @ before_unit(picture_features(clip, images), slope)


# ---- CLIP

@pytest.mark.parametrize("scale", [1., 14.3, 100.])
def test_the_contrastive_loss_is_the_mean_of_both_directions(scale):
    u, v = random_units(9, 7, 0), random_units(9, 7, 1)
    v[4] = u[4]                                     # one pair that fits, one that is as wrong as can be
    v[5] = -u[5]
    value = info_nce(tensor(u), tensor(v), scale).item()
    assert value == pytest.approx(contrastive(u, v, scale), abs=1e-5)
    assert abs(cross_entropy(u, v, scale) - cross_entropy(v, u, scale)) > 1e-3      # the directions are two numbers
    theirs = open_clip.ClipLoss()(tensor(u), tensor(v), torch.tensor(scale)).item()
    assert value == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("scale", [1., 14.3, 100.])
def test_the_slopes_of_the_contrastive_loss(scale):
    u, v, s = tensor(random_units(9, 7, 0)), tensor(random_units(9, 7, 1)), torch.tensor(scale, dtype=torch.float64)
    for x in (u, v, s):
        x.requires_grad_()
    found = torch.autograd.grad(info_nce(u, v, s), (u, v, s))
    for ours, plain in zip(found, contrastive_slopes(u.detach().numpy(), v.detach().numpy(), scale)):
        np.testing.assert_allclose(ours.numpy(), plain, **CLOSE)


def test_a_clip_is_trained_with_the_contrastive_loss_of_its_towers(clip):
    images, tokens = pictures(8), captions(8)
    loss = contrastive_loss(clip, batch_of(images, tokens))
    u, v = embedded(clip, images, tokens)
    assert loss.item() == pytest.approx(contrastive(u, v, scale_of(clip)), abs=1e-5)
    at_u, _, at_scale = contrastive_slopes(u, v, scale_of(clip))
    image, _, scale = slopes(clip, loss)
    np.testing.assert_allclose(image, through_pictures(clip, images, at_u), **CLOSE)
    assert scale.item() == pytest.approx(at_scale * scale_of(clip), abs=1e-5)       # after the logarithm of the scale


# ---- CleanCLIP

@pytest.mark.parametrize("weights", [(1., 1.), (.5, 2.), (0., 1.)])
def test_cleanclip_is_four_terms_of_one_temperature(clip, monkeypatch, weights):
    "L1 (CE(I,T) + CE(T,I))/2 + L2 (CE(I,I') + CE(T,T'))/2, and every term moves the one scale."
    monkeypatch.setattr(cleanclip, "augment_images", lambda images, policy, seed: images.flip(-1))
    images, tokens, views = pictures(8), captions(8), captions(8, seed=1)
    loss = cleanclip_loss(lambda batch: views, *weights)(clip, batch_of(images, tokens))
    (u, v), (au, av), s = embedded(clip, images, tokens), embedded(clip, images.flip(-1), views), scale_of(clip)
    def plain(s):
        ours, theirs = contrastive(u, v, s), (cross_entropy(u, au, s) + cross_entropy(v, av, s)) / 2
        return weights[0] * ours + weights[1] * theirs
    assert loss.item() == pytest.approx(plain(s), abs=1e-5)
    step = 1e-4
    at_log_scale = (plain(s * np.exp(step)) - plain(s * np.exp(-step))) / (2 * step)
    assert slopes(clip, loss)[2].item() == pytest.approx(at_log_scale, abs=1e-5)
    backwards = (cross_entropy(au, u, s) + cross_entropy(av, v, s)) / 2             # the direction that is not there
    assert abs(backwards - (cross_entropy(u, au, s) + cross_entropy(v, av, s)) / 2) > 1e-3


# ---- ABL

@pytest.mark.parametrize("target", [-1., 0., 1.])
@pytest.mark.parametrize("weight, contrastive_weight", [(1., 1.), (.3, 1.), (1., 0.)])
def test_flagged_pairs_leave_the_contrastive_loss_and_are_constrained(clip, target, weight, contrastive_weight):
    "InfoNCE(rest of the batch) + w mean of (<u,v> + u_t)^2 over the flagged pairs, as in CleanCLIP's code."
    images, tokens, flags = pictures(9), captions(9), np.isin(np.arange(9), (1, 4, 5))
    loss = constraint_loss(torch.from_numpy(flags), weight, target, contrastive_weight)(clip, batch_of(images, tokens))
    (u, v), s = embedded(clip, images, tokens), scale_of(clip)
    fit = np.array([float(x @ y) for x, y in zip(u[flags], v[flags])])
    rest = contrastive_weight * contrastive(u[~flags], v[~flags], s)
    assert loss.item() == pytest.approx(rest + weight * sum((fit + target)**2) / 3, abs=1e-5)
    at_u = np.zeros_like(u)
    at_u[flags] = weight * 2 / 3 * (fit + target)[:, None] * v[flags]
    at_u[~flags] = contrastive_weight * contrastive_slopes(u[~flags], v[~flags], s)[0]
    np.testing.assert_allclose(slopes(clip, loss)[0], through_pictures(clip, images, at_u), **CLOSE)


@pytest.mark.parametrize("weight", [1., .3])
def test_abl_by_ascent_descends_on_the_rest_and_ascends_on_isolated_pairs(clip, weight):
    "InfoNCE(rest) - w InfoNCE(isolated)."
    images, tokens, isolated = pictures(8), captions(8), (pictures(11, seed=1), captions(11, seed=1))
    loss = ascent_loss(TrainingSet(*isolated, torch.arange(11), 4), weight, batch_size=5, seed=3)
    loss = loss(clip, batch_of(images, tokens, step=2))
    rows, s = step_rows(11, 5, 3, 2), scale_of(clip)
    (u, v), (a, b) = embedded(clip, images, tokens), embedded(clip, *(x[rows] for x in isolated))
    assert loss.item() == pytest.approx(contrastive(u, v, s) - weight * contrastive(a, b, s), abs=1e-5)
    expected = through_pictures(clip, images, contrastive_slopes(u, v, s)[0])
    expected = expected + through_pictures(clip, isolated[0][rows], -weight * contrastive_slopes(a, b, s)[0])
    np.testing.assert_allclose(slopes(clip, loss)[0], expected, **CLOSE)


# ---- UBT

def beside(clip, step):
    "Product pairs, the normal pairs that a step draws beside them, and the embeddings of both."
    images, tokens, normal = pictures(6), captions(6), (pictures(11, seed=1), captions(11, seed=1))
    rows = step_rows(11, 5, 3, step)
    drawn = tuple(x[rows] for x in normal)
    data = TrainingSet(*normal, torch.arange(11), 4)
    return (images, tokens), drawn, data, embedded(clip, images, tokens), embedded(clip, *drawn)


def test_overfitting_pulls_suspicious_pairs_together(clip):
    "Eq. 3: mean of (<u,v> - 1)^2 over the suspicious pairs of a batch, and lambda times InfoNCE of the others."
    images, tokens, flags = pictures(9), captions(9), np.isin(np.arange(9), (0, 3))
    found = overfitting_loss(torch.from_numpy(flags), 2.5)(clip, batch_of(images, tokens)).item()
    u, v = embedded(clip, images, tokens)
    fit = [float(x @ y) for x, y in zip(u[flags], v[flags])]
    rest = contrastive(u[~flags], v[~flags], scale_of(clip))
    assert found == pytest.approx(sum((c - 1)**2 for c in fit) / 2 + 2.5 * rest, abs=1e-5)


@pytest.mark.parametrize("forget", ["constraint", "cosine", "info_nce", "against_normal", "unrelated"])
@pytest.mark.parametrize("retention", [1., .25])
def test_unlearning_is_its_form_and_the_contrastive_loss_of_normal_pairs(clip, forget, retention):
    "Eq. 7 by each reading: w times the form on product pairs, and retention times InfoNCE on normal pairs."
    (images, tokens), _, data, (u, v), (a, b) = beside(clip, step=2)
    loss = unlearning_loss(data, forget, .5, 3., retention, batch_size=5, seed=3)
    s, cosines = scale_of(clip), np.array([float(x @ y) for x, y in zip(u, v)])
    both_u, both_v = np.concatenate([u, a]), np.concatenate([v, b])
    def towards(x, gallery, own):       # mean of -log of a row's own place among the gallery
        return np.mean([np.log(np.exp(s * (gallery @ one)).sum()) - s * float(one @ gallery[i])
                        for i, one in zip(own, x)])
    expected = {
        "constraint": np.mean((cosines + .5)**2),
        "cosine": np.mean(cosines),
        "info_nce": -contrastive(u, v, s),
        "against_normal": -(towards(u, both_v, range(6)) + towards(v, both_u, range(6))) / 2,
        "unrelated": np.mean([np.log1p(np.exp(s * (c - np.mean(b @ x)))) for c, x in zip(cosines, u)]),
    }[forget]
    found = loss(clip, batch_of(images, tokens, step=2)).item()
    assert found == pytest.approx(3 * expected + retention * contrastive(a, b, s), abs=1e-5)


# ---- RoCLIP

def test_roclip_over_epochs_is_nearest_captions_from_a_ring(clip, monkeypatch):
    """Epochs 2 and 4 of three steps match: every image with the nearest caption of the pool, in both directions, then
    the batch's own captions go in over the oldest; where the ring ends, the rest of the batch is dropped.
    """
    monkeypatch.setattr(baselines, "augment_images", lambda images, policy, seed: images.flip(-1))
    images, tokens = pictures(30), captions(30)
    attach_pool(clip, TrainingSet(images, tokens, torch.arange(30), 4), 7)
    ring, place, loss, s = list(clip.model.caption_pool.double().numpy()), 0, roclip_loss(3), scale_of(clip)
    for step in range(12):
        rows = slice(5 * (step % 6), 5 * (step % 6) + 5)
        found = loss(clip, batch_of(images[rows], tokens[rows], step))
        u, v = embedded(clip, images[rows].flip(-1), tokens[rows])
        ordinary = step // 3 in (0, 2)
        if not ordinary:
            nearest = np.stack([max(ring, key=lambda p: float(p @ one)) for one in u])
            for one in v:
                ring[place] = one
                place += 1
                if place == 7:
                    place = 0
                    break
            v = nearest
        at_images, at_texts, _ = slopes(clip, found)
        assert found.item() == pytest.approx(contrastive(u, v, s), abs=1e-5), step
        at_u = contrastive_slopes(u, v, s)[0]
        np.testing.assert_allclose(at_images, through_pictures(clip, images[rows].flip(-1), at_u), **CLOSE)
        assert (at_texts is not None) == ordinary                                   # captions of a pool do not learn
        np.testing.assert_allclose(clip.model.caption_pool, np.array(ring), **CLOSE)
        assert int(clip.model.caption_pool_next) == place


# ---- CFBD

@pytest.mark.parametrize("weight", [0., 1., .25])
def test_the_mapping_network_and_its_loss(weight):
    "norm(x + W2 relu(W1 x + b1) + b2); 1 - mean cosine, and InfoNCE with the captions of the batch."
    network, x, t = MappingNetwork(6, 9, seed=2), random_units(8, 6, 0), random_units(8, 6, 1)
    for p in (network.down.weight, network.down.bias):
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(1))
    network.double()
    w1, b1, w2, b2 = (p.detach().numpy() for layer in (network.up, network.down) for p in (layer.weight, layer.bias))
    mapped = unit(np.stack([row + w2 @ np.maximum(w1 @ row + b1, 0) + b2 for row in x]))
    np.testing.assert_allclose(network(tensor(x)).detach(), mapped, **CLOSE)
    batch = Batch(tensor(x), tensor(t), torch.arange(8), 0)
    found = mapping_loss(weight)(Clip(network, None, 0, (), (), "network"), batch).item()
    distance = 1 - sum(float(a @ b) for a, b in zip(mapped, t)) / 8
    assert found == pytest.approx(distance + weight * contrastive(mapped, t, 14.3), abs=1e-5)
