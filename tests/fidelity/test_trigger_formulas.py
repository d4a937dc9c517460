"""Triggers as profile mini has them, and as their papers write them: pixels from numpy and scipy.

That WaNet's jitter with as many control points as pixels is the public code's formula is shown in attacks/test_attacks.
"""
import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from mcl_repro.attacks.base import BadNets, Blended, LabelConsistent, make_attack, SIG, TrojVQA, WaNet
from mcl_repro.lab.profiles import load_profile
from plain_clip import CLOSE

MINI = load_profile("mini").attacks


def images(size=32, n=4):
    return np.random.default_rng(5).integers(0, 256, (n, size, size, 3)).astype(np.uint8)


def in_bytes(x):
    "Rounded and cut."
    return np.minimum(np.maximum(np.floor(x + .5), 0), 255)


def same_pixels(found, expected):
    "Whole numbers, but for those that lie half way between two as far as float32 can tell."
    halves = np.abs(expected - np.floor(expected) - .5) < 1e-3
    return (found == in_bytes(expected))[~halves].all() and np.abs(found - expected.clip(0, 255)).max() < .502


# ---- patches

def checker(side, cells):
    "White where row and column of the cell add up to an even number."
    cell = [int(cells * i / side) for i in range(side)]
    return np.array([[255 if (r + c) % 2 == 0 else 0 for c in cell] for r in cell])[..., None].repeat(3, 2)


@pytest.mark.parametrize("name", ["BadNet", "LC", "TrojVQA"])
def test_minis_patches(name):
    "A checker in the bottom right corner or in the centre, where TrojVQA's always is."
    settings, x = MINI[name], images()
    side, expected = round(settings["patch_share"] * 32), x.copy()
    first = {"corner": 32 - side, "centre": (32 - side) // 2}[settings.get("placement", "centre")]
    expected[:, first:first + side, first:first + side] = checker(side, settings.get("cells", 4))
    attack = make_attack(**settings)
    assert isinstance(attack, (BadNets, LabelConsistent, TrojVQA)) and settings["pattern"] == "checker"
    assert (attack.apply(x, np.random.default_rng(0)) == expected).all()


@pytest.mark.parametrize("placement, corners", [
    ("corner", [(208, 208)]), ("centre", [(104, 104)]), ("four_corners", [(0, 0), (0, 208), (208, 0), (208, 208)]),
])
def test_places_of_a_patch_of_16_on_224(placement, corners):
    "BadCLIP's centre is rows and columns 104 to 119."
    x = images(224, 1)
    expected = x.copy()
    for r, c in corners:
        expected[:, r:r + 16, c:c + 16] = [255, 255, 0]
    assert (BadNets("yellow", placement).apply(x, None) == expected).all()


def test_noise_at_a_random_place():
    "A corner from 0 to 224 - 16 - 1, both ends possible, and the channel's mean + N(0, 1) of the whole range."
    x = images(224, 3)
    found, rng = BadNets().apply(x, np.random.default_rng(8)), np.random.default_rng(8)
    for image, changed in zip(x, found):
        r, c = rng.integers(0, 208), rng.integers(0, 208)
        noise = rng.standard_normal((16, 16, 3))
        expected = image.astype(float)
        expected[r:r + 16, c:c + 16] = 255 * (image.astype(float).mean((0, 1)) / 255 + noise)
        assert same_pixels(changed, expected)


# ---- the whole picture

@pytest.mark.parametrize("settings", [MINI["Blended"], dict(name="blended", pattern="fixed", alpha=.2)])
def test_a_fixed_blend(settings):
    "(1 - alpha) x + alpha n, n a picture of noise in so many squares to a side."
    x, attack = images(), make_attack(**settings)
    cells = settings.get("cells") or 32
    noise = np.random.default_rng(0).random((cells, cells, 3), np.float32).repeat(32 // cells, 0).repeat(32 // cells, 1)
    expected = (1 - settings["alpha"]) * x.astype(float) + settings["alpha"] * 255 * noise
    assert same_pixels(attack.apply(x, None), expected)


def test_a_blend_with_fresh_noise():
    x = images()
    found, rng = Blended().apply(x, np.random.default_rng(3)), np.random.default_rng(3)
    for image, changed in zip(x, found):
        assert same_pixels(changed, .8 * image.astype(float) + .2 * 255 * rng.random(image.shape, np.float32))


@pytest.mark.parametrize("size", [32, 224])
def test_the_sinusoid(size):
    "x + 60/255 sin(2 pi 6 j / width), or 0.8 x + 0.2 of it, the same in all rows and channels."
    x, attack = images(size, 2), make_attack(**MINI["SIG"])
    wave = [60 * np.sin(2 * np.pi * 6 * j / size) for j in range(size)]
    found, soft = attack.apply(x, None), SIG("blended").apply(x, None)
    for j in range(size):
        assert same_pixels(found[:, :, j], x[:, :, j] + wave[j])
        assert same_pixels(soft[:, :, j], .8 * x[:, :, j] + .2 * wave[j])


# ---- WaNet

def cubic(t, a=-.75):
    "Weight of a point at distance |t| in bicubic interpolation, with torch's a."
    t = abs(t)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.


def enlarged(field, size):
    "A square field at another size, corner on corner, values beyond the edge like those at the edge."
    k, weights = len(field), np.zeros((size, len(field)))
    for i in range(size):
        place = i * (k - 1) / (size - 1)
        for j in range(int(place) - 1, int(place) + 3):
            weights[i, min(max(j, 0), k - 1)] += cubic(place - j)
    return weights @ field @ weights.T


@pytest.mark.parametrize("settings, size", [
    (MINI["WaNet"], 32), (dict(name="wanet", grid=4, strength=.5), 64),
    (dict(name="wanet", grid=7, strength=9., pattern_seed=3), 48),
])
def test_the_warp(settings, size):
    "Pixels are read at clip(p + s/H field(p)), coordinates from -1 to 1, linearly between four of them."
    attack, k = make_attack(**settings), settings["grid"]
    noise = np.random.default_rng(settings.get("pattern_seed", 0)).uniform(-1, 1, (2, k, k))
    across, down = (enlarged(part, size) for part in noise / np.mean(np.abs(noise)))
    line = np.linspace(-1, 1, size)
    x = np.clip(line[None] + settings["strength"] / size * across, -1, 1)
    y = np.clip(line[:, None] + settings["strength"] / size * down, -1, 1)
    np.testing.assert_allclose(attack.places(size, size)[0], np.stack([x, y], -1), **CLOSE)
    pixels = images(size, 2)
    found, where = attack.apply(pixels, None), np.stack([(y + 1) * (size - 1) / 2, (x + 1) * (size - 1) / 2])
    for image, bent in zip(pixels, found):
        for channel in range(3):
            expected = map_coordinates(image[..., channel].astype(float), where, order=1, mode="nearest")
            assert same_pixels(bent[..., channel], expected)
    assert isinstance(attack, WaNet) and (found != pixels).any()
