"Hiding bits in pictures: bytes that do not depend on the batch, what is learnt, and bad input."
import json

import numpy as np
import pytest
import torch

from mcl_repro.attacks import steganography as S
from mcl_repro.data.registry import open_data
from mcl_repro.core.errors import DataError, SettingsError, TrainingError
from mcl_repro.lab.lab import Lab
from mcl_repro.lab.nodes import node_spec
from mcl_repro.papers.stages import attack_of, attack_settings, open_poisoned, poisoned_pairs
from mcl_repro.attacks.base import distortion, make_attack, SSBA, trigger_images


@pytest.fixture(scope="module")
def trained():
    "Encoder, decoder and unseen pictures, after a short training."
    seen, unseen = np.split(open_data("world:pretrain:700").image_array(None, 32), [600])
    encoder, decoder = S.build_steganography(8)
    S.train_steganography(encoder, decoder, seen, steps=150)
    return encoder, decoder, unseen


def noise(n, height, width=None, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, height, width or height, 3)).astype(np.uint8)


def test_bits_survive_bytes_on_unseen_pictures(trained):
    encoder, decoder, unseen = trained
    bits = np.random.default_rng(3).integers(0, 2, (len(unseen), 8))
    stamped = S.hide(encoder, unseen, bits)
    assert stamped.dtype == np.uint8 and S.bit_accuracy(S.reveal(decoder, stamped), bits).mean() > .95
    assert abs(S.bit_accuracy(S.reveal(decoder, unseen), bits).mean() - .5) < .1
    changed = distortion(unseen, stamped)
    assert changed["linf"].max() <= 16 and changed["psnr"].mean() > 24


@pytest.mark.parametrize("size", [(32, 32), (33, 65), (224, 224)])
def test_any_size_and_any_batch_give_the_same_bytes(trained, size):
    encoder, secret = trained[0], S.secret_bits(8)
    x = noise(13, *size)
    before, whole = x.copy(), S.hide(encoder, x, secret)
    assert whole.shape == x.shape and (x == before).all() and (whole != x).any((1, 2, 3)).all()
    assert (np.concatenate([S.hide(encoder, x[i:i + 1], secret) for i in range(13)]) == whole).all()
    order = np.random.default_rng(0).permutation(13)
    assert (S.hide(encoder, x[order], secret) == whole[order]).all()
    assert (S.hide(encoder, x, np.tile(secret, (13, 1))) == whole).all()


def test_stamping_is_fast(trained):
    import time
    x, start = noise(500, 32), time.process_time()
    trigger_images(SSBA(S.encoder_array(trained[0]), 8), x)
    assert time.process_time() - start < 2   # about 0.25 s on one idle core


def test_the_bound_holds_whatever_the_weights():
    encoder, _ = S.build_steganography(8, strength=3)
    with torch.no_grad():
        [p.mul_(50) for p in encoder.parameters()]
    x = noise(4, 40)
    assert np.abs(S.hide(encoder, x, S.secret_bits(8)).astype(int) - x).max() == 3


def test_seeds_decide():
    x, runs = noise(40, 32), {}
    for name, (a, b) in dict(one=(0, 0), same=(0, 0), weights=(1, 0), batches=(0, 1)).items():
        torch.manual_seed(len(name))   # the global generator does not matter, and is left alone
        state = torch.get_rng_state()
        encoder, decoder = S.build_steganography(4, seed=a)
        losses = S.train_steganography(encoder, decoder, x, steps=3, batch_size=4, seed=b)
        assert (torch.get_rng_state() == state).all() and np.isfinite(losses).all()
        runs[name] = S.encoder_array(encoder)
    assert (runs["one"] == runs["same"]).all() and all((runs["one"] != runs[n]).any() for n in ("weights", "batches"))
    assert len({tuple(S.secret_bits(64, s)) for s in range(5)}) == 5


def test_an_encoder_survives_as_an_array(trained):
    again = S.encoder_from(S.encoder_array(trained[0]), 8)
    x = noise(3, 32)
    assert (S.hide(again, x, S.secret_bits(8)) == S.hide(trained[0], x, S.secret_bits(8))).all()


def train(images, **settings):
    return S.train_steganography(*S.build_steganography(4), images, **settings)


@pytest.mark.parametrize("call, error, words", [
    (lambda e, d: S.build_steganography(0), SettingsError, "bits .*1 to 1024, got 0"),
    (lambda e, d: S.build_steganography(8, canvas=8), SettingsError, "canvas"),
    (lambda e, d: S.build_steganography(8, canvas=40), SettingsError, "multiple of the 16 px"),
    (lambda e, d: S.build_steganography(8, strength=.5), SettingsError, "strength"),
    (lambda e, d: S.build_steganography(8, strength=256), SettingsError, "strength"),
    (lambda e, d: S.encoder_from(S.encoder_array(e), 9), SettingsError, "encoder: needs .* bits=9"),
    (lambda e, d: S.encoder_from(S.encoder_array(e)[:-1], 8), SettingsError, "encoder: needs"),
    (lambda e, d: S.encoder_from(S.encoder_array(e)*np.float32("nan"), 8), SettingsError, "finite"),
    (lambda e, d: S.encoder_from(dict(bits=8), 8), SettingsError, "got dict"),
    (lambda e, d: SSBA(S.encoder_array(e)), SettingsError, "bits=100"),
    (lambda e, d: SSBA(S.encoder_array(e), bits=0), SettingsError, "bits"),
    (lambda e, d: make_attack("ssba"), SettingsError, "needs the setting 'encoder'"),
    (lambda e, d: S.hide(e, noise(1, 31), S.secret_bits(8)), DataError, "31x31 px are smaller than the canvas of 32"),
    (lambda e, d: S.hide(e, noise(1, 64, 16), S.secret_bits(8)), DataError, "smaller than the canvas"),
    (lambda e, d: S.hide(e, noise(1, 32)/255, S.secret_bits(8)), DataError, "uint8"),
    (lambda e, d: S.hide(e, noise(2, 32), S.secret_bits(7)), SettingsError, "trained for 8"),
    (lambda e, d: S.hide(e, noise(2, 32), np.full(8, 2)), SettingsError, "zeros and ones"),
    (lambda e, d: S.hide(e, noise(2, 32), np.zeros((3, 8))), SettingsError, "3 messages given for 2 images"),
    (lambda e, d: S.reveal(d, noise(1, 20)), DataError, "smaller"),
    (lambda e, d: train(noise(4, 32), steps=0), SettingsError, "steps"),
    (lambda e, d: train(noise(0, 32)), DataError, "no images"),
    (lambda e, d: train(noise(9, 32), steps=9, learning_rate=1e9), TrainingError, "not a number"),
])
def test_bad_input_is_one_clear_line(trained, call, error, words):
    with pytest.raises(error, match=words) as e:
        call(*trained[:2])
    assert "\n" not in str(e.value)


def test_the_encoder_is_a_stage_among_an_attacks_settings(tmp_path):
    lab = Lab("smoke", runs=tmp_path)
    entry = dict(name="ssba", message_seed=5, encoder=dict(bits=6, strength=20, steps=4, image_count=60, held_out=20))
    attack = attack_settings(lab, entry)
    # the profile is left alone
    assert entry["encoder"] == dict(bits=6, strength=20, steps=4, image_count=60, held_out=20)
    assert (attack["bits"], attack["strength"], attack["canvas"], attack["message_seed"]) == (6, 20, 32, 5)
    node = lab.node(poisoned_pairs, pairs=lab.role("finetune"), attack=attack, target="banana", count=3, image_size=32)
    json.dumps(node_spec(node, lab.store))
    done, made = lab.run(node), lab.run(attack["encoder"])
    assert set(made.result) == {"bits", "bit_accuracy", "psnr", "linf"} and 0 < made.result["linf"] <= 20
    told = done.result["attack"]
    assert json.loads(json.dumps(told)) == told and "sha256" in told["encoder"]
    stored = open_poisoned(done).attack
    same = attack_of({**attack, "encoder": made})
    assert (stored.encoder == same.encoder).all() and stored.describe() == same.describe()
    assert attack_settings(lab, lab.profile.attacks.BadNet) == lab.profile.attacks.BadNet
    other = attack_settings(lab, {**entry, "encoder": {**entry["encoder"], "seed": 1}})
    assert other["encoder"].key != attack["encoder"].key
