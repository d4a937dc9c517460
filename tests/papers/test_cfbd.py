"CFBD: scores against the naive formulas, memory and blocks, fallbacks, bad input, and the stages in profile smoke."
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings as hypothesis_settings, strategies as st
from safetensors.torch import save_file

from mcl_repro.papers import cfbd
from mcl_repro.papers.cfbd import (
    benign_level, benign_region, caption_core, chance_likeness, coarse_split, CoarseSplit, Consistency,
    cross_modality_consistency, detect, fine_stage, fit_mixture, generated_embeddings, guard_level, leave_one_out,
    load_mapping, MappingNetwork, Mixture, save_mapping, textual_correlation, train_mapping,
)
from mcl_repro.model.clip import build_clip, Clip, embed_texts
from mcl_repro.data.registry import open_data
from mcl_repro.core.errors import DataError, SettingsError
from mcl_repro.measures.metrics import detection_quality, detection_rates
from mcl_repro.model.training import Recipe
from mcl_repro.model import training
from mcl_repro.model.training import _step, training_set

unit = lambda x: (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def pairs(n=3000, poisoned=60, wrong=.02, seed=0, d=48, things=40):
    "Embeddings with known poison in the first rows: images of anything, captions of thing 0."
    rng, world = np.random.default_rng(seed), np.random.default_rng(7)
    centres, step = unit(world.normal(size=(things, d))), world.normal(size=d) * .1
    thing = rng.integers(0, things, n)
    said = thing.copy()
    astray = rng.random(n) < wrong
    said[astray] = rng.integers(0, things, astray.sum())
    said[:poisoned], thing[:poisoned] = 0, rng.integers(1, things, poisoned)
    noise = lambda: rng.normal(size=(n, d)) * .06
    return unit(centres[thing] + noise()), unit(centres[said] + step + noise()), np.arange(n) < poisoned


@pytest.fixture(scope="module")
def mapping():
    images, texts, _ = (torch.from_numpy(a) for a in pairs(wrong=0., poisoned=0, seed=1))
    return train_mapping(images, texts, range(3000), Recipe(epochs=8, batch_size=100, learning_rate=3e-3), hidden=16)


def cosine(a, b):
    return float(
        np.dot(a.astype(float), b.astype(float)) / np.linalg.norm(a.astype(float)) / np.linalg.norm(b.astype(float))
    )


# ---- scores

def test_consistency_is_equations_1_to_4(mapping):
    images, texts, _ = pairs(200, 10)
    texts[150:] = images[150:]
    made = mapping(torch.from_numpy(images)).detach().numpy()
    found = cross_modality_consistency(images, texts, mapping, chunk=64)
    original, generated = ([max(cosine(i, t), 0) for i, t in zip(images, other)] for other in (texts, made))
    assert np.abs(found.original - original).max() < 1e-5 and np.abs(found.generated - generated).max() < 1e-5
    assert (found.original == 0).any()                                    # the rectifier is at work here
    assert np.abs(found.value - np.abs(np.subtract(generated, original))).max() < 1e-5
    assert (found.signed < 0).any()
    assert (found.value >= 0).all()


@pytest.mark.parametrize("rows", [[5], [0, 199], list(range(50))])
def test_textual_correlation_is_the_double_loop(rows):
    texts = pairs(200, 10)[1] * np.linspace(.1, 9, 200)[:, None].astype(np.float32)
    naive = [np.mean([cosine(texts[u], texts[j]) for j in rows]) for u in range(200)]
    assert np.abs(textual_correlation(texts, rows, chunk=37) - naive).max() < 1e-5


def test_leaving_one_out_is_the_double_loop_without_oneself():
    texts, rows = pairs(200, 10)[1], np.array([3, 8, 20, 150])
    naive = [np.mean([cosine(texts[u], texts[j]) for j in rows if j != u]) for u in rows]
    assert np.abs(leave_one_out(textual_correlation(texts, rows), rows) - naive).max() < 1e-5


@given(n=st.integers(8, 90), chunk=st.integers(1, 100), threads=st.integers(1, 3))
@hypothesis_settings(max_examples=15, deadline=None)
def test_neither_blocks_nor_threads_change_a_score(n, chunk, threads):
    images, texts, _ = pairs(n, 2, d=8)
    network = MappingNetwork(8, 4)
    torch.nn.init.normal_(network.down.weight, generator=torch.Generator().manual_seed(0))
    whole, before = cross_modality_consistency(images, texts, network), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        parts = cross_modality_consistency(images, texts, network, chunk=chunk)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert np.abs(parts.value - whole.value).max() < 1e-6
    assert np.abs(textual_correlation(texts, [0, 3], chunk=chunk) - textual_correlation(texts, [0, 3])).max() < 1e-6


@pytest.mark.parametrize("kind", ["float16", "mapped", "tensor", "bfloat16 tensor", "longer"])
def test_embeddings_of_any_kind_give_the_same(tmp_path, mapping, kind):
    images, texts, _ = pairs(300, 10)
    expected = detect(images, texts, mapping, q=20)
    def other(name, a):
        if kind == "mapped":
            np.save(tmp_path/f"{name}.npy", a.astype(np.float16))
            return np.load(tmp_path/f"{name}.npy", mmap_mode="r")
        return dict(float16=lambda: a.astype(np.float16), tensor=lambda: torch.from_numpy(a), longer=lambda: a * 7).get(
            kind, lambda: torch.from_numpy(a).bfloat16()
        )()
    plain = lambda a: (a.float().numpy() if isinstance(a, torch.Tensor) else np.array(a)).copy()
    images, texts = other("images", images), other("texts", texts)
    kept = [plain(a) for a in (images, texts)]
    found = detect(images, texts, mapping, q=20)
    eps = 1e-5 if kind in ("tensor", "longer") else 2e-2 if "b" in kind else 2e-3
    assert np.abs(found.consistency.value - expected.consistency.value).max() < eps
    assert np.abs(found.correlation - expected.correlation).max() < 3 * eps
    assert all((plain(a) == k).all() for a, k in zip((images, texts), kept))   # inputs are left as they were


def test_memory_does_not_grow_with_the_number_of_pairs():
    "But for the scores: sources that make their rows when asked, 30 times as many of them."
    class Source:
        def __init__(self, n):
            self.shape = (n, 256)
        def __len__(self):
            return self.shape[0]
        def __getitem__(self, rows):
            return np.random.default_rng(rows.start).standard_normal((rows.stop - rows.start, 256)).astype(np.float16)
    def peak(n):
        tracemalloc.start()
        scores = cross_modality_consistency(Source(n), Source(n), MappingNetwork(256, 4), chunk=500)
        textual_correlation(Source(n), [0, 1], chunk=500)
        size = tracemalloc.get_traced_memory()[1]
        assert len(scores.value) == n
        tracemalloc.stop()
        return size
    peak(500)
    assert peak(30_000) - peak(1_000) < 1_000_000      # 30,000 embeddings would be 30 MB


# ---- mixture and regions

def test_the_mixture_is_found_and_repeatable():
    rng = np.random.default_rng(0)
    values = np.abs(
        np.concatenate([rng.normal(m, s, n) for m, s, n in ((0.1, 0.02, 4000), (0.3, 0.03, 2000), (0.7, 0.05, 500))])
    )
    found = fit_mixture(values, 3)
    again = fit_mixture(values, 3)
    assert np.abs(found.means - [0.1, 0.3, 0.7]).max() < 0.01
    assert np.abs(found.deviations - [0.02, 0.03, 0.05]).max() < 0.01
    assert abs(found.weights.sum() - 1) < 1e-9
    assert all((a == b).all() for a, b in zip(found, again))
    few = fit_mixture(values, 3, sample=500, seed=3)
    assert np.abs(few.means - [.1, .3, .7]).max() < .05


@pytest.mark.parametrize("values, count", [
    (np.full(500, .4), 1),
    (np.zeros(500), 1),
    (np.repeat([.2, .4], 300), 1),
    (np.array([.1, .2, .3]), 1),
])
def test_values_that_no_mixture_fits_fall_back_to_one_gaussian(values, count):
    found = fit_mixture(values, 5)
    assert len(found.means) == count and np.isfinite(np.concatenate(found)).all() and found.weights.sum() == 1
    assert benign_region(found, values).any()


def test_spikes_are_left_out():
    rng = np.random.default_rng(0)
    body = np.abs(rng.normal(.4, .05, 3000))
    assert fit_mixture(np.concatenate([body, np.zeros(2000)]), 3).means[0] > .25                    # rectified to 0
    assert fit_mixture(np.concatenate([body, np.full(2000, .02)]), 3).means[0] > .25                # copies of one pair


def test_coverage_is_the_share_of_the_lowest_gaussian():
    values = np.abs(np.random.default_rng(0).normal(.5, .05, 50_000))
    one = Mixture(np.ones(1), np.array([.5]), np.array([.05]))
    for gamma in (.1, .5, .9, .99):
        assert abs(benign_region(one, values, gamma).mean() - gamma) < 0.01
        assert abs(benign_region(one, values, gamma, "central").mean() - gamma) < 0.01
        assert benign_region(one, values, gamma, "posterior").all()
    two = Mixture(np.array([.5, .5]), np.array([.2, .6]), np.array([.05, .05]))
    assert benign_region(two, np.array([0.1, 0.2, 0.39, 0.41, 0.6]), 0.5, "posterior").tolist() == [
        True, True, True, False, False,
    ]


def test_the_three_subsets_are_all_rows_and_the_poisoned_come_first():
    values = np.linspace(0, 1, 400).astype(np.float32)
    # a region that holds everything
    split = coarse_split(values, Mixture(np.ones(1), np.array([.9]), np.array([1.])), q=50)
    assert split.poisoned.tolist() == list(range(399, 349, -1))
    assert not len(split.suspicious)
    assert len(split.benign) == 350
    ties = coarse_split(np.ones(400), Mixture(np.ones(1), np.zeros(1), np.ones(1)), q=50)
    assert ties.poisoned.tolist() == list(range(50)) and len(ties.suspicious) == 0 or len(ties.benign) == 0


# ---- detection

def test_poison_is_found_and_a_clean_set_is_left_alone(mapping):
    images, texts, flags = pairs()
    for reference in ("all", "core"):
        found = detect(images, texts, mapping, reference=reference)
        rates = detection_rates(np.isin(np.arange(3000), found.flagged), flags)
        assert found.attacked and rates["tpr"] > .95 and rates["fpr"] < .04, (reference, rates)
        assert detection_quality(found.correlation, flags)["auroc"] > 0.98
        assert detection_quality(found.score, flags)["auroc"] > 0.98
        assert set(found.split.poisoned) <= set(found.flagged)
        assert not set(found.split.benign) & set(found.flagged)
        assert set(found.core) <= set(found.split.poisoned)
        assert (
            found.score[found.split.benign].max() < found.score[np.setdiff1d(np.arange(3000), found.split.benign)].min()
        )
    screened = detect(images, texts, mapping, screen=True)
    assert set(screened.flagged) < set(detect(images, texts, mapping).flagged)
    assert (screened.correlation[screened.flagged] > screened.threshold).all()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n", [1000, 5000])
def test_the_guard_holds_on_clean_sets(mapping, n, seed):
    found = detect(*pairs(n, 0, .05, seed)[:2], mapping)
    assert not found.attacked and not len(found.flagged) and found.likeness < found.level


def test_the_core_is_the_poison_among_many_wrong_captions():
    texts, flags = pairs(3000, 60)[1:]
    other = np.flatnonzero(texts @ texts[:60].mean(0) < .5)
    rows = np.concatenate([np.arange(12), other[:38]])     # a quarter of D_p is poisoned
    core = caption_core(texts, rows)
    assert len(core) == 10 and flags[core].all() and len(caption_core(texts, rows[:7])) == 7


def test_the_likeness_of_chance_is_repeatable_and_needs_no_more_than_there_is():
    texts = pairs(300, 0)[1]
    found = chance_likeness(texts, np.arange(100, 300), 20, subsets=5)
    assert found.shape == (5,)
    assert (found == chance_likeness(texts, np.arange(100, 300), 20, subsets=5)).all()
    assert (found != chance_likeness(texts, np.arange(100, 300), 20, subsets=5, seed=1)).any()
    assert len(set(chance_likeness(texts, np.arange(15), 20, subsets=3))) == 1
    with pytest.raises(SettingsError, match="at least one random subset"):
        chance_likeness(texts, np.arange(300), 20, subsets=0)


def test_honest_captions_about_the_target_do_not_move_the_level():
    rng = np.random.default_rng(0)
    bulk = rng.normal(.1, .03, 5000)
    mixed = np.concatenate([bulk, rng.normal(.9, .01, 150)])
    assert abs(benign_level(mixed, 0.001) - benign_level(bulk, 0.001)) < 0.01
    assert benign_level(mixed, 0.001, "quantile") > 0.85
    assert guard_level(mixed, np.array([0.2, 0.5]), margin=1.0) == 0.5
    assert guard_level(mixed, np.array([0.1]), margin=1.0) < 0.2
    assert guard_level(mixed, np.array([0.1]), 0.01, "quantile", 1.0) > 0.8
    assert guard_level(mixed, np.array([.2, .5])) == .75


def test_progress_is_told_by_stage(mapping):
    told = []
    images, texts, _ = pairs(500, 10)
    detect(images, texts, mapping, q=20, chunk=200, progress=lambda *a: told.append(a))
    assert told == [(d, 500, "pairs", note) for note in ("consistency", "textual correlation") for d in (200, 400, 500)]


# ---- bad input

@pytest.mark.parametrize("changes, message", [
    (dict(q=1), "at least 2, not 1"),
    (dict(q=0), "at least 2, not 0"),
    (dict(q=500), "500 pairs are too few for a poisoned subset of 500: lower q to 125"),
    (dict(q=126), "lower q to 125"),
    (dict(components=0), "at least one component"),
    (dict(components=-2), "at least one component"),
    (dict(coverage=0), "between 0 and 1"),
    (dict(coverage=1), "between 0 and 1"),
    (dict(coverage=90), "the paper's 90% is 0.9"),
    (dict(rule="two_sided"), "unknown rule 'two_sided'"),
    (dict(reference="none"), "unknown reference 'none'"),
    (dict(core=0), "above 0"),
    (dict(core=1.5), "up to 1"),
    (dict(alpha=.7), "between 0 and 0.5"),
    (dict(guard_alpha=0), "between 0 and 0.5"),
    (dict(level="otsu"), "unknown level 'otsu'"),
    (dict(chunk=0), "chunk must be a positive"),
    (dict(precision="int8"), "unknown precision 'int8'"),
])
def test_settings_that_cannot_work_are_refused_before_anything_is_read(mapping, monkeypatch, changes, message):
    monkeypatch.setattr(cfbd, "_block", lambda *a: pytest.fail("embeddings were read"))
    images, texts, _ = pairs(500, 10)
    with pytest.raises(SettingsError, match=message) as e:
        detect(images, texts, mapping, **changes)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("what, row, value", [
    ("images", 0, 0),
    ("texts", 301, 0),
    ("texts", 499, np.nan),
    ("images", 77, np.inf),
])
def test_an_embedding_without_direction_is_named(mapping, what, row, value):
    images, texts, _ = pairs(500, 10)
    dict(images=images, texts=texts)[what][row] = value
    with pytest.raises(DataError, match=f"row {row} of {what} is {'zero' if value == 0 else 'not a number'}"):
        detect(images, texts, mapping, q=20, chunk=100)
    if what == "texts":
        with pytest.raises(DataError, match=f"row {row} of texts"):
            textual_correlation(texts, [1, 2], chunk=100)


def test_tables_that_do_not_belong_together_are_refused(mapping):
    images, texts, _ = pairs(500, 10)
    for error, message, args in [
        (DataError, "500 image embeddings for 499 text embeddings", (images, texts[:-1], mapping)),
        (DataError, "are not of one CLIP", (images, texts[:, :40], mapping)),
        (SettingsError, "of width 16 cannot map embeddings of width 48", (images, texts, MappingNetwork(16, 4))),
        (DataError, "one row per pair", (images[0], texts[0], mapping)),
        (DataError, "499 generated text embeddings for 500 images", (images, texts, texts[1:])),
        (SettingsError, "of width 40 do not fit", (images, texts, texts[:, :40])),
        (DataError, "there is no pair", (images[:0], texts[:0], mapping)),
    ]:
        with pytest.raises(error, match=message):
            cross_modality_consistency(*args)


def test_captions_that_are_all_the_same_are_refused(mapping):
    images, texts, _ = pairs(500, 10)
    with pytest.raises(DataError, match="all captions have the same embedding"):
        detect(images, np.repeat(texts[:1], 500, 0), mapping, q=20)


def test_an_empty_benign_region_is_refused():
    with pytest.raises(DataError, match="only 0 pairs are in the benign region.*raise coverage"):
        fine_stage(pairs(100, 5)[1], CoarseSplit(np.arange(20), np.arange(0), np.arange(20, 100)))


def test_pairs_that_are_all_the_same_are_refused_and_not_searched(mapping):
    images, texts, _ = pairs(500, 10)
    with pytest.raises(DataError):
        detect(np.repeat(images[:1], 500, 0), np.repeat(texts[:1], 500, 0), mapping, q=20)


@pytest.mark.parametrize("copies, attacked", [(20, True), (600, False)])
def test_copies_of_one_pair_do_not_stop_the_search_unless_they_are_everywhere(mapping, copies, attacked):
    images, texts, flags = pairs(2000, 50)
    images[1000:1000+copies], texts[1000:1000+copies] = images[1000], texts[1000]
    found = detect(images, texts, mapping)
    rates = detection_rates(np.isin(np.arange(2000), found.flagged), flags)
    assert found.attacked == attacked and (rates["tpr"] > .9 and rates["fpr"] < .05 if attacked else found.level > .99)


# ---- mapping network and captioner

def test_a_mapping_network_is_stored_whole_and_nothing_else_is_taken_for_one(tmp_path, mapping):
    save_mapping(mapping, tmp_path/"m.safetensors")
    x = torch.randn(4, 48)
    assert load_mapping(tmp_path/"m.safetensors")(x).equal(mapping(x))
    for name, tensors in dict(other={"a": torch.ones(2)}, part={"up.weight": torch.ones(3, 4)}).items():
        save_file(tensors, str(tmp_path/f"{name}.safetensors"))
        with pytest.raises(DataError, match="holds no mapping network"):
            load_mapping(tmp_path/f"{name}.safetensors")
    with pytest.raises(DataError, match="no checkpoint at"):
        load_mapping(tmp_path/"none.safetensors")
    for sizes in ((0, 4), (4, 0), (4, -1)):
        with pytest.raises(SettingsError, match="must be positive"):
            MappingNetwork(*sizes)


def test_training_a_mapping_network_continues_to_the_same_weights(tmp_path, monkeypatch):
    images, texts, _ = (torch.from_numpy(a) for a in pairs(500, 0, d=8))
    recipe = Recipe(epochs=3, batch_size=50, learning_rate=1e-3)
    go = lambda **k: train_mapping(images, texts, range(500), recipe, hidden=8, info_nce_weight=1., **k).state_dict()
    whole, step, count = go(), _step, [0]
    def killed(*args):
        count[0] += 1
        if count[0] == 25:
            raise KeyboardInterrupt
        return step(*args)
    monkeypatch.setattr(training, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        go(checkpoint=tmp_path/"c.safetensors")
    monkeypatch.setattr(training, "_step", step)
    resumed = go(checkpoint=tmp_path/"c.safetensors")
    assert all(whole[k].equal(resumed[k]) for k in whole) and not whole["down.weight"].equal(torch.zeros(8, 8))


def test_a_captioner_takes_the_place_of_the_network():
    clip, data = build_clip("smoke-RN"), open_data("world:train:40")
    seen = []
    def tell(pictures):
        seen.append(pictures.shape)
        return [f"picture of brightness {p.mean():.0f}" for p in pictures]
    tell.image_size = 48
    made = generated_embeddings(clip, data.images, tell, batch_size=16)
    assert seen == [(16, 48, 48, 3), (16, 48, 48, 3), (8, 48, 48, 3)]
    assert made.shape == (40, clip.model.text_projection.shape[1])
    assert np.allclose(np.linalg.norm(made, axis=1), 1, atol=1e-5)
    images = np.random.default_rng(0).normal(size=made.shape).astype(np.float32)
    found = cross_modality_consistency(images, embed_texts(clip, list(data.captions)).numpy(), made, chunk=7)
    assert np.allclose(found.generated, [max(cosine(i, t), 0) for i, t in zip(images, made)], atol=1e-5)
    for wrong in (lambda p: ["one"], lambda p: [1] * len(p)):
        with pytest.raises(DataError, match="one string per picture"):
            generated_embeddings(clip, data.images, wrong)


def test_a_coca_writes_captions_if_its_package_is_there(monkeypatch):
    from open_clip import coca_model
    with pytest.raises(SettingsError, match="RN50 writes no captions"):
        cfbd.coca_captioner("RN50")
    monkeypatch.setattr(coca_model, "_has_transformers", False)
    monkeypatch.setattr(cfbd, "build_clip", lambda *a, **k: pytest.fail("weights were loaded"))
    with pytest.raises(SettingsError, match="needs the package transformers"):
        cfbd.coca_captioner()
    monkeypatch.setattr(coca_model, "_has_transformers", True)
    like = build_clip("smoke-RN")
    tokens = like.tokenizer(["a yellow banana"])
    class Coca(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
        def generate(self, pixels, generation_type, top_k, seq_len=30):
            assert pixels.shape == (2, 3, 32, 32) and generation_type == "top_k" and seq_len == 9
            return tokens.expand(2, -1)
    coca = Clip(Coca(), like.tokenizer, 32, like.mean, like.std, "coca")
    write = cfbd.coca_captioner(model=coca, seq_len=9)
    assert write(np.zeros((2, 32, 32, 3), np.uint8)) == ["a yellow banana"] * 2 and write.image_size == 32
    with pytest.raises(SettingsError, match="smoke-RN writes no captions"):
        cfbd.coca_captioner(model=like)


# ---- stages

def run(folder, f, **settings):
    for name in ("out", "scratch"):
        (folder/name).mkdir(parents=True)
    work = SimpleNamespace(out=folder/"out", scratch=folder/"scratch", device="cpu", progress=lambda *a: None)
    return SimpleNamespace(path=folder/"out", result=f(work, **settings))


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    "An untrained CLIP, a poisoned set of 400 pairs, the network and the detection."
    from mcl_repro.lab.lab import Lab
    from mcl_repro.papers.stages import clean_clip, poisoned_pairs
    lab = Lab("smoke", device="cpu", runs=tmp_path_factory.mktemp("cfbd")/"runs", progress=False)
    clean = lab.node(clean_clip, model="smoke-RN", pairs=lab.role("pretrain"), recipe=dict(lab.profile.pretrain))
    poisoned = lab.node(
        poisoned_pairs, pairs=lab.role("finetune"), attack=dict(lab.profile.attacks.BadNet), target="banana", count=40,
        image_size=32, seed=0,
    )
    mapping = lab.node(
        cfbd.mapping_network, clip=clean, pairs=lab.role("clean_pairs"), hidden=16, epochs=2, batch_size=32
    )
    nodes = cfbd.cfbd_nodes(
        lab, clean, poisoned, mapping,
        dict(detect=dict(q=20, components=2), select=dict(count=6, image_layer="layer2")), victim=clean,
    )
    return SimpleNamespace(
        lab=lab, clean=clean, poisoned=poisoned, mapping=mapping, nodes=nodes, found=lab.run(nodes["detect"])
    )


def test_the_stored_detection_is_the_detection(staged):
    from mcl_repro.model.clip import embed_images, embed_tokens
    from mcl_repro.papers.stages import defender_pairs, load_clip
    clean, poisoned, mapping = staged.lab.run([staged.clean, staged.poisoned, staged.mapping])
    model, data = load_clip(clean), None
    data = training_set(model, defender_pairs(poisoned))
    half = lambda x: x.numpy().astype(np.float16)
    expected = detect(
        half(embed_images(model, data.images))[data.image_rows], half(embed_tokens(model, data.tokens)),
        load_mapping(mapping.path / "mapping.safetensors"), q=20, components=2,
    )
    stored = cfbd.load_detection(staged.found)
    assert np.abs(stored.consistency.value - expected.consistency.value).max() < 1e-3
    assert stored.split.poisoned.shape == (20,)
    assert isinstance(stored.consistency, Consistency)
    assert isinstance(stored.split, CoarseSplit)
    again = fine_stage(np.load(staged.found.path/"texts.npy", allow_pickle=False), stored.split)
    assert np.abs(again["correlation"] - stored.correlation).max() < 1e-6
    assert again["threshold"] == pytest.approx(stored.threshold)
    assert (again["flagged"] == stored.flagged).all()
    result = staged.found.result
    assert result["in_poisoned"] + result["in_benign"] + result["in_suspicious"] == result["pairs"] == 400
    assert result["attacked"] == stored.attacked
    assert result["flagged"] == len(stored.flagged)


def test_choosing_q_from_a_detection_is_detecting_with_several(staged):
    lab, inputs = staged.lab, dict(clip=staged.clean, poisoned=staged.poisoned)
    settings = dict(components=2, q=[20, 40, 80], guard=True)
    chosen = cfbd.detection_node(lab, inputs, staged.mapping, settings)
    assert chosen.stage.name == "cfbd.cfbd_choose_q"
    alone = lab.node(cfbd.cfbd_detect, **inputs, mapping=staged.mapping, **settings)
    short, long = (cfbd.load_detection(lab.run(node)) for node in (chosen, alone))
    assert (short.correlation == long.correlation).all() and (short.flagged == long.flagged).all()
    assert all((a == b).all() for a, b in zip(short.split, long.split))
    assert (short.threshold, short.likeness, short.level, short.attacked) == (
        long.threshold, long.likeness, long.level, long.attacked)
    printed = cfbd.detection_node(lab, inputs, staged.mapping, dict(settings, q=20, guard=False))
    assert list(chosen.inputs.values()) == [printed]     # the pairs are embedded once for both
    with pytest.raises(SettingsError, match="400 pairs are too few"):
        lab.run(cfbd.detection_node(lab, inputs, staged.mapping, dict(settings, q=[20, 200])))


def test_what_is_kept_is_trained_on(staged):
    from mcl_repro.papers.stages import arrays
    found = cfbd.load_detection(staged.found)
    full, coarse, select = staged.lab.run([staged.nodes[n] for n in ("full", "coarse", "select")])
    assert full.result["pairs"] == 400 - len(found.flagged) and coarse.result["pairs"] == len(found.split.benign)
    chosen, split = arrays(select, "selection"), arrays(select, "split")
    assert chosen["selected"].shape == (6,)
    candidates = found.flagged if found.attacked else found.split.poisoned
    assert (chosen["selected"] == candidates[np.argsort(-found.consistency.value[candidates], kind="stable")[:6]]).all()
    assert chosen["tokens"].shape == chosen["masked"].shape
    assert chosen["masked_images"].shape == (6, 32, 32, 3)
    assert select.result["poisoned"] == found.attacked
    assert (split["similarities"][found.flagged] == -1).all() and len(split["normal"]) == 400 - len(found.flagged)


def test_training_on_few_pairs_has_a_recipe_of_its_own(staged):
    nodes = cfbd.cfbd_nodes(
        staged.lab, staged.clean, staged.poisoned, staged.mapping,
        dict(detect=dict(q=20, components=2), coarse_recipe=dict(epochs=7)), seed=3,
    )
    epochs = {keep: nodes[keep].settings["recipe"]["epochs"] for keep in cfbd.KEEP}
    usual = staged.lab.profile.finetune.epochs
    assert epochs == dict(full=usual, coarse=7, random=7) and nodes["coarse"].settings["recipe"]["seed"] == 3
    found = cfbd.load_detection(staged.found)
    drawn = [cfbd.kept_rows(found, "random", seed) for seed in (0, 0, 1)]
    assert (drawn[0] == drawn[1]).all() and not (drawn[0] == drawn[2]).all()
    assert all(len(set(rows)) == len(found.split.benign) for rows in drawn)


@pytest.mark.parametrize("attacked", [True, False])
def test_unlearning_takes_the_selection(staged, tmp_path, attacked):
    from mcl_repro.papers.ubt import ubt_unlearn
    clean, poisoned, select = staged.lab.run([staged.clean, staged.poisoned, staged.nodes["select"]])
    selection = SimpleNamespace(path=select.path, result=dict(select.result, poisoned=attacked))
    done = run(
        tmp_path / "unlearn", ubt_unlearn, clip=clean, poisoned=poisoned, split=select, selection=selection,
        recipe=dict(epochs=1, batch_size=16, learning_rate=1e-4), stop="none",
    )
    assert done.result["refused"] == (not attacked) and (done.path/"clip.safetensors").exists()


def test_a_network_of_another_clip_and_a_share_that_leaves_nothing_are_refused(staged, tmp_path):
    clean, poisoned = staged.lab.run([staged.clean, staged.poisoned])
    save_mapping(MappingNetwork(12, 4), tmp_path/"mapping.safetensors")
    with pytest.raises(SettingsError, match="of width 12 cannot map"):
        run(tmp_path/"a", cfbd.cfbd_detect, clip=clean, poisoned=poisoned, mapping=SimpleNamespace(path=tmp_path), q=20)
    with pytest.raises(SettingsError, match="400 pairs are too few"):
        run(
            tmp_path / "b", cfbd.cfbd_detect, clip=clean, poisoned=poisoned, mapping=SimpleNamespace(path=tmp_path),
            q=101,
        )
    with pytest.raises(SettingsError, match="leaves nothing on one side"):
        run(tmp_path/"c", cfbd.mapping_network, clip=clean, pairs=staged.lab.role("clean_pairs"), hidden=4, held_out=0.)


def test_generated_captions_serve_as_mapping(staged, tmp_path):
    clean, poisoned = staged.lab.run([staged.clean, staged.poisoned])
    width = staged.lab.run(staged.mapping).result["width"]
    np.save(tmp_path/"generated.npy", np.random.default_rng(0).normal(size=(400, width)).astype(np.float16))
    found = run(
        tmp_path / "d", cfbd.cfbd_detect, clip=clean, poisoned=poisoned, mapping=SimpleNamespace(path=tmp_path), q=20,
        components=2,
    )
    assert found.result["pairs"] == 400
