"""CLIP in plain formulas, to hold the library against: losses with their slopes, two linear towers, open_clip's towers
layer by layer. Nothing here calls the library but for what carries a model, and all is float64 where it can be.
"""
import math

import numpy as np
import torch

from mcl_repro.core.libraries import import_open_clip
from mcl_repro.model.clip import Clip

open_clip = import_open_clip()
CLOSE = dict(rtol=0, atol=1e-5)     # what counts as the same number


def tensor(x):
    return torch.as_tensor(np.asarray(x, np.float64))


def array(x):
    return x.detach().double().numpy() if isinstance(x, torch.Tensor) else np.asarray(x, np.float64)


def unit(x):
    "Rows at length one."
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def random_units(n, d, seed):
    return unit(np.random.default_rng(seed).normal(size=(n, d)))


# ---- the contrastive loss

def cross_entropy(a, b, scale):
    "Mean over rows i of -log(exp(s <a_i, b_i>) / sum over j of exp(s <a_i, b_j>)), term by term."
    total = 0.
    for i in range(len(a)):
        weights = [math.exp(scale * float(a[i] @ other)) for other in b]
        total -= math.log(weights[i] / math.fsum(weights))
    return total / len(a)


def contrastive(u, v, scale):
    "Both directions."
    return (cross_entropy(u, v, scale) + cross_entropy(v, u, scale)) / 2


def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def contrastive_slopes(u, v, scale):
    "Derivatives of the loss after u, v and scale: (P + Q - 2I)/2n, softmax over rows P and over columns Q, goes back."
    cosines, n = u @ v.T, len(u)
    slope = (softmax(scale * cosines, 1) + softmax(scale * cosines, 0) - 2 * np.eye(n)) / (2 * n)
    return scale * slope @ v, scale * slope.T @ u, float((slope * cosines).sum())


def before_unit(z, slope):
    "Derivative after z of something whose derivative after z/|z| is `slope`: what is across z, divided by |z|."
    u = unit(z)
    return (slope - u * (u * slope).sum(-1, keepdims=True)) / np.linalg.norm(z, axis=-1, keepdims=True)


# ---- two linear towers

class LinearClip(torch.nn.Module):
    "Pictures: z = normalised pixels W. Captions: z = (sum over places p of w_p E[token_p]) P."
    def __init__(self, side=4, d=6, width=5, vocabulary=40, context=10, scale=14.3, seed=0):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        random = lambda *shape: torch.randn(*shape, generator=draw)
        self.image = torch.nn.Parameter(random(3 * side * side, d))
        self.text = torch.nn.Parameter(random(width, d))
        self.token_embedding = torch.nn.Embedding(vocabulary, width)
        self.token_embedding.weight.data = random(vocabulary, width)
        self.register_buffer("places", random(context))
        self.logit_scale = torch.nn.Parameter(torch.tensor(math.log(scale)))
        self.heard = []     # the token ids of every call

    def encode_image(self, x):
        return x.flatten(1) @ self.image

    def encode_text(self, tokens):
        self.heard.append(tokens)
        return (self.token_embedding(tokens) * self.places[:, None]).sum(1) @ self.text


MEAN, STD = (.5, .4, .3), (.25, .3, .2)


def linear_clip(side=4, **settings):
    return Clip(LinearClip(side, **settings), None, side, MEAN, STD, "linear")


def picture_features(clip, images):
    "z of pictures in 0..255, [n, d]."
    x = array(images) / 255
    x = (x - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]
    return x.reshape(len(x), -1) @ array(clip.model.image)


def caption_features(clip, tokens):
    "z of captions, [n, d]."
    model = clip.model
    embedded = array(model.token_embedding.weight)[np.asarray(tokens)]
    return np.einsum("p,npw->nw", array(model.places), embedded) @ array(model.text)


def scale_of(clip):
    return math.exp(clip.model.logit_scale.item())


def captions(n, seed=0, context=10, low=2, high=6, vocabulary=40):
    "Random captions as token ids: start, 2 to 6 tokens, end (the largest id), padding."
    rng, ids = np.random.default_rng(seed), np.zeros((n, context), np.int64)
    for row in ids:
        length = rng.integers(low, high + 1)
        row[:length + 2] = [vocabulary - 2, *rng.integers(1, vocabulary - 2, length), vocabulary - 1]
    return torch.from_numpy(ids)


def pictures(n, side=4, seed=0):
    "uint8 [n, 3, side, side], the ends 0 and 255 among the values."
    x = np.random.default_rng(seed).integers(-60, 316, (n, 3, side, side)).clip(0, 255)
    return torch.from_numpy(x.astype(np.uint8))


# ---- open_clip's transformers, layer by layer

def transformer_clip(text_layers=3, seed=0, quick_gelu=False, **vision):
    "A small CLIP of open_clip with no weight at a special value such as 0."
    torch.manual_seed(seed)
    vision = dict(image_size=32, patch_size=8, width=32, layers=3, head_width=16) | vision
    text = dict(context_length=10, vocab_size=40, width=32, heads=4, layers=text_layers)
    model = open_clip.CLIP(24, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text), quick_gelu)
    for p in model.parameters():
        p.data += .05 * torch.randn(p.shape)
    return Clip(model.eval().requires_grad_(False), None, 32, MEAN, STD, "small")


def layer_norm(x, layer):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias


def activation(x, quick):
    return x * torch.sigmoid(1.702 * x) if quick else x * (1 + torch.erf(x / 2**.5)) / 2


def attend(x, layer, causal, seen):
    "Multi-head attention head by head; the probabilities [n, heads, t, t] join `seen`, and the output is made of them."
    n, t, width = x.shape
    size, heads = width // layer.num_heads, []
    weight, bias = layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3)
    q, k, v = (x @ w.T + b for w, b in zip(weight, bias))
    for h in range(layer.num_heads):
        part = slice(h * size, (h + 1) * size)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / size**.5
        if causal:
            scores = scores.masked_fill(torch.ones(t, t).triu(1).bool(), -math.inf)
        e = (scores - scores.amax(-1, keepdim=True)).exp()
        heads.append(e / e.sum(-1, keepdim=True))
    p = torch.stack(heads, 1)
    seen.append(p if p.requires_grad else p.requires_grad_())
    mixed = [seen[-1][:, h] @ v[..., h * size:(h + 1) * size] for h in range(layer.num_heads)]
    return torch.cat(mixed, -1) @ layer.out_proj.weight.T + layer.out_proj.bias


def block(x, layer, causal, seen, quick):
    x = x + attend(layer_norm(x, layer.ln_1), layer.attn, causal, seen)
    inner = layer_norm(x, layer.ln_2) @ layer.mlp.c_fc.weight.T + layer.mlp.c_fc.bias
    return x + activation(inner, quick) @ layer.mlp.c_proj.weight.T + layer.mlp.c_proj.bias


def text_tower(model, embeddings, end, seen=None, quick=False):
    "Features [n, d] of captions given as token embeddings [n, t, width], read where they end."
    seen = [] if seen is None else seen
    x = embeddings + model.positional_embedding
    for layer in model.transformer.resblocks:
        x = block(x, layer, True, seen, quick)
    return layer_norm(x, model.ln_final)[torch.arange(len(end)), end] @ model.text_projection


def image_tower(visual, pixels, seen=None, quick=False):
    "Features [n, d] of normalised pixels [n, 3, s, s], read at the class token."
    seen, size = [] if seen is None else seen, visual.conv1.kernel_size[0]
    n, _, height, width = pixels.shape
    cells = [pixels[:, :, r:r + size, c:c + size].reshape(n, -1)
             for r in range(0, height, size) for c in range(0, width, size)]
    patches = torch.stack(cells, 1) @ visual.conv1.weight.flatten(1).T
    x = torch.cat([visual.class_embedding.expand(n, 1, -1), patches], 1) + visual.positional_embedding
    x = layer_norm(x, visual.ln_pre)
    for layer in visual.transformer.resblocks:
        x = block(x, layer, False, seen, quick)
    return layer_norm(x, visual.ln_post)[:, 0] @ visual.proj


def unit_rows(x):
    return x / x.square().sum(-1, keepdim=True).sqrt()
