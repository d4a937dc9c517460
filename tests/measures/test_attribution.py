"Attribution on tiny open_clip models: exactness, independence of batches, models left as they were, wrong input."
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mcl_repro.measures import attribution as A
from mcl_repro.core.libraries import import_open_clip
from mcl_repro.model.clip import Clip, encode_text
from mcl_repro.core.errors import DataError, SettingsError
from mcl_repro.model.clip import to_pixels

oc = import_open_clip()
VIT = dict(image_size=32, patch_size=8, width=32, layers=3, head_width=16)
RESNET = dict(image_size=32, layers=[1, 1, 1, 1], width=8)


def tiny(vision=VIT, seed=0, quick_gelu=False, text_layers=3):
    torch.manual_seed(seed)
    model = oc.CLIP(
        24, oc.CLIPVisionCfg(**vision),
        oc.CLIPTextCfg(context_length=12, vocab_size=60, width=32, heads=4, layers=text_layers), quick_gelu,
    )
    for p in model.parameters():
        p.data += .02*torch.randn(p.shape)   # no weight at a special value such as 0
    return Clip(model.eval(), None, 32, (.5,)*3, (.25,)*3, "tiny")


def sentences(n, seed=0):
    rng, ids = np.random.default_rng(seed), np.zeros((n, 12), int)
    for row, k in zip(ids, rng.integers(1, 11, n)):
        row[:k + 2] = [58, *rng.integers(1, 50, k), 59]
    return torch.from_numpy(ids)


def unit(n, seed=1):
    return F.normalize(torch.randn(n, 24, generator=torch.Generator().manual_seed(seed)), dim=-1)


def pictures(n, seed=2):
    return np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3)).astype(np.uint8)


def snapshot(model):
    return ([(n, m.training, sorted(m.__dict__), len(m._forward_hooks)) for n, m in model.named_modules()],
            [(n, p.requires_grad, p.grad is None, p.detach().clone()) for n, p in model.named_parameters()],
            [(n, b.clone()) for n, b in model.named_buffers()])


def same(a, b):
    return all(
        x == y if not isinstance(x, torch.Tensor) else torch.equal(x, y)
        for s, t in zip(a, b)
        for u, v in zip(s, t)
        for x, y in zip(u, v)
    )


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_open_attention_equals_the_original(quick_gelu):
    clip, ids, x = tiny(quick_gelu=quick_gelu), sentences(6), torch.randn(6, 3, 32, 32)
    with torch.no_grad():
        text, image = clip.model.encode_text(ids), clip.model.encode_image(x)
        with A.recorded_attention([*clip.model.transformer.resblocks, *clip.model.visual.transformer.resblocks]):
            assert torch.allclose(clip.model.encode_text(ids), text, atol=1e-5)
            assert torch.allclose(clip.model.encode_image(x), image, atol=1e-5)
            assert torch.allclose(encode_text(clip.model, ids), text, atol=1e-5)


def test_recorded_probabilities_are_torchs_own():
    clip, ids = tiny(), sentences(4)
    block, kept = clip.model.transformer.resblocks[-1], []
    hook = block.attn.register_forward_pre_hook(lambda m, args, kwargs: kept.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        clip.model.encode_text(ids)
    hook.remove()
    args, kwargs = kept[0]
    with torch.no_grad():
        expected = block.attn(*args, **{**kwargs, "need_weights": True, "average_attn_weights": False})[1]
    with torch.no_grad(), A.recorded_attention([block]) as seen:
        clip.model.encode_text(ids)
    assert torch.allclose(seen[0], expected, atol=1e-6)


def plain_relevance(clip, ids, u, start):
    "One caption at a time, full matrices R <- R + mean(grad * A)+ R, straight from the formula"
    out = torch.zeros(ids.shape)
    for i in range(len(ids)):
        with A.recorded_attention(clip.model.transformer.resblocks) as seen:
            v = F.normalize(clip.model.encode_text(ids[i:i + 1]), dim=-1)
        grads = torch.autograd.grad(clip.model.logit_scale.exp()*(v[0] @ u[i]), seen)
        R = torch.eye(ids.shape[1])
        for p, g in list(zip(seen, grads))[start:]:
            R = R + (g[0]*p[0]).clamp(min=0).mean(0).detach() @ R
        end = int(ids[i].argmax())
        r = R[end, 1:end]
        out[i, 1:end] = r/r.sum() if r.sum() > 0 else 1/max(end - 1, 1)
    return out


@pytest.mark.parametrize("start", [-1, -2, 0])
def test_token_relevance_equals_the_plain_formula(start):
    clip, ids, u = tiny(), sentences(12), unit(12)
    assert torch.allclose(
        A.token_relevance(clip, ids, u, start, batch_size=5), plain_relevance(clip, ids, u, start), atol=1e-5
    )


@pytest.mark.parametrize("start", [-1, 0])
def test_patch_relevance_equals_the_plain_formula(start):
    clip, x, v = tiny(), pictures(5), unit(5)
    got = A.patch_relevance(clip, x, v, start, batch_size=2).flatten(1)
    for i in range(5):
        with A.recorded_attention(clip.model.visual.transformer.resblocks) as seen:
            u = F.normalize(clip.model.encode_image(to_pixels(clip, x[i:i + 1])), dim=-1)
        R = torch.eye(17)
        for p, g in list(zip(seen, torch.autograd.grad((u[0] @ v[i])*clip.model.logit_scale.exp(), seen)))[start:]:
            R = R + (g[0]*p[0]).clamp(min=0).mean(0).detach() @ R
        assert torch.allclose(got[i], R[0, 1:]/R[0, 1:].sum(), atol=1e-5)


def test_relevance_is_a_share_of_the_captions_own_tokens():
    clip, ids, u = tiny(), sentences(30), unit(30)
    rel = A.token_relevance(clip, ids, u)
    place, end = torch.arange(12), ids.argmax(1)
    assert (rel >= 0).all() and torch.allclose(rel.sum(1), torch.ones(30), atol=1e-5)
    assert (rel[(place == 0) | (place >= end[:, None])] == 0).all()


def test_the_logit_scale_cancels_in_the_last_block():
    clip, ids, u = tiny(), sentences(9), unit(9)
    before = A.token_relevance(clip, ids, u)
    clip.model.logit_scale.data += 1
    assert torch.allclose(A.token_relevance(clip, ids, u), before, atol=1e-5)


def test_empty_captions_and_nothing_relevant():
    clip = tiny()
    ids = torch.tensor([[58, 59] + [0]*10, [58, 4, 5, 59] + [0]*8])
    rel = A.token_relevance(clip, ids, unit(2))
    assert (rel[0] == 0).all() and rel[1].sum() == pytest.approx(1)
    even = A._share(torch.zeros(1, 4), torch.tensor([[False, True, True, False]]))
    assert even.tolist() == [[0, .5, .5, 0]]
    assert A.token_relevance(clip, ids[:0], unit(2)[:0]).shape == (0, 12)


@pytest.mark.parametrize("call", [
    lambda c: A.token_relevance(c, sentences(3), unit(3)),
    lambda c: A.integrated_gradients(c, sentences(3), unit(3), steps=2),
    lambda c: A.grad_cam(c, pictures(3), unit(3), "layer3"),
], ids=["tokens", "integrated gradients", "grad-cam"])
def test_models_are_left_as_they_were_also_in_training_and_without_gradients(call):
    clip = tiny(RESNET)
    clip.model.train()
    clip.model.visual.bn1.eval()
    clip.model.ln_final.weight.requires_grad_(False)
    clip.model.transformer.grad_checkpointing = True
    before = snapshot(clip.model)
    with torch.no_grad():
        one = call(clip)
    assert same(before, snapshot(clip.model))
    with torch.inference_mode():
        two = call(clip)
    assert same(before, snapshot(clip.model)) and torch.is_grad_enabled()
    first = lambda r: r[0] if isinstance(r, tuple) else r
    assert torch.equal(first(one), first(two))


def test_a_failure_inside_leaves_the_model_as_it_was():
    clip = tiny()
    clip.model.train()
    before = snapshot(clip.model)
    with pytest.raises(Exception):
        A.token_relevance(clip, torch.full((2, 12), 99), unit(2))   # ids outside the vocabulary
    with pytest.raises(SettingsError):
        A.grad_cam(clip, pictures(2), unit(2), "ln_post")
    assert same(before, snapshot(clip.model))


def test_average_pooled_vits_read_the_mean_over_patches():
    clip = tiny(dict(VIT, pool_type="avg"))
    maps = A.patch_relevance(clip, pictures(4), unit(4), start_layer=0)
    assert torch.allclose(maps.sum((1, 2)), torch.ones(4), atol=1e-5) and maps.std() > 1e-3


def test_images_may_be_array_tensor_or_lazy_source():
    from mcl_repro.data.pairs import ArrayImages
    clip, x, v = tiny(), pictures(5), unit(5)
    a, b, c = (
        A.patch_relevance(clip, i, v, batch_size=2)
        for i in (x, torch.from_numpy(x).permute(0, 3, 1, 2), ArrayImages(x))
    )
    assert torch.equal(a, b) and torch.equal(a, c)


# masking

def test_masks_keep_order_start_end_and_at_least_one_token():
    ids, rel = sentences(300, 4), torch.rand(300, 12, generator=torch.Generator().manual_seed(0))
    for rule, count in (("mean", 1), ("top", 1), ("top", 3), ("top", 50)):
        keep, masked = A.keep_tokens(rel, ids, rule, count), A.mask_tokens(ids, rel, rule, count)
        for before, after, k in zip(ids.tolist(), masked.tolist(), keep):
            own = [t for t, kept in zip(before, k.tolist()) if kept]
            assert after == [58, *own, 59] + [0]*(10 - len(own)) and own
            if rule == "top":
                assert len(own) == min(count, before.index(59) - 1)
    assert A.mask_tokens(ids, rel, "top", 50).equal(ids)


def test_a_caption_cut_at_the_context_length_keeps_its_end():
    ids = torch.tensor([[58, *range(1, 11), 59]])
    rel = torch.zeros(1, 12)
    rel[0, 10] = 1
    assert A.mask_tokens(ids, rel).tolist() == [[58, 10, 59] + [0]*9]


def test_masked_captions_go_through_the_model():
    clip, ids, u = tiny(), sentences(6), unit(6)
    masked = A.mask_tokens(ids, A.token_relevance(clip, ids, u))
    with torch.no_grad():
        assert torch.isfinite(encode_text(clip.model, masked)).all()


def test_masked_patches_keep_their_share_and_the_rest_is_flat():
    x, maps = pictures(3), torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0))
    y = A.mask_patches(x, maps, .25)
    kept = (y == x).all(-1).reshape(3, 4, 8, 4, 8).all((2, 4))
    assert (kept.sum((1, 2)) == 4).all()
    assert all(maps[i][kept[i]].min() > maps[i][~kept[i]].max() for i in range(3))
    assert all(len(np.unique(y[i][~np.kron(kept[i], np.ones((8, 8), bool))], axis=0)) == 1 for i in range(3))
    assert (x == pictures(3)).all()


# Grad-CAM and integrated gradients

def test_grad_cam_equals_the_plain_formula():
    clip, x, v = tiny(RESNET), pictures(3), unit(3)
    got, m = A.grad_cam(clip, x, v, "layer3", batch_size=2), clip.model.visual
    maps = m.layer3(m.layer2(m.layer1(m.stem(to_pixels(clip, x))))).detach().requires_grad_()
    u = F.normalize(m.attnpool(m.layer4(maps)), dim=-1)
    g, = torch.autograd.grad((u*v).sum(), maps)
    cam = (g.mean((2, 3), keepdim=True)*maps).sum(1).clamp(min=0).detach()
    some = cam.sum((1, 2)) > 0
    assert some.any() and torch.allclose(got[some], cam[some]/cam[some].sum((1, 2), keepdim=True), atol=1e-4)


@pytest.mark.parametrize("baseline", ["zero", "padding"])
def test_integrated_gradients_sum_to_the_change_of_the_cosine(baseline):
    clip, ids, u = tiny(), sentences(7), unit(7)
    parts, total = A.integrated_gradients(clip, ids, u, baseline, steps=64, batch_size=5)
    assert torch.allclose(parts.sum(1), total, atol=2e-3) and total.abs().max() > .05
    with torch.no_grad():
        cosine = (F.normalize(encode_text(clip.model, ids), dim=-1)*u).sum(1)
    empty = ids.clone()
    empty[A._caption_places(ids)[1]] = 0
    if baseline == "padding":   # the baseline is a caption of padding tokens, end where it was
        with torch.no_grad():
            start = (F.normalize(clip.model.encode_text(empty), dim=-1)*u).sum(1)
        assert torch.allclose(total, cosine - start, atol=1e-5)


@pytest.mark.parametrize("call, error, words", [
    (lambda: A.token_relevance(tiny(), sentences(2), unit(2), start_layer=3), SettingsError, "start_layer"),
    (lambda: A.token_relevance(tiny(), sentences(2), unit(3)), DataError, "2 captions"),
    (lambda: A.patch_relevance(tiny(RESNET), pictures(2), unit(2)), SettingsError, "grad_cam"),
    (lambda: A.patch_relevance(tiny(), pictures(2), unit(3)), DataError, "2 images"),
    (lambda: A.grad_cam(tiny(RESNET), pictures(2), unit(2), "stage9"), SettingsError, "layer4"),
    (lambda: A.keep_tokens(torch.zeros(1, 12), sentences(2)), DataError, "relevance"),
    (lambda: A.keep_tokens(torch.zeros(2, 12), sentences(2), "best"), SettingsError, "rule"),
    (lambda: A.keep_tokens(torch.zeros(2, 12), sentences(2), "top", 0), SettingsError, "count"),
    (lambda: A.mask_patches(pictures(2), torch.zeros(2, 4, 4), 0), SettingsError, "share"),
    (lambda: A.mask_patches(pictures(2), torch.zeros(3, 4, 4)), DataError, "relevance maps"),
    (lambda: A.integrated_gradients(tiny(), sentences(2), unit(2), "black"), SettingsError, "baseline"),
])
def test_wrong_input_is_one_clear_line(call, error, words):
    with pytest.raises(error, match=words) as e:
        call()
    assert "\n" not in str(e.value)


def test_towers_of_another_kind_are_refused():
    clip = tiny()
    clip.model.text_pool_type = "last"
    with pytest.raises(SettingsError, match="text transformer"):
        A.token_relevance(clip, sentences(2), unit(2))
    clip = tiny()
    clip.model.transformer.resblocks[-1].attn = torch.nn.Identity()
    with pytest.raises(SettingsError, match="plain attention blocks"):
        A.token_relevance(clip, sentences(2), unit(2))


def test_many_captions_of_different_lengths_keep_their_own_relevance():
    """The text tower may put captions of like length together; what is recorded inside must still belong to the right
    caption.
    """
    from mcl_repro.model.clip import build_clip, tokenize
    clip = build_clip("smoke-RN", seed=3)
    texts = [" ".join(["red", "cup", "on", "grass", "near", "a", "tree"][:1 + i % 7]) + f" {i}" for i in range(80)]
    ids = tokenize(clip, texts)[0]
    u = F.normalize(torch.randn(80, 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    for start in (-1, 0):
        whole = A.token_relevance(clip, ids, u, start)
        assert torch.allclose(
            whole, torch.cat([A.token_relevance(clip, ids[i : i + 1], u[i : i + 1], start) for i in range(80)]),
            atol=1e-5,
        )
        assert (whole[ids == 49407] == 0).all() and (whole[ids == 0] == 0).all()
