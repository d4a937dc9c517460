"Unlearnable pairs: the search does what it says, survives a kill to the same bytes, and refuses what cannot work."
import numpy as np, pytest, torch
import torch.nn.functional as F

from mcl_repro.attribution import quiet
from mcl_repro.clip import build_clip, embed_images, embed_tokens, encode_text, info_nce
from mcl_repro.data import open_data, resolve
from mcl_repro.errors import DataError, SettingsError
from mcl_repro.lab import Lab, load_profile
from mcl_repro.mem import (Material, Rounds, Search, accumulating, allowed_tokens, batch_triggers, found_pairs, hacker_clip, one_pass, search_triggers,
                           surrogate_loss, trigger_gradient, trigger_losses, unlearnable_pairs, update_noise)
from mcl_repro.protection import load_protection, with_triggers
from mcl_repro.semantic_triggers import split_words
from mcl_repro.training import Recipe, contrastive_loss, parameter_groups, train, training_set

EM, UAP = (dict(load_profile("mini").mem.methods[name].search) for name in ("EM", "UAP"))
SMALL = "world:retrieval_flickr8k_train:16"
RECIPE = dict(epochs=3, batch_size=20, learning_rate=1e-3, schedule="constant")

@pytest.fixture
def lab(tmp_path): return Lab("smoke", "cpu", tmp_path, module="mcl_repro.mem")

@pytest.fixture(scope="module")
def pairs(): return open_data(SMALL)

def material(clip, pairs, **settings):
    search = Search(**dict(dict(length=2, noise_steps=2, candidates=3), **settings))
    return Material(pairs, training_set(clip, pairs), search, allowed_tokens(clip.tokenizer, search))

def protect(lab, **settings): return lab.run(lab.node(unlearnable_pairs, **dict(dict(pairs=resolve(SMALL), model="smoke-RN", recipe=RECIPE, search=dict(length=2, noise_steps=2, candidates=3)), **settings)))

def test_the_same_settings_give_the_same_bytes(tmp_path):
    first, second = (protect(Lab("smoke", "cpu", tmp_path/name, module="mcl_repro.mem")) for name in "ab")
    for file in ("noise.npy", "triggers.npy"): assert (first.path/file).read_bytes() == (second.path/file).read_bytes()

def test_a_search_that_was_stopped_goes_on_to_the_same_bytes(tmp_path, pairs):
    def run(folder, stop_after=None):
        folder.mkdir(exist_ok=True)
        clip = build_clip("smoke-RN", seed=3); m = material(clip, pairs)
        rounds = Rounds(clip, m, folder, Recipe(**RECIPE), 4, 0.)
        if stop_after is not None:
            renew = rounds.renew
            def dying(passes):
                if passes < stop_after: return renew(passes)
                rounds.progress = lambda done, *rest: (_ for _ in ()).throw(KeyboardInterrupt) if done == 2 else None   # in the middle of a pass
                return renew(passes)
            rounds.renew = dying
            with pytest.raises(KeyboardInterrupt): train(clip, rounds.data, Recipe(**RECIPE), callbacks=[rounds], checkpoint=folder/"checkpoint.safetensors")
            return run(folder)
        history = train(clip, rounds.data, Recipe(**RECIPE), callbacks=[rounds], checkpoint=folder/"checkpoint.safetensors")
        noise, triggers = rounds.files(history[-1]["passes"])
        return noise.read_bytes(), triggers.read_bytes()
    assert run(tmp_path/"whole") == run(tmp_path/"stopped", stop_after=1)

def test_noise_keeps_to_its_bound_and_to_pictures(lab, pairs):
    made = protect(lab, search=dict(length=1, noise_steps=12, candidates=2, bound=5, step=2), recipe=dict(RECIPE, epochs=2))
    noise = load_protection(made.path, pairs.ids).noise
    pixels = pairs.image_array(size=32).astype(int)
    assert np.abs(noise.astype(int)).max() == 5
    assert (pixels + noise).min() >= 0 and (pixels + noise).max() <= 255

def test_minimising_lowers_the_loss_and_maximising_raises_it(pairs):
    clip = build_clip("smoke-RN"); data = training_set(clip, pairs)
    train(clip, data, Recipe(2, 20, 1e-3))
    images, tokens = data.images[data.image_rows], data.tokens
    none, text = torch.zeros(images.shape, dtype=torch.int8), embed_tokens(clip, data.tokens)
    def loss(noise): return info_nce(embed_images(clip, (images.short() + noise).clamp(0, 255).to(torch.uint8)), text, clip.model.logit_scale.exp()).item()
    empty = torch.zeros(len(tokens), 0, dtype=torch.long)
    low, high = (update_noise(clip, images, none, tokens, empty, Search(**settings)) for settings in (EM, UAP))
    assert loss(low) < loss(none) < loss(high)

def test_batched_search_is_the_search_one_by_one(pairs):
    clip = build_clip("smoke-RN", seed=1); data = training_set(clip, pairs); tokens = data.tokens[:30]
    u = embed_images(clip, data.images[data.image_rows[:30]]); now = torch.full((30, 3), 320)
    candidates = torch.randint(1000, 40000, (30, 3, 5), generator=torch.Generator().manual_seed(0))
    found, loss = search_triggers(clip, tokens, now, u, lambda place, known: candidates[:, place])
    by_hand, lowest = now, float("inf")
    for place in range(3):
        tried = [by_hand] + [torch.cat([by_hand[:, :place], candidates[:, place, k:k + 1], by_hand[:, place + 1:]], 1) for k in range(5)]
        with torch.no_grad(): losses = [float(info_nce(u, F.normalize(clip.model.encode_text(with_triggers(tokens, t)), dim=-1), clip.model.logit_scale.exp())) for t in tried]
        by_hand, lowest = tried[int(np.argmin(losses))], min(losses)
    assert torch.equal(found, by_hand) and abs(loss - lowest) < 1e-4

def test_a_wider_beam_contains_the_narrow_one_at_every_place(pairs):
    clip = build_clip("smoke-RN", seed=1); data = training_set(clip, pairs); tokens = data.tokens[:20]
    u = embed_images(clip, data.images[data.image_rows[:20]]); now = torch.full((20, 1), 320)
    candidates = torch.randint(1000, 40000, (20, 1, 12), generator=torch.Generator().manual_seed(0))
    losses = [search_triggers(clip, tokens, now, u, lambda place, known: candidates[:, place], beam)[1] for beam in (1, 4)]
    assert losses[0] == losses[1] <= float(trigger_losses(clip, tokens, now[None], u))

def test_gradients_add_up_as_without_zero_grad(pairs):
    by_loop, by_hand = build_clip("smoke-RN"), build_clip("smoke-RN")
    data, recipe = training_set(by_loop, pairs), Recipe(1, 20, 1e-3, schedule="constant")
    train(by_loop, data, recipe, loss=accumulating(contrastive_loss, 100))
    from mcl_repro.training import epoch_batches, iterate, seeded
    by_hand.model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(parameter_groups(by_hand.model, recipe.weight_decay), lr=1e-3, betas=recipe.betas, eps=1e-8, fused=True)
    torch.manual_seed(seeded(0, 2, 0))
    for batch in iterate(data, epoch_batches(len(data), recipe, 0), "cpu"):
        contrastive_loss(by_hand, batch).backward(); optimizer.step()
    for (name, a), b in zip(by_loop.model.named_parameters(), by_hand.model.parameters()): assert torch.allclose(a, b, atol=2e-5), name

def test_the_search_ends_when_the_surrogate_has_nothing_left_to_learn(lab):
    made = protect(lab, stop_below=1e9)
    assert made.result["stopped"] and made.result["rounds"] == 0 and not np.load(made.path/"noise.npy").any()

def test_em_and_uap_leave_captions_alone(lab):
    for settings, kind, recipe in ((EM, "EM", RECIPE), (UAP, "UAP", None)):
        made = protect(lab, search=dict(settings, noise_steps=2), recipe=recipe)
        stored = load_protection(made.path)
        assert stored.length == 0 and stored.method == kind and stored.noise.any()

def test_words_from_a_language_model_are_words_of_the_captions(lab, pairs):
    made = protect(lab, search=dict(length=2, noise_steps=1, words="ngram", candidates=3), recipe=dict(RECIPE, epochs=1))
    tokenizer, known = build_clip("smoke-RN").tokenizer, {w for c in pairs.captions for w in split_words(c.lower())} | {"the"}
    words = {tokenizer.decode([int(i)]).strip() for i in np.unique(np.load(made.path/"triggers.npy"))}
    assert len(words) > 1 and words <= known

def test_everything_goes_on_without_pictures_in_memory(tmp_path, pairs):
    clip = build_clip("smoke-RN", seed=1)
    near, far = (training_set(clip, pairs, limit) for limit in (.5, 0.))
    results = []
    for data in (near, far):
        better = np.zeros((len(pairs), 32, 32, 3), np.int8); triggers = np.full((len(pairs), 2), 320, np.int32)
        one_pass(clip, Material(pairs, data, Search(length=2, noise_steps=1, candidates=2), torch.arange(500, 900)), np.zeros_like(better), triggers, better, 0, 40)
        results.append((better, triggers))
    assert not far.resident
    for a, b in zip(*results): assert np.array_equal(a, b)

@pytest.mark.parametrize("settings, says", [
    (dict(search=dict(length=30)), "leaves no room"), (dict(search=dict(bound=200)), "at most 127"), (dict(search=dict(start="an")), "the, a, random"),
    (dict(search=dict(vocabulary="nouns")), "nouns"), (dict(search=dict(words="gpt")), "gpt"), (dict(model=None), "either model")])
def test_bad_settings_are_refused_before_any_work(lab, settings, says):
    with pytest.raises((SettingsError, DataError), match=says): protect(lab, **settings)

def test_a_protection_of_other_pairs_is_refused(lab):
    made = protect(lab)
    with pytest.raises(DataError, match="another data set"):
        lab.run(lab.node(hacker_clip, pairs=resolve("world:retrieval_coco_train:4"), model="smoke-RN", protection=made, recipe=dict(epochs=1, batch_size=20, learning_rate=1e-3)))

def test_noise_out_of_bound_is_found_when_it_is_read(lab):
    made = protect(lab)
    noise = np.load(made.path/"noise.npy"); noise[0, 0, 0, 0] = 100
    folder = made.path.parent/"copy"; folder.mkdir()
    for file in made.path.iterdir(): (folder/file.name).write_bytes(file.read_bytes())
    np.save(folder/"noise.npy", noise)
    with pytest.raises(DataError): load_protection(folder)

def test_a_hacker_who_cuts_triggers_sees_clean_captions(lab, pairs):
    stored = load_protection(protect(lab).path); clip = build_clip("smoke-RN")
    clean = training_set(clip, pairs).tokens
    assert torch.equal(found_pairs(clip, pairs, stored, removed_triggers=True).tokens, clean)
    assert not torch.equal(found_pairs(clip, pairs, stored).tokens, clean)
    with pytest.raises(SettingsError, match="as_text"): found_pairs(clip, pairs, stored, removed_triggers=True, as_text=True)
