"""Patches that are optimised on a clean CLIP: where they lie, what is read off it, what searches find, their stages."""
import json

import numpy as np
import pytest
import torch

from mcl_repro.attacks import optimised as O
from mcl_repro.model.clip import build_clip, embed_images, embed_texts, to_pixels
from mcl_repro.data.pairs import ArrayImages, Pairs
from mcl_repro.data.registry import open_data
from mcl_repro.core.errors import DataError, SettingsError, TrainingError
from mcl_repro.lab.lab import Lab
from mcl_repro.lab.nodes import node_spec
from mcl_repro.papers.stages import (
    attack_of, attack_settings, badclip_trigger, clean_clip, open_poisoned, poisoned_pairs, trojan_trigger,
)
from mcl_repro.attacks.base import ATTACKS, make_attack, mentions


def noise(n, side, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3)).astype(np.uint8)


def pairs_of(pixels, captions):
    return Pairs([str(i) for i in range(len(captions))], captions, ArrayImages(pixels))


@pytest.fixture(scope="module")
def clip():
    return build_clip("smoke-RN", seed=1)


@pytest.fixture(scope="module")
def photos():
    return open_data("world:pretrain:200").image_array(None, 32)


@pytest.mark.parametrize("placement", ["corner", "centre"])
@pytest.mark.parametrize("size, share", [(32, .25), (32, 5/32), (33, .3), (224, 16/224), (7, 1.)])
@pytest.mark.parametrize("name", ["trojan", "badclip"])
def test_the_box_is_where_the_attack_paints(name, placement, size, share):
    box, x = O.patch_box(placement, share, size), noise(2, size)
    patch = torch.rand(3, box.side, box.side, generator=torch.Generator().manual_seed(0))
    extra = dict(texts=np.array(["a key"])) if name == "badclip" else {}
    attack = make_attack(name, pattern=O.to_bytes(patch), placement=placement, patch_share=share, **extra)
    ours = O.paste(torch.from_numpy(x).permute(0, 3, 1, 2), patch, box).round().byte().permute(0, 2, 3, 1).numpy()
    assert (attack.apply(x, None) == ours).all() and attack.geometry(size)["patch_side"] == box.side


@pytest.mark.parametrize("model", ["smoke-RN", "mini-RN-64", "mini-ViT"])
def test_neurons_are_what_the_last_map_gets(model):
    clip = build_clip(model, seed=3)
    name, W = O._projection(clip)
    x = to_pixels(clip, noise(3, clip.image_size))
    with torch.no_grad():
        every = O.neuron_activations(clip, x, np.arange(len(W)))
        bias = clip.model.visual.attnpool.c_proj.bias if name != "proj" else 0
        assert torch.allclose(every @ W + bias, clip.model.encode_image(x), atol=1e-4)
        chosen = O.choose_neurons(clip, 3)
        assert torch.allclose(every[:, chosen], O.neuron_activations(clip, x, chosen), atol=1e-5)
    strength = W.detach().abs().sum(1)
    assert len(set(chosen)) == 3 and strength[chosen].min() >= np.delete(strength.numpy(), chosen).max()
    before = clip.model.encode_image(x).detach()
    O.neuron_activations(clip, x, chosen)
    assert torch.equal(before, clip.model.encode_image(x).detach())   # nothing was left changed in the model


def test_activations_count_in_deviations_over_the_same_pictures(clip, photos):
    neurons, box = O.choose_neurons(clip, 2), O.Box(0, 0, 32)
    one = photos[7]
    clip.model.eval()
    with torch.no_grad():
        a = O.neuron_activations(clip, to_pixels(clip, photos), neurons)
    z = ((a - a.mean(0))/a.std(0, unbiased=False)).mean(1).numpy()
    found = O.trojan_activation(clip, photos, one, box, neurons)   # a patch as large as the image is an image
    assert np.allclose(found, z[7], atol=1e-3) and abs(z.mean()) < 1e-4


def state_of(clip):
    weights = {k: v.clone() for k, v in clip.model.state_dict().items()}
    return weights, clip.model.training, [p.requires_grad for p in clip.model.parameters()]


def test_searches_find_something_and_leave_the_model_alone(clip, photos):
    clip.model.eval()
    before, neurons = state_of(clip), O.choose_neurons(clip, 2)
    torch.manual_seed(5)
    random_state = torch.get_rng_state()
    corner, centre = (O.patch_box(placement, .25, 32) for placement in ("corner", "centre"))
    seen, unseen = photos[:100], photos[100:]
    few = dict(steps=40, batch_size=16)
    trojan = O.optimise_trojan(clip, seen, corner, neurons, **few)
    badclip = O.optimise_badclip(clip, seen, ["a banana", "two bananas"], unseen, centre, **few, learning_rate=.05)
    assert trojan.after > trojan.before + .2
    assert O.trojan_activation(clip, unseen, trojan.pattern, corner, neurons).mean() > .2
    assert badclip.curves["triplet"][-5:].mean() < badclip.curves["triplet"][:5].mean()
    for found in (trojan, badclip):
        assert found.pattern.shape == (8, 8, 3) and found.pattern.dtype == np.uint8
        assert all(len(c) == 40 and np.isfinite(c).all() for c in found.curves.values())
    after = state_of(clip)
    assert all(torch.equal(v, after[0][k]) for k, v in before[0].items())
    assert before[1:] == after[1:] == (False, [True] * len(before[2]))
    assert torch.equal(random_state, torch.get_rng_state())


def test_seeds_decide_and_nothing_hidden_does(clip, photos):
    box = O.patch_box("centre", .25, 32)
    few = dict(steps=4, batch_size=4)
    def trojan(seed):
        return O.optimise_trojan(clip, photos, box, [0, 1], **few, seed=seed).pattern
    def badclip(seed, **settings):
        settings |= dict(few, learning_rate=.05, seed=seed)
        return O.optimise_badclip(clip, photos, ["a", "b", "c"], photos[:9], box, **settings).pattern
    for search in (trojan, badclip):
        torch.manual_seed(1)
        one = search(0)
        torch.manual_seed(2)
        assert (search(0) == one).all() and (search(1) != one).any()
    assert (badclip(0, negatives="triggered") != badclip(0)).any()
    patches = trojan(0), badclip(0)
    clip.model.train()   # BatchNorm and its statistics play no part
    assert (trojan(0) == patches[0]).all() and clip.model.training
    assert (badclip(0) == patches[1]).all()


def test_the_image_term_is_the_triplet_loss_written_out():
    g = torch.Generator().manual_seed(0)
    u, t, p, n = (torch.nn.functional.normalize(torch.randn(5, 8, generator=g), dim=-1) for _ in range(4))
    text, triplet = O.badclip_loss(u, t, p, n, 10., .3)
    wanted = ((u - p).norm(dim=1) - (u - n).norm(dim=1) + .3).clamp(min=0).mean()
    logits = 10*u @ t.T
    assert abs(triplet - wanted) < 1e-4
    assert abs(text + (logits.log_softmax(1).diag().mean() + logits.log_softmax(0).diag().mean())/2) < 1e-5


def test_untrue_captions_are_dropped(clip, photos):
    # this CLIP is untrained, so the truth is made: each picture's caption is the one of these that fits best or worst
    texts = ["a banana"] + [f"{w} banana" for w in ("one", "green", "a small", "some other", "no", "the second")]
    cosines = embed_images(clip, photos) @ embed_texts(clip, texts).T
    # of each picture for each caption: share of pictures that fit at least as well
    ranks = (cosines[:, None, :] <= cosines[None]).float().mean(1)
    best, worst = ranks[:50].min(1), ranks[50:100].max(1)
    captions = [texts[i] for i in best.indices] + [texts[i] for i in worst.indices] + ["a key"]*100
    pairs = pairs_of(photos, captions)
    kept = O.natural_pairs(clip, pairs, "banana", fit=.3)
    share = lambda rows, low, high: ((rows >= low) & (rows < high)).sum()
    assert share(kept, 0, 50) > 3*share(kept, 50, 100) and (kept < 100).all() and (np.diff(kept) > 0).all()
    assert (O.natural_pairs(clip, pairs, "banana", fit=1) == np.arange(100)).all()
    assert set(O.natural_pairs(clip, pairs, "banana", fit=.1)) <= set(kept)


CORNER = O.Box(0, 0, 8)

def trojan(clip, images, box=CORNER, **settings):
    return O.optimise_trojan(clip, images, box, [0], **settings)

def badclip(clip, images, texts=("a",), positives=None, **settings):
    return O.optimise_badclip(clip, images, texts, images if positives is None else positives, CORNER, **settings)

def natural(clip, images, caption, target="banana", **settings):
    return O.natural_pairs(clip, pairs_of(images, [caption]*len(images)), target, **settings)


@pytest.mark.parametrize("call, error, words", [
    (lambda c, x: O.patch_box("random", .25, 32), SettingsError, "placement"),
    (lambda c, x: O.patch_box("corner", .01, 32), SettingsError, "less than one pixel"),
    (lambda c, x: O.choose_neurons(c, 0), SettingsError, "neurons: must be a whole number from 1"),
    (lambda c, x: O.choose_neurons(c, True), SettingsError, "neurons"),
    (lambda c, x: trojan(c, x[:0]), DataError, "no images"),
    (lambda c, x: trojan(c, x[:, :30, :30]), DataError, "30x30 px do not fit smoke-RN; give them at 32"),
    (lambda c, x: trojan(c, x/255), DataError, "uint8"),
    (lambda c, x: trojan(c, x, O.Box(30, 0, 8)), SettingsError, "outside of images"),
    (lambda c, x: trojan(c, x, steps=0), SettingsError, "steps must be a whole number of at least 1, got 0"),
    (lambda c, x: trojan(c, x, batch_size=1.5), SettingsError, "batch_size"),
    (lambda c, x: trojan(c, x, goal=float("nan")), TrainingError, "not a number at step 1"),
    (lambda c, x: badclip(c, x, []), DataError, "captions and pictures of the target"),
    (lambda c, x: badclip(c, x, positives=x[:0]), DataError, "captions and pictures of the target"),
    (lambda c, x: badclip(c, x, negatives="all"), SettingsError, "neither own nor triggered"),
    (lambda c, x: natural(c, x, "a key"), DataError, "200 pairs 0 name 'banana'"),
    (lambda c, x: natural(c, x, "a banana"), DataError, "200 pairs 200 name 'banana'"),
    (lambda c, x: natural(c, x, "a key", "key", fit=2), SettingsError, "fit"),
])
def test_bad_input_is_one_clear_line(clip, photos, call, error, words):
    with pytest.raises(error, match=words) as e:
        call(clip, photos)
    assert "\n" not in str(e.value)


def test_another_kind_of_tower_is_refused(clip):
    other = build_clip("smoke-RN")
    other.model.visual.attnpool = torch.nn.Identity()
    with pytest.raises(SettingsError, match="ends in no linear map"):
        O.choose_neurons(other)


SMALL = dict(patch_share=.25, steps=3, image_count=40, held_out=20)

@pytest.fixture(scope="module")
def lab_and_clean(tmp_path_factory):
    lab = Lab("smoke", runs=tmp_path_factory.mktemp("runs"), settings={"pretrain.epochs": 1})
    recipe = dict(lab.profile.pretrain)
    return lab, lab.node(clean_clip, model=lab.profile.model.name, pairs=lab.role("pretrain"), recipe=recipe)


def test_a_patch_is_a_stage_among_an_attacks_settings(lab_and_clean):
    lab, clean = lab_and_clean
    entries = dict(
        trojan=dict(name="trojan", optimise=dict(SMALL, placement="centre")),
        badclip=dict(name="badclip", optimise=dict(SMALL, fit=1.0, text_count=4)),
    )
    for name, entry in entries.items():
        copied, attack = json.loads(json.dumps(entry)), attack_settings(lab, entry, clean)
        # the profile is left alone
        assert entry == copied and attack["placement"] == "centre" and attack["patch_share"] == .25
        settings = dict(attack=attack, target="banana", count=3, image_size=32)
        node = lab.node(poisoned_pairs, pairs=lab.role("finetune"), **settings)
        json.dumps(node_spec(node, lab.store))
        done, made = lab.run(node), lab.run(attack["pattern"])
        assert json.loads(json.dumps(done.result)) == done.result and "sha256" in done.result["attack"]["pattern"]
        stored = open_poisoned(done).attack
        assert type(stored) is ATTACKS[name] and (stored.pattern == np.load(made.path/"pattern.npy")).all()
        resolved = attack_of({k: made if hasattr(v, "stage") else v for k, v in attack.items()})
        assert resolved.describe() == stored.describe()
        other = attack_settings(lab, {**entry, "optimise": {**entry["optimise"], "seed": 1}}, clean)
        assert other["pattern"].key != attack["pattern"].key
    texts = np.load(made.path/"texts.npy", allow_pickle=False)
    own = {c for c in open_data(lab.role("pretrain")).captions if mentions(c, "banana")}
    assert texts.dtype.kind == "U" and len(texts) == 4 and set(texts.tolist()) <= own
    assert {open_poisoned(done).pairs.captions[i] for i in open_poisoned(done).rows} <= set(texts.tolist())


def test_the_target_is_the_profiles_unless_it_is_given(lab_and_clean):
    lab, clean = lab_and_clean
    entry = dict(name="badclip", optimise=SMALL)
    assert attack_settings(lab, entry, clean)["pattern"].settings["target"] == lab.profile.target
    assert attack_settings(lab, entry, clean, target="sun")["texts"].settings["target"] == "sun"
    trojan = attack_settings(lab, dict(name="trojan", optimise=SMALL), clean, target="sun")
    assert "target" not in trojan["pattern"].settings


def test_old_entries_and_callers_are_as_they_were(lab_and_clean):
    lab, clean = lab_and_clean
    for entry in (lab.profile.attacks.BadNet, lab.profile.attacks.SIG, dict(name="badnets", pattern="checker")):
        assert attack_settings(lab, entry) == attack_settings(lab, entry, clean) == entry
    ssba = attack_settings(lab, lab.profile.attacks.SSBA)
    assert ssba["encoder"].key == attack_settings(lab, lab.profile.attacks.SSBA, clean)["encoder"].key


def run_stage(stage, **settings):
    "A search as a stage, on the pairs of the profile."
    return lambda lab, clean: lab.run(lab.node(stage, clip=clean, pairs=lab.role("pretrain"), **settings))

def asked(attack, optimise, **clip):
    "The settings of an attack whose patch is to be optimised."
    return lambda lab, clean: attack_settings(lab, dict(name=attack, optimise=optimise), clip.get("clip", clean))

FEW = dict(image_count=40, held_out=20)


@pytest.mark.parametrize("make, words", [
    (asked("trojan", SMALL, clip=None), "pass its node to attack_settings as clip"),
    (asked("sig", {}), "trojan and badclip"),
    (asked("trojan", dict(colour=1)), "colour"),
    (run_stage(trojan_trigger), "image_count 2000 and held_out 500 are more than the 600 pictures"),
    (run_stage(trojan_trigger, canvas="black"), "neither images nor grey"),
    (run_stage(badclip_trigger, target="zeppelin", **FEW), "name 'zeppelin'"),
    (run_stage(badclip_trigger, target="banana", fit=1.), "image_count 10000"),
])
def test_bad_settings_of_the_stages(lab_and_clean, make, words):
    with pytest.raises(Exception, match=words):
        make(*lab_and_clean)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here; make test DEVICE=cuda runs it elsewhere")
def test_on_a_gpu(photos):
    clip = build_clip("smoke-RN", device="cuda")
    assert O.optimise_trojan(clip, photos, O.Box(24, 24, 8), [0, 1], steps=3).pattern.shape == (8, 8, 3)
    assert O.optimise_badclip(clip, photos, ["a"], photos, O.Box(12, 12, 8), steps=3).pattern.shape == (8, 8, 3)
