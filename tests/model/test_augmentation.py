"""Augmented captions and images: one operation each, the same for the same seed, equal to what they stand for."""
import os, subprocess, sys, types
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from mcl_repro.model import augmentation
from mcl_repro.model.augmentation import (
    augment_captions, augment_images, bare_words, IMAGE_POLICIES, synonym_source, synonyms_of,
)
from mcl_repro.core.libraries import import_torchvision
from mcl_repro.data.registry import open_data
from mcl_repro.core.errors import DataError, SettingsError

SYNONYMS = {"photo": ["image", "big picture"], "red": ["crimson"], "dog": ["hound", "puppy"]}
CAPTIONS = ["A photo of a red dog", "two dogs and a red, red ball", "nothing known", "Photo", "the dog's photo, IMG 12"]


@pytest.fixture(scope="module")
def pictures():
    pixels = open_data("world:validation:64").images.array(np.arange(64), 32)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


# ---- captions

def explanations(words, out, synonyms):
    "Which single operations turn words into out (captions short enough that each touches one word, deletion any)."
    found = set()
    if words == out:
        found.add("unchanged")
    if len(words) == len(out) and sum(a != b for a, b in zip(words, out)) == 2 and sorted(words) == sorted(out):
        found.add("swap")
    left = iter(words)
    if 0 < len(out) < len(words) and all(w in left for w in out):
        found.add("delete")
    for word in set(words):
        for other in synonyms(word):
            if " ".join(other if w == word else w for w in words) == " ".join(out):
                found.add("replace")
            if any(words[:k] + other.split() + words[k:] == out for k in range(len(words))):
                found.add("insert")
    return found


def test_every_caption_gets_one_operation_and_all_four_occur():
    counts = Counter()
    for seed in range(60):
        for caption, out in zip(CAPTIONS, augment_captions(CAPTIONS, seed, synonyms=SYNONYMS)):
            how = explanations(bare_words(caption), out.split(), lambda w: SYNONYMS.get(w, ()))
            assert how, (caption, out)
            counts.update(how)
    assert min(counts[k] for k in ("unchanged", "swap", "delete", "replace", "insert")) >= 10


def test_the_four_operations_are_drawn_alike(monkeypatch):
    seen = Counter()
    def counted(name):
        return lambda words, *rest: seen.update([name]) or words
    named = {name: counted(name) for name in augmentation.CAPTION_OPERATIONS}
    monkeypatch.setattr(augmentation, "CAPTION_OPERATIONS", named)
    augment_captions(["a small dog"] * 2000, 0)
    assert len(seen) == 4 and all(abs(n - 500) < 80 for n in seen.values())


def test_long_captions_change_a_tenth_of_their_words():
    words = [f"{a}{b}" for a in "abcdef" for b in "abcde"]
    table, caption = {w: ["zz"] for w in words}, " ".join(words)
    changed = [augment_captions([caption], seed, synonyms=table)[0].split() for seed in range(40)]
    replaced = [out.count("zz") for out in changed if len(out) == 30]
    assert set(replaced) == {0, 3}     # three of thirty; none where words were swapped


def test_deletion_never_leaves_an_empty_caption():
    assert all(o for s in range(50) for o in augment_captions(["red dog", "dog"], s, alpha=1.))


def test_captions_depend_on_seed_and_row_only():
    whole = augment_captions(CAPTIONS, 7)
    assert augment_captions(CAPTIONS[3:], 7, rows=[3, 4]) == whole[3:]
    assert augment_captions(CAPTIONS[::-1], 7, rows=torch.arange(5).flip(0)) == whole[::-1]
    assert len({tuple(augment_captions(CAPTIONS, s)) for s in range(20)}) == 20
    code = f"from mcl_repro.model.augmentation import augment_captions; print(augment_captions({CAPTIONS!r}, 7))"
    other_hashes = {**os.environ, "PYTHONHASHSEED": "123"}
    there = subprocess.run([sys.executable, "-c", code], env=other_hashes, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == repr(whole)


def test_captions_without_letters_are_named_or_kept():
    with pytest.raises(DataError, match=r"row 41 has no letters: '\$ 12'.*letterless='keep'"):
        augment_captions(["a dog", "$ 12"], 0, rows=[40, 41])
    assert augment_captions(["$ 12", ""], 0, letterless="keep") == ["$ 12", ""]


@pytest.mark.parametrize("settings, line", [
    (dict(alpha=1.5), "alpha must be in"),
    (dict(letterless="drop"), "unknown choice 'drop'"),
    (dict(synonyms="roget"), "unknown source of synonyms 'roget'"),
])
def test_bad_settings_of_captions(settings, line):
    with pytest.raises(SettingsError, match=line):
        augment_captions(["a dog"], 0, **settings)


def test_our_synonyms_are_symmetric_bare_words():
    table = augmentation._builtin_table()
    for word, others in table.items():
        assert bare_words(word) == [word] and word not in others
        assert all(word in table[other] for other in others)


@pytest.fixture
def wordnet(monkeypatch):
    "Put something in the place of nltk's WordNet."
    def put(corpus):
        for name in ("nltk", "nltk.corpus"):
            monkeypatch.setitem(sys.modules, name, None if corpus is None else types.ModuleType(name))
        if corpus is not None:
            sys.modules["nltk.corpus"].wordnet = corpus
        clear()
    def clear():
        augmentation._wordnet.cache_clear()
        augmentation._wordnet_synonyms.cache_clear()
    yield put
    clear()


def test_wordnet_is_used_where_it_is_there(wordnet):
    sense = types.SimpleNamespace(lemma_names=lambda: ["dog", "Canis_familiaris", "hot-dog"])
    wordnet(types.SimpleNamespace(ensure_loaded=lambda: None, synsets=lambda word: [sense] if word == "dog" else []))
    assert (synonym_source("auto"), synonym_source("builtin")) == ("wordnet", "builtin")
    assert synonyms_of("wordnet")("dog") == ("canis familiaris", "hot dog") and synonyms_of("auto")("cat") == ()
    assert {"canis familiaris"} & {o for s in range(40) for o in augment_captions(["dog"], s, synonyms="wordnet")}


def missing():
    raise LookupError("no data")


@pytest.mark.parametrize("corpus", [None, types.SimpleNamespace(ensure_loaded=missing)], ids=["no package", "no data"])
def test_without_wordnet_there_is_a_stated_fallback(wordnet, corpus):
    wordnet(corpus)
    assert synonym_source("auto") == "builtin"
    with pytest.raises(SettingsError, match="no WordNet here.*builtin"):
        augment_captions(["a dog"], 0, synonyms="wordnet")


# ---- images

def test_every_pair_of_autoaugments_policy_is_torchvisions(pictures, monkeypatch):
    T = import_torchvision().transforms
    policies, image = T.AutoAugment().policies, pictures[5]
    for k, policy in enumerate(policies):
        monkeypatch.setattr(augmentation, "_imagenet_policy", lambda: [policy])
        ours = augment_images(image.expand(4, -1, -1, -1).contiguous(), "autoaugment", seed=k)
        g = torch.Generator().manual_seed(k)
        torch.randint(1, (4,), generator=g)
        chance, sign = torch.rand(4, 2, generator=g), torch.randint(2, (4, 2), generator=g)
        for j in range(4):
            theirs = T.AutoAugment()
            theirs.get_params = lambda n: (k, chance[j], sign[j])
            difference = (ours[j].int() - theirs(image).int()).abs()
            assert (difference > 2).float().mean() < 5e-3 and (difference > 0).float().mean() < .1, (policy, j)


PILLOW = dict(
    ShearX=lambda image, m: image.transform(image.size, Image.Transform.AFFINE, (1, m, 0, 0, 1, 0)),
    Rotate=lambda image, m: image.rotate(m),
    Color=lambda image, m: ImageEnhance.Color(image).enhance(1 + m),
    Contrast=lambda image, m: ImageEnhance.Contrast(image).enhance(1 + m),
    Sharpness=lambda image, m: ImageEnhance.Sharpness(image).enhance(1 + m),
    Posterize=lambda image, m: ImageOps.posterize(image, int(m)),
    Solarize=lambda image, m: ImageOps.solarize(image, m),
    AutoContrast=lambda image, m: ImageOps.autocontrast(image),
    Equalize=lambda image, m: ImageOps.equalize(image),
    Invert=lambda image, m: ImageOps.invert(image),
)
HIGHEST = dict(ShearX=.3, Rotate=30, Color=.9, Contrast=.9, Sharpness=.9)


def strength(name, level, positive):
    "A level from 0 to 9 as the paper's table has it, without help of the code under test."
    if name == "Posterize":
        return 8 - round(4 * level / 9)
    if name == "Solarize":
        return 255 - 255 * level / 9
    return HIGHEST.get(name, 0) * (level or 0) / 9 * (1 if positive else -1)


@pytest.mark.parametrize("size", [32, 61])
def test_autoaugment_by_pillow_is_pillows_operations_one_after_the_other(size):
    pixels = open_data("world:validation:120").images.array(np.arange(120), size)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    policies = import_torchvision().transforms.AutoAugment().policies
    ours = augment_images(images, "autoaugment_pil", seed=8).permute(0, 2, 3, 1).numpy()
    g, seen = torch.Generator().manual_seed(8), set()
    choice = torch.randint(25, (120,), generator=g)
    chance, sign = torch.rand(120, 2, generator=g), torch.randint(2, (120, 2), generator=g)
    for row in range(120):
        image = Image.fromarray(pixels[row])
        for place, (name, probability, level) in enumerate(policies[choice[row]]):
            if chance[row, place] <= probability:
                image = PILLOW[name](image, strength(name, level, sign[row, place]))
                seen.add(name)
        apart = np.abs(ours[row].astype(int) - np.array(image))     # contrast may round the other way, in single pixels
        assert apart.max() <= 1 and (apart > 0).mean() < .002, policies[choice[row]]
    assert len(seen) >= 9


def test_pillow_and_tensors_get_the_same_draws_and_differ_by_little_but_where_pictures_turn(pictures):
    by_pillow, as_tensors = (augment_images(pictures, f"autoaugment{way}", 3).int() for way in ("_pil", ""))
    apart = (by_pillow - as_tensors).abs()
    assert 0 < (apart > 0).float().mean() < .15 and (apart > 2).float().mean() < 2e-3
    unchanged = (as_tensors == pictures).flatten(1).all(1)
    assert torch.equal((by_pillow == pictures).flatten(1).all(1), unchanged) and 0 < unchanged.sum() < len(pictures)


def test_histograms_are_equalised_like_torchvisions(pictures):
    flat = pictures.clone()
    flat[0] = 77
    flat[1, 0] = 0
    assert torch.equal(augmentation._equalize(flat), import_torchvision().transforms.functional.equalize(flat))


@pytest.mark.parametrize("size", [32, 47, 224])
def test_parts_of_roclip_are_torchvisions(size, pictures):
    F = import_torchvision().transforms.functional
    image = torch.nn.functional.interpolate(pictures[:1].float() / 255, size=size)[0]
    for top, left, height, width in augmentation._crop_boxes(5, size, torch.Generator().manual_seed(size)):
        rows = augmentation.resize_matrix(top[None], height[None], size)
        columns = augmentation.resize_matrix(left[None], width[None], size)
        theirs = F.resized_crop(image, top, left, height, width, [size, size])
        assert torch.allclose(rows @ image @ columns.mT, theirs, atol=1e-4)
    blur = augmentation._blur_matrix(torch.tensor([.9]), 5, size)
    assert torch.allclose(blur @ image @ blur.mT, F.gaussian_blur(image, 5, .9), atol=1e-5)
    turned = augmentation._turn_hue(image[None], torch.tensor([-.1]))[0]
    assert torch.allclose(turned, F.adjust_hue(image, -.1), atol=1e-5)


def test_colour_jitter_with_one_change_is_torchvisions(pictures, monkeypatch):
    F, x = import_torchvision().transforms.functional, pictures[:4].float() / 255
    drawn = [torch.tensor([[1.4, 1., 1.], [1., .6, 1.], [1., 1., .5], [1., 1., 1.]]), torch.tensor([0., 0., 0., .08])]
    monkeypatch.setattr(augmentation, "_uniform", lambda *a: drawn.pop(0))
    done = augmentation._colour_jitter(x.clone(), torch.Generator())
    wanted = [F.adjust_brightness(x[0], 1.4), F.adjust_contrast(x[1], .6),
              F.adjust_saturation(x[2], .5), F.adjust_hue(x[3], .08)]
    assert torch.allclose(done, torch.stack(wanted), atol=1e-3)


@pytest.mark.parametrize("policy", IMAGE_POLICIES)
def test_images_depend_on_the_seed_only(policy, pictures):
    state, before = torch.get_rng_state(), pictures.clone()
    once = augment_images(pictures, policy, 3)
    assert torch.equal(once, augment_images(pictures, policy, 3))
    assert once.dtype == torch.uint8
    assert once.shape == pictures.shape
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(pictures, before)
    views = augment_images(pictures[:1].expand(64, -1, -1, -1).contiguous(), policy, 3)
    assert len({v.numpy().tobytes() for v in views}) > (60 if policy == "roclip" else 25)       # an image each its own
    assert augment_images(pictures[:0], policy).shape == (0, 3, 32, 32)


def test_roclips_shares(pictures):
    views = augment_images(pictures[3:4].expand(600, -1, -1, -1).contiguous(), "roclip", 0).int()
    grey = ((views.amax(1) - views.amin(1)) <= 1).flatten(1).all(1).float().mean()
    assert .12 < grey < .28


@pytest.mark.parametrize("images", [
    torch.zeros(2, 3, 8, 8),
    torch.zeros(2, 8, 8, 3, dtype=torch.uint8),
    torch.zeros(3, 8, 8, dtype=torch.uint8),
    torch.zeros(2, 3, 8, 9, dtype=torch.uint8),
])
def test_other_images_are_refused(images):
    with pytest.raises(DataError, match="needs square uint8 images"):
        augment_images(images)


def test_unknown_policy():
    known = "autoaugment, autoaugment_pil, roclip"
    with pytest.raises(SettingsError, match=f"unknown image augmentation 'mixup': use one of {known}"):
        augment_images(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "mixup")
