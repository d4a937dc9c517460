"""Relevance of tokens and patches, Grad-CAM, integrated gradients and masks: the rules of their papers, with towers
that are written out layer by layer and torch's autograd at the attention; captum as a second opinion.
"""
import numpy as np
import pytest
import torch

from mcl_repro.measures import attribution
from mcl_repro.model.clip import Clip, to_pixels
from plain_clip import (
    captions, CLOSE, image_tower, MEAN, open_clip, pictures, random_units, STD, tensor, text_tower, transformer_clip,
    unit_rows,
)

NO_CAPTUM = "captum is not installed: pip install -c constraints.txt -e '.[dev]'"


def chefer(seen, score, start, row):
    "R <- R + mean over heads of (grad * A)+ R from block `start` on, R = I at first; a row of R, as a share."
    R = torch.eye(seen[0].shape[-1], dtype=seen[0].dtype)
    for A, slope in list(zip(seen, torch.autograd.grad(score, seen)))[start:]:
        positive = torch.where(slope * A > 0, slope * A, 0.)[0].mean(0)
        R = R + positive @ R
    return R[row].detach()


def share(r):
    return r / r.sum() if r.sum() > 0 else torch.full_like(r, 1 / len(r))


# ---- Chefer et al.

@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("start", [-1, -2, 0])
def test_relevance_of_tokens_is_the_row_of_the_end_token(start, quick):
    clip, ids, u = transformer_clip(quick_gelu=quick), captions(9), tensor(random_units(9, 24, 1))
    clip.model.double()
    found = attribution.token_relevance(clip, ids, u, start, batch_size=4)
    for i, row in enumerate(ids):
        seen, end = [], int(row.argmax())
        z = text_tower(clip.model, clip.model.token_embedding(row[None]), torch.tensor([end]), seen, quick)
        score = clip.model.logit_scale.exp() * (unit_rows(z)[0] @ u[i])
        expected = torch.zeros(len(row), dtype=torch.float64)
        expected[1:end] = share(chefer(seen, score, start, end)[1:end])
        np.testing.assert_allclose(found[i], expected, **CLOSE)
    assert found.std() > .05


@pytest.mark.parametrize("start", [-1, -2, 0])
def test_relevance_of_patches_is_the_row_of_the_class_token(start):
    clip, images, v = transformer_clip(), pictures(5, 32), tensor(random_units(5, 24, 1))
    found = attribution.patch_relevance(clip, images, v.float(), start, batch_size=2).flatten(1)
    pixels = to_pixels(clip, images).double()
    visual = clip.model.double().visual
    for i in range(5):
        seen = []
        score = clip.model.logit_scale.exp() * (unit_rows(image_tower(visual, pixels[i:i + 1], seen))[0] @ v[i])
        np.testing.assert_allclose(found[i], share(chefer(seen, score, start, 0)[1:]), **CLOSE)
    assert found.std() > .01


def test_the_towers_that_are_written_out_are_open_clips():
    "Else the two tests above would compare with something else."
    clip, ids = transformer_clip(), captions(9)
    clip.model.double()
    pixels = to_pixels(clip, pictures(5, 32)).double()
    with torch.no_grad():
        text = text_tower(clip.model, clip.model.token_embedding(ids), ids.argmax(1))
        np.testing.assert_allclose(text, clip.model.encode_text(ids), **CLOSE)
        np.testing.assert_allclose(image_tower(clip.model.visual, pixels), clip.model.encode_image(pixels), **CLOSE)


# ---- Grad-CAM

def resnet_clip():
    torch.manual_seed(3)
    vision = open_clip.CLIPVisionCfg(image_size=64, layers=[1, 1, 1, 1], width=8)
    text = open_clip.CLIPTextCfg(context_length=10, vocab_size=40, width=32, heads=4, layers=1)
    model = open_clip.CLIP(24, vision, text)
    for p in model.parameters():
        p.data += .05 * torch.randn(p.shape)
    return Clip(model.eval(), None, 64, MEAN, STD, "small")


@pytest.mark.parametrize("layer", ["layer1", "layer2", "layer3", "layer4"])
def test_grad_cam_is_captums(layer):
    attr = pytest.importorskip("captum.attr", reason=NO_CAPTUM)
    clip, images, v = resnet_clip(), pictures(6, 64), tensor(random_units(6, 24, 1)).float()
    found = attribution.grad_cam(clip, images, v, layer, batch_size=4)
    cosine = lambda pixels: (unit_rows(clip.model.encode_image(pixels)) * v).sum(1)
    theirs = attr.LayerGradCam(cosine, getattr(clip.model.visual, layer))
    maps = theirs.attribute(to_pixels(clip, images), relu_attributions=True)[:, 0].detach()
    expected = torch.stack([share(one.flatten()).view_as(one) for one in maps])
    assert (maps.sum((1, 2)) > 0).sum() >= 3
    np.testing.assert_allclose(found, expected, **CLOSE)


# ---- integrated gradients

def between(model, ids, kind):
    "Token embeddings of captions, and of their baseline: zeros or padding between start and end."
    full, place = model.token_embedding(ids), torch.arange(ids.shape[1])
    own = ((place > 0) & (place < ids.argmax(1)[:, None]))[..., None]
    empty = torch.zeros_like(full) if kind == "zero" else model.token_embedding.weight[0].expand_as(full)
    return full, torch.where(own, empty, full)


def cosines(embeddings, model, ids, u):
    return (unit_rows(text_tower(model, embeddings, ids.argmax(1))) * u).sum(1)


@pytest.mark.parametrize("kind", ["zero", "padding"])
def test_integrated_gradients_are_the_sum_along_the_line(kind):
    "(E - E') times the mean of the gradient at the middles of 12 equal parts of the way from E' to E."
    clip, ids, u = transformer_clip(), captions(7), tensor(random_units(7, 24, 1))
    clip.model.double()
    found, total = attribution.integrated_gradients(clip, ids, u, kind, steps=12, batch_size=3)
    full, start = between(clip.model, ids, kind)
    mean = torch.zeros_like(full)
    for k in range(12):
        at = (start + (k + .5) / 12 * (full - start)).requires_grad_()
        mean += torch.autograd.grad(cosines(at, clip.model, ids, u).sum(), at)[0] / 12
    np.testing.assert_allclose(found, ((full - start) * mean).sum(-1), **CLOSE)
    change = cosines(full, clip.model, ids, u) - cosines(start, clip.model, ids, u)
    np.testing.assert_allclose(total, change.detach(), **CLOSE)


@pytest.mark.parametrize("kind", ["zero", "padding"])
def test_integrated_gradients_are_captums(kind):
    attr = pytest.importorskip("captum.attr", reason=NO_CAPTUM)
    clip, ids, u = transformer_clip(), captions(7), tensor(random_units(7, 24, 1))
    clip.model.double()
    found, _ = attribution.integrated_gradients(clip, ids, u, kind, steps=12)
    full, start = between(clip.model, ids, kind)
    theirs = attr.IntegratedGradients(lambda e, ids, u: cosines(e, clip.model, ids, u))
    parts = theirs.attribute(full, start, additional_forward_args=(ids, u), n_steps=12, method="riemann_middle")
    np.testing.assert_allclose(found, parts.sum(-1), **CLOSE)
    exact = theirs.attribute(full, start, additional_forward_args=(ids, u), n_steps=40, method="gausslegendre").sum(-1)
    fine, _ = attribution.integrated_gradients(clip, ids, u, kind, steps=120)
    np.testing.assert_allclose(fine, exact, **CLOSE)      # the integral itself, by another rule


# ---- masks (UBT, equation 5)

def test_a_masked_caption_is_start_the_relevant_tokens_and_end():
    "Those with at least 1/n of the relevance of n tokens, in their order."
    ids = captions(60, seed=4)
    relevance = torch.from_numpy(np.random.default_rng(0).random(ids.shape).astype(np.float32))
    found = attribution.mask_tokens(ids, relevance).tolist()
    for row, r, masked in zip(ids.tolist(), relevance.tolist(), found):
        own = range(1, row.index(max(row)))
        kept = [row[j] for j in own if r[j] / sum(r[k] for k in own) >= 1 / len(own)]
        expected = [row[0], *kept, max(row)]
        assert masked == expected + [0] * (len(row) - len(expected)) and 0 < len(kept) <= len(own)


def test_a_masked_picture_keeps_its_best_quarter():
    "The other patches get the picture's mean colour."
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3)).astype(np.uint8)
    relevance = torch.from_numpy(np.random.default_rng(1).random((5, 4, 4)))
    found = attribution.mask_patches(images, relevance, .25)
    for image, r, masked in zip(images, relevance.numpy(), found):
        best, expected = sorted(r.flatten())[-4:], image.copy()
        for row in range(4):
            for column in range(4):
                if r[row, column] not in best:
                    mean = [round(image[..., c].astype(float).sum() / 1024) for c in range(3)]
                    expected[8 * row:8 * row + 8, 8 * column:8 * column + 8] = mean
        assert (masked == expected).all()
