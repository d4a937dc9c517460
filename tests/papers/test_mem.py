"Unlearnable pairs: the search does what it says, survives a kill to the same bytes, and refuses what cannot work."
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mcl_repro.papers import mem
from mcl_repro.model.clip import build_clip, embed_images, embed_tokens, info_nce
from mcl_repro.data.registry import open_data, resolve
from mcl_repro.core.errors import DataError, SettingsError
from mcl_repro.lab.lab import Lab
from mcl_repro.lab.profiles import load_profile
from mcl_repro.papers.mem import (
    accumulating, allowed_tokens, found_pairs, hacker_clip, Material, merged, one_pass, protect_pairs, Rounds,
    Search, search_triggers, throughout, trigger_losses, unlearnable_pairs, update_noise,
)
from mcl_repro.attacks.protection import load_protection, protected_training_set, Protection, with_triggers
from mcl_repro.attacks.semantic import split_words
from mcl_repro.model.training import contrastive_loss, Recipe, RowAdamW, train, training_set
from mcl_repro.model import training
from mcl_repro.model.training import Batch

EM, UAP = (dict(load_profile("mini").mem.methods[name].search) for name in ("EM", "UAP"))
SMALL = "world:retrieval_flickr8k_train:16"
RECIPE = dict(epochs=3, batch_size=20, learning_rate=1e-3, schedule="constant")

@pytest.fixture
def lab(tmp_path):
    return Lab("smoke", "cpu", tmp_path, module="mcl_repro.papers.mem")

@pytest.fixture(scope="module")
def pairs():
    return open_data(SMALL)

def material(clip, pairs, **settings):
    search = Search(**dict(dict(length=2, noise_steps=2, candidates=3), **settings))
    return Material(pairs, training_set(clip, pairs), search, allowed_tokens(clip.tokenizer, search))

def protect(lab, **settings):
    return lab.run(lab.node(
        unlearnable_pairs,
        **dict(
            dict(
                pairs=resolve(SMALL), model="smoke-RN", recipe=RECIPE,
                search=dict(length=2, noise_steps=2, candidates=3),
            ),
            **settings,
        ),
    ))

def test_the_same_settings_give_the_same_bytes(tmp_path):
    first, second = (protect(Lab("smoke", "cpu", tmp_path/name, module="mcl_repro.papers.mem")) for name in "ab")
    for file in ("noise.npy", "triggers.npy"):
        assert (first.path/file).read_bytes() == (second.path/file).read_bytes()

def test_a_search_that_was_stopped_goes_on_to_the_same_bytes(tmp_path, pairs):
    def run(folder, stop_after=None):
        folder.mkdir(exist_ok=True)
        clip = build_clip("smoke-RN", seed=3)
        m = material(clip, pairs)
        rounds = Rounds(clip, m, folder, Recipe(**RECIPE), 4, 0.)
        if stop_after is not None:
            renew = rounds.renew
            def dying(passes):
                if passes < stop_after:
                    return renew(passes)
                # in the middle of a pass
                rounds.progress = lambda done, *rest: (_ for _ in ()).throw(KeyboardInterrupt) if done == 2 else None
                return renew(passes)
            rounds.renew = dying
            with pytest.raises(KeyboardInterrupt):
                train(
                    clip, rounds.data, Recipe(**RECIPE), callbacks=[rounds],
                    checkpoint=folder / "checkpoint.safetensors",
                )
            return run(folder)
        history = train(
            clip, rounds.data, Recipe(**RECIPE), callbacks=[rounds], checkpoint=folder / "checkpoint.safetensors"
        )
        noise, triggers = rounds.files(history[-1]["passes"])
        return noise.read_bytes(), triggers.read_bytes()
    assert run(tmp_path/"whole") == run(tmp_path/"stopped", stop_after=1)

QUICK = dict(
    search=Search(length=2, noise_steps=2, candidates=3), recipe=Recipe(**dict(RECIPE, epochs=2)), round_steps=3
)

def protect_here(pairs, folder, weights=3, **settings):
    "What `protect_pairs` leaves in a folder, by file."
    protect_pairs(build_clip("smoke-RN", seed=weights), pairs, folder, **dict(QUICK, **settings))
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()}

def dies_once(monkeypatch, name, call=1):
    "A function of mem that is killed at one of its calls."
    real, calls = getattr(mem, name), []
    def dying(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*args, **kwargs)
    monkeypatch.setattr(mem, name, dying)

@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("settings", [dict(), dict(recipe=None)])
def test_a_kill_while_the_result_is_written_loses_nothing(tmp_path, pairs, monkeypatch, given, settings):
    settings = dict(settings, scratch=tmp_path/"scratch" if given else None)
    for name in ("whole", "killed"):
        (tmp_path/name).mkdir()
    whole = protect_here(pairs, tmp_path/"whole", **dict(settings, scratch=None))
    dies_once(monkeypatch, "save_protection")
    with pytest.raises(KeyboardInterrupt):
        protect_here(pairs, tmp_path/"killed", **settings)
    searched = []
    monkeypatch.setattr(mem, "one_pass", lambda *args, real=mem.one_pass: searched.append(1) or real(*args))
    assert protect_here(pairs, tmp_path / "killed", **settings) == whole
    assert load_protection(tmp_path / "killed", pairs.ids).noise.any()
    assert len(searched) == (0 if "recipe" not in settings else 1), "a search that was finished is not made again"

def test_a_stage_whose_end_fails_goes_on_from_its_scratch(tmp_path, monkeypatch):
    whole, killed = (Lab("smoke", "cpu", tmp_path/name, module="mcl_repro.papers.mem") for name in ("whole", "killed"))
    wanted = protect(whole)
    dies_once(monkeypatch, "save_protection")
    with pytest.raises(KeyboardInterrupt):
        protect(killed)
    made = protect(killed)
    for file in ("noise.npy", "triggers.npy", "protection.json"):
        assert (made.path/file).read_bytes() == (wanted.path/file).read_bytes()
    assert made.result == wanted.result

def test_only_a_scratch_folder_of_its_own_is_removed_and_the_checkpoint_first(tmp_path, pairs, monkeypatch):
    held = []
    monkeypatch.setattr(
        mem,
        "shutil",
        SimpleNamespace(
            copyfile=shutil.copyfile,
            rmtree=lambda folder, **how: (
                held.append({f.name for f in folder.iterdir()}),
                shutil.rmtree(folder, **how),
            ),
        ),
    )
    assert set(protect_here(pairs, tmp_path/"own")) == {"noise.npy", "triggers.npy", "ids.json", "protection.json"}
    assert [f.name for f in tmp_path.iterdir()] == ["own"] and not any(f.is_dir() for f in (tmp_path/"own").iterdir())
    assert len(held) == 1 and "noise-0.npy" in held[0] and "checkpoint.safetensors" not in held[0]
    protect_here(pairs, tmp_path/"given", scratch=tmp_path/"scratch")
    assert len(held) == 1 and (tmp_path/"scratch"/"checkpoint.safetensors").exists()

def test_noise_that_was_published_is_not_written_over_by_the_next_search(tmp_path, pairs):
    uap = dict(recipe=None, scratch=tmp_path/"scratch")
    first = protect_here(pairs, tmp_path/"first", search=Search(**UAP), **uap)
    second = protect_here(pairs, tmp_path/"second", search=Search(**EM), **uap)
    assert second["noise.npy"] != first["noise.npy"] == (tmp_path/"first"/"noise.npy").read_bytes()
    load_protection(tmp_path/"first")

def test_noise_is_copied_where_files_cannot_have_two_names(tmp_path, pairs, monkeypatch):
    linked = protect_here(pairs, tmp_path/"linked")
    def refuse(*names):
        raise OSError("no links here")
    monkeypatch.setattr(mem.os, "link", refuse)
    assert protect_here(pairs, tmp_path/"copied") == linked

@pytest.mark.parametrize("other, says", [
    (dict(search=replace(QUICK["search"], length=1)), "search.length 2 there, 1 here"),
    (dict(recipe=replace(QUICK["recipe"], epochs=3)), "recipe.epochs 2 there, 3 here"),
    (dict(round_steps=4), "round_steps 3 there, 4 here"),
    (dict(stop_below=.5), "stop_below 0.01 there, 0.5 here"),
    (dict(accumulate=True), "accumulate False there, True here"),
    (dict(weights=4), "weights "),
    (dict(seed=4), "seed 0 there, 4 here"),
    (dict(pairs="world:retrieval_flickr8k_train:17"), "pairs "),
    (dict(recipe=None), "recipe.epochs 2 there, None here"),
])
def test_a_scratch_folder_of_another_search_is_refused(tmp_path, pairs, monkeypatch, other, says):
    dies_once(monkeypatch, "one_pass", 2)                # the first round is done
    (tmp_path/"out").mkdir()
    (tmp_path/"scratch").mkdir()
    with pytest.raises(KeyboardInterrupt):
        protect_here(pairs, tmp_path/"out", scratch=tmp_path/"scratch")
    before = {f.name: f.read_bytes() for f in (tmp_path/"scratch").iterdir()}
    with pytest.raises(SettingsError, match=says) as told:
        protect_here(
            open_data(other["pairs"]) if "pairs" in other else pairs, tmp_path / "out", scratch=tmp_path / "scratch",
            **{k: v for k, v in other.items() if k != "pairs"},
        )
    assert "empty this one" in str(told.value) and "\n" not in str(told.value)
    assert {f.name: f.read_bytes() for f in (tmp_path/"scratch").iterdir()} == before
    protect_here(pairs, tmp_path/"out", scratch=tmp_path/"scratch")

def test_a_checkpoint_of_something_else_is_refused(tmp_path, pairs):
    clip = build_clip("smoke-RN", seed=1)
    train(clip, training_set(clip, pairs), Recipe(1, 20, 1e-3), checkpoint=tmp_path/"checkpoint.safetensors")
    with pytest.raises(SettingsError, match="no note of what it belongs to"):
        protect_here(pairs, tmp_path/"out", scratch=tmp_path)

@pytest.mark.parametrize("free", [None, 0])
def test_the_surrogate_sees_what_a_hacker_would_find_and_captions_are_read_once(tmp_path, pairs, monkeypatch, free):
    if free is not None:
        for module in (training, mem):
            monkeypatch.setattr(module, "free_memory", lambda device: free)
    clip = build_clip("smoke-RN", seed=3)
    m = material(clip, pairs)
    rounds = Rounds(clip, m, tmp_path, Recipe(**RECIPE), 6, 0.)
    rounds.start()
    rounds.renew(0)
    noise, triggers = (np.load(file) for file in rounds.files(1))
    wanted = protected_training_set(clip, pairs, Protection(pairs.ids, noise, triggers))
    monkeypatch.setattr(training, "tokenize", lambda *args: pytest.fail("captions were tokenised again"))
    rounds.load(1, 5)
    order = rounds.data.image_rows
    assert noise.any()
    assert rounds.data.resident == wanted.resident == (free is None)
    assert rounds.data.image_size == wanted.image_size
    def pixels(data):
        return data.images if data.resident else torch.from_numpy(data.images.array(size=32))
    assert torch.equal(pixels(rounds.data), pixels(wanted)) and len(order) == 6 * 20 and order.dtype == torch.int64
    assert torch.equal(rounds.data.tokens, wanted.tokens[order]) and torch.equal(order, wanted.image_rows[order])

@pytest.mark.parametrize("length", [1, 3])
def test_throughout_exchanges_captions_and_leaves_triggers(pairs, length):
    clip = build_clip("smoke-RN")
    tokens = training_set(clip, pairs).tokens[:30]
    triggers = torch.arange(1000, 1000 + 30 * length).view(30, length)
    batch = Batch(torch.zeros(30, 3, 32, 32, dtype=torch.uint8), with_triggers(tokens, triggers), torch.arange(30), 4)
    seen = throughout(lambda clip, b: b.tokens, length, seed=2)(clip, batch)
    assert torch.equal(seen[:, 1:1 + length], triggers) and not torch.equal(seen, batch.tokens)
    assert sorted(map(tuple, seen[:, 1 + length :].tolist())) == sorted(
        map(tuple, batch.tokens[:, 1 + length :].tolist())
    )

def test_noise_keeps_to_its_bound_and_to_pictures(lab, pairs):
    made = protect(
        lab, search=dict(length=1, noise_steps=12, candidates=2, bound=5, step=2), recipe=dict(RECIPE, epochs=2)
    )
    noise = load_protection(made.path, pairs.ids).noise
    pixels = pairs.image_array(size=32).astype(int)
    assert np.abs(noise.astype(int)).max() == 5
    assert (pixels + noise).min() >= 0 and (pixels + noise).max() <= 255

def test_minimising_lowers_the_loss_and_maximising_raises_it(pairs):
    clip = build_clip("smoke-RN")
    data = training_set(clip, pairs)
    train(clip, data, Recipe(2, 20, 1e-3))
    images, tokens = data.images[data.image_rows], data.tokens
    none, text = torch.zeros(images.shape, dtype=torch.int8), embed_tokens(clip, data.tokens)
    def loss(noise):
        return info_nce(
            embed_images(clip, (images.short() + noise).clamp(0, 255).to(torch.uint8)), text,
            clip.model.logit_scale.exp(),
        ).item()
    empty = torch.zeros(len(tokens), 0, dtype=torch.long)
    low, high = (update_noise(clip, images, none, tokens, empty, Search(**settings)) for settings in (EM, UAP))
    assert loss(low) < loss(none) < loss(high)

def test_batched_search_is_the_search_one_by_one(pairs):
    clip = build_clip("smoke-RN", seed=1)
    data = training_set(clip, pairs)
    tokens = data.tokens[:30]
    u = embed_images(clip, data.images[data.image_rows[:30]])
    now = torch.full((30, 3), 320)
    candidates = torch.randint(1000, 40000, (30, 3, 5), generator=torch.Generator().manual_seed(0))
    found, loss = search_triggers(clip, tokens, now, u, lambda place, known: candidates[:, place])
    by_hand, lowest = now, float("inf")
    for place in range(3):
        tried = [by_hand] + [
            torch.cat([by_hand[:, :place], candidates[:, place, k : k + 1], by_hand[:, place + 1 :]], 1)
            for k in range(5)
        ]
        with torch.no_grad():
            losses = [
                float(info_nce(
                    u, F.normalize(clip.model.encode_text(with_triggers(tokens, t)), dim=-1),
                    clip.model.logit_scale.exp(),
                ))
                for t in tried
            ]
        by_hand, lowest = tried[int(np.argmin(losses))], min(losses)
    assert torch.equal(found, by_hand) and abs(loss - lowest) < 1e-4

def test_a_wider_beam_contains_the_narrow_one_at_every_place(pairs):
    clip = build_clip("smoke-RN", seed=1)
    data = training_set(clip, pairs)
    tokens = data.tokens[:20]
    u = embed_images(clip, data.images[data.image_rows[:20]])
    now = torch.full((20, 1), 320)
    candidates = torch.randint(1000, 40000, (20, 1, 12), generator=torch.Generator().manual_seed(0))
    losses = [
        search_triggers(clip, tokens, now, u, lambda place, known: candidates[:, place], beam)[1] for beam in (1, 4)
    ]
    assert losses[0] == losses[1] <= float(trigger_losses(clip, tokens, now[None], u))

def test_gradients_add_up_as_without_zero_grad(pairs):
    by_loop, by_hand = build_clip("smoke-RN"), build_clip("smoke-RN")
    data, recipe = training_set(by_loop, pairs), Recipe(1, 20, 1e-3, schedule="constant")
    train(by_loop, data, recipe, loss=accumulating(contrastive_loss, 100))
    from mcl_repro.core.seeds import seeded
    from mcl_repro.model.training import epoch_batches, iterate
    by_hand.model.to(memory_format=torch.channels_last).train()
    optimizer = RowAdamW(by_hand.model, recipe)
    torch.manual_seed(seeded(0, 2, 0))
    for batch in iterate(data, epoch_batches(len(data), recipe, 0), "cpu"):
        contrastive_loss(by_hand, batch).backward()
        optimizer.step()
    by_zeroed = build_clip("smoke-RN")
    train(by_zeroed, data, recipe)
    loop, hand, zeroed = (
        torch.cat([p.detach().flatten() for p in clip.model.parameters()]) for clip in (by_loop, by_hand, by_zeroed)
    )
    # sums in another order: where a gradient is nothing but rounding, Adam's division makes a step of it
    assert (loop - hand).norm() < 0.05 * (loop - zeroed).norm()

def test_the_search_ends_when_the_surrogate_has_nothing_left_to_learn(lab):
    made = protect(lab, stop_below=1e9)
    assert made.result["stopped"] and made.result["rounds"] == 0 and not np.load(made.path/"noise.npy").any()

def test_em_and_uap_leave_captions_alone(lab):
    for settings, kind, recipe in ((EM, "EM", RECIPE), (UAP, "UAP", None)):
        made = protect(lab, search=dict(settings, noise_steps=2), recipe=recipe)
        stored = load_protection(made.path)
        assert stored.length == 0 and stored.method == kind and stored.noise.any()

def test_words_from_a_language_model_are_words_of_the_captions(lab, pairs):
    made = protect(
        lab, search=dict(length=2, noise_steps=1, words="ngram", candidates=3), recipe=dict(RECIPE, epochs=1)
    )
    tokenizer = build_clip("smoke-RN").tokenizer
    known = {w for c in pairs.captions for w in split_words(c.lower())} | {"the"}
    words = {tokenizer.decode([int(i)]).strip() for i in np.unique(np.load(made.path/"triggers.npy"))}
    assert len(words) > 1 and words <= known

def test_everything_goes_on_without_pictures_in_memory(tmp_path, pairs):
    clip = build_clip("smoke-RN", seed=1)
    near, far = (training_set(clip, pairs, limit) for limit in (.5, 0.))
    results = []
    for data in (near, far):
        better = np.zeros((len(pairs), 32, 32, 3), np.int8)
        triggers = np.full((len(pairs), 2), 320, np.int32)
        one_pass(
            clip, Material(pairs, data, Search(length=2, noise_steps=1, candidates=2), torch.arange(500, 900)),
            np.zeros_like(better), triggers, better, 0, 40,
        )
        results.append((better, triggers))
    assert not far.resident
    for a, b in zip(*results):
        assert np.array_equal(a, b)

@pytest.mark.parametrize("settings, says", [
    (dict(search=dict(length=30)), "leaves no room"),
    (dict(search=dict(bound=200)), "at most 127"),
    (dict(search=dict(start="an")), "the, a, random"),
    (dict(search=dict(vocabulary="nouns")), "nouns"),
    (dict(search=dict(words="gpt")), "gpt"),
    (dict(model=None), "either model"),
])
def test_bad_settings_are_refused_before_any_work(lab, settings, says):
    with pytest.raises((SettingsError, DataError), match=says):
        protect(lab, **settings)

def test_a_protection_of_other_pairs_is_refused(lab):
    made = protect(lab)
    with pytest.raises(DataError, match="another data set"):
        lab.run(lab.node(
            hacker_clip, pairs=resolve("world:retrieval_coco_train:4"), model="smoke-RN", protection=made,
            recipe=dict(epochs=1, batch_size=20, learning_rate=1e-3),
        ))

def test_noise_out_of_bound_is_found_when_it_is_read(lab):
    made = protect(lab)
    noise = np.load(made.path/"noise.npy")
    noise[0, 0, 0, 0] = 100
    folder = made.path.parent/"copy"
    folder.mkdir()
    for file in made.path.iterdir():
        (folder/file.name).write_bytes(file.read_bytes())
    np.save(folder/"noise.npy", noise)
    with pytest.raises(DataError):
        load_protection(folder)

def test_a_hacker_who_cuts_triggers_sees_clean_captions(lab, pairs):
    stored = load_protection(protect(lab).path)
    clip = build_clip("smoke-RN")
    clean = training_set(clip, pairs).tokens
    assert torch.equal(found_pairs(clip, pairs, stored, removed_triggers=True).tokens, clean)
    assert not torch.equal(found_pairs(clip, pairs, stored).tokens, clean)
    with pytest.raises(SettingsError, match="as_text"):
        found_pairs(clip, pairs, stored, removed_triggers=True, as_text=True)

def test_settings_are_merged_block_by_block():
    base = dict(search=dict(bound=8, step=1), recipe=dict(epochs=5))
    assert merged(base, dict(search=dict(bound=4))) == dict(search=dict(bound=4, step=1), recipe=dict(epochs=5))
    assert merged(base, dict(recipe=None)) == dict(search=dict(bound=8, step=1), recipe=None)
    assert merged(base, None) == base and merged(base, dict(words="bert")) == dict(base, words="bert")
