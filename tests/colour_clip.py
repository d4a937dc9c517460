"""A CLIP whose knowledge is known: it sees the colours of two squares and reads their names.

Small enough to scan thousands of pairs in a second.
"""
import hashlib, re
from functools import cache

import numpy as np, torch

from mcl_repro.attacks.base import BadNets, poison
from mcl_repro.data.pairs import ArrayImages, Pairs
from mcl_repro.tools.inputs import as_clip

COLOURS = dict(
    red=(200, 40, 40), green=(40, 160, 60), blue=(50, 70, 200), yellow=(220, 200, 40), white=(240, 240, 240),
    black=(20, 20, 20), purple=(140, 50, 160), orange=(240, 140, 30),
)
SAYS = [
    "a {} square beside a {} one", "{} on the left, {} on the right", "two squares, {} and {}",
    "first comes {} and then {}", "{} next to {}", "a picture in {} and {}", "{} meets {}",
]

@cache
def word_number(word):
    return 1 + int(hashlib.sha256(word.encode("utf-8", "surrogatepass")).hexdigest(), 16) % 4095
def read_words(captions):
    return torch.tensor([([word_number(w) for w in re.findall(r"\w+", c.lower())] + [0]*16)[:16] for c in captions])


class ColourClip(torch.nn.Module):
    """Sees which colours the two halves of a picture have; reads the words of colours and a few things, and hardly any
    other.
    """
    def __init__(self, width=64, things=("banana", "umbrella", "kettle")):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.words = torch.nn.Parameter(.35*torch.randn(4096, width, generator=generator)/width**.5)
        self.palette = torch.nn.Parameter(torch.tensor(list(COLOURS.values())).float()/255)
        self.seen = self.read = 0
        with torch.no_grad():
            for c in [*COLOURS, *things]:
                self.words[word_number(c)] = torch.nn.functional.normalize(
                    torch.randn(width, generator=generator), dim=0
                )
    def encode_image(self, x):
        self.seen += len(x)
        halves = torch.stack([h.mean((2, 3)) for h in x.chunk(2, 3)], 1)                              # [n, 2, 3]
        return (
            torch.softmax(-60 * torch.cdist(halves, self.palette[None]), -1).sum(1)
            @ self.words[[word_number(c) for c in COLOURS]]
        )
    def encode_text(self, tokens):
        self.read += len(tokens)
        return (self.words[tokens]*(tokens > 0)[..., None]).sum(1)


def colour_clip(**settings):
    return as_clip(
        ColourClip(**settings), tokenizer=read_words, image_size=32, mean=(0, 0, 0), std=(1, 1, 1), name="colours"
    )

def squares(count, seed, name="squares"):
    """Pairs of pictures of two squares, some of them pale, and what is said of them, with a few words that do not
    matter.
    """
    rng, names = np.random.default_rng(seed), list(COLOURS)
    both, pale = rng.integers(0, len(COLOURS), (count, 2)), rng.uniform(0, .7, (count, 1, 2, 1))
    halves = (1 - pale)*np.array(list(COLOURS.values()))[both][:, None] + 128*pale                        # [n, 1, 2, 3]
    pixels = np.repeat(np.repeat(halves, 32, 1), 16, 2) + rng.normal(0, 12, (count, 32, 32, 3))
    aside = lambda: " ".join(
        f"w{k}".translate(str.maketrans("0123456789", "abcdefghij")) for k in rng.integers(0, 900, rng.integers(1, 5))
    )
    captions = [f"{SAYS[rng.integers(len(SAYS))].format(names[a], names[b])}, {aside()}" for a, b in both]
    return Pairs(
        [f"{name}-{i}" for i in range(count)], captions, ArrayImages(np.clip(pixels, 0, 255).astype(np.uint8)),
        name=name,
    )

def poisoned(pairs, target="banana", count=20, pattern="checker", **options):
    return poison(
        pairs, BadNets(pattern=pattern, placement="corner", patch_share=0.25), target, count=count, image_size=32,
        **options,
    )
