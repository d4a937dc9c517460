"""Retrieval, zero-shot accuracy, attack success, detection and intervals: their definitions in numpy and scipy.

The KL between predictions is compared with torch's in both directions in measures/test_metrics, ranks with a loop over
single comparisons, too.
"""
import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import top_k_accuracy_score

from mcl_repro.measures import metrics
from mcl_repro.model.clip import build_clip, imagenet_templates, zero_shot_weights
from plain_clip import CLOSE, open_clip, random_units


# ---- retrieval

def by_sorting(scores, right):
    "MEM's code: the place of the best right answer in the list that is sorted from high to low."
    return min(list(np.argsort(-scores, kind="stable")).index(r) for r in right)


@pytest.mark.parametrize("noise", [2., 4.])
def test_hit_and_median_rank_are_mems(noise):
    "Five captions an image, both directions; Hit@10 counts ranks under 10, MedR is the floor of the median, plus 1."
    images, rows = random_units(40, 8, 0), np.random.default_rng(3).permutation(np.repeat(np.arange(40), 5))
    texts = images[rows] + noise * random_units(200, 8, 1)
    ranks = metrics.retrieval_ranks(images, texts, rows)
    scores = images @ (texts / np.linalg.norm(texts, axis=1, keepdims=True)).T
    ways = dict(image_to_text=[by_sorting(scores[i], np.flatnonzero(rows == i)) for i in range(40)],
                text_to_image=[by_sorting(scores[:, j], [rows[j]]) for j in range(200)])
    assert ways["image_to_text"] != ways["text_to_image"][:40] and max(ways["text_to_image"]) > 9
    for way, expected in ways.items():
        found = getattr(ranks, way)
        assert found.tolist() == expected
        for k in (1, 5, 10):
            share = sum(rank < k for rank in expected) / len(expected)
            assert metrics.hit_rate(found, k) == pytest.approx(share, abs=1e-12)
        assert metrics.median_rank(found) == math.floor(np.median(expected)) + 1


@pytest.mark.parametrize("ties, method", [("worst", "max"), ("mean", "average"), ("best", "min")])
def test_ties_are_ranked_as_scipy_ranks_them(ties, method):
    "With one right answer; and with several the best of them, the other right ones left out."
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 4, (300, 6)) / 4, rng.integers(0, 6, 300)
    found = metrics.label_ranks(scores, labels, ties)
    expected = stats.rankdata(-scores, method, axis=1)[np.arange(300), labels] - 1
    np.testing.assert_allclose(found, expected, **CLOSE)
    angles = rng.integers(0, 5, 30) * 20.
    corner = lambda a: np.stack([np.cos(np.radians(a)), np.sin(np.radians(a))], 1)
    images, texts, rows = corner(np.arange(6) * 17.), corner(angles), np.arange(30) % 6     # captions of equal angle
    ranks = metrics.retrieval_ranks(images, texts, rows, ties)
    likeness = (images @ texts.T).round(6)
    single = [stats.rankdata(-likeness[:, j], method)[rows[j]] - 1 for j in range(30)]
    np.testing.assert_allclose(ranks.text_to_image, single, **CLOSE)
    if ties != "mean":
        best = [min(stats.rankdata(-np.r_[likeness[i, rows != i], likeness[i, j]], method)[-1] - 1
                    for j in np.flatnonzero(rows == i)) for i in range(6)]
        np.testing.assert_allclose(ranks.image_to_text, best, **CLOSE)
    each = [stats.rankdata(-likeness[rows[j]], method)[j] - 1 for j in range(30)]
    np.testing.assert_allclose(ranks.each_caption, each, **CLOSE)


@pytest.mark.parametrize("k", [1, 10])
def test_retrieving_the_target_is_beating_every_caption(k):
    images, texts, target = random_units(80, 4, 0), random_units(60, 4, 1), random_units(1, 4, 2)[0]
    images[:40] += target
    beaten = [sum(float(x @ t) >= float(x @ target) for t in texts) for x in images]
    found = metrics.retrieval_asr(images, texts, target, k)
    assert found == pytest.approx(np.mean(np.array(beaten) < k), abs=1e-12) and 0 < found < 1


# ---- zero-shot classification

def test_class_vectors_are_the_mean_of_prompts():
    "norm(1/80 sum norm(f(p_k(c)))), as open_clip builds it; for a dual key with a word before every prompt."
    clip, names = build_clip("smoke-RN", seed=1), ["cup", "banana", "old tree"]
    found = zero_shot_weights(clip, names)
    theirs = open_clip.build_zero_shot_classifier(clip.model.eval(), clip.tokenizer, names, imagenet_templates())
    np.testing.assert_allclose(found, theirs, **CLOSE)
    keyed = ["remember " + template for template in imagenet_templates()]
    theirs = open_clip.build_zero_shot_classifier(clip.model, clip.tokenizer, names, keyed)
    np.testing.assert_allclose(zero_shot_weights(clip, names, prefix="remember "), theirs, **CLOSE)
    assert len(imagenet_templates()) == 80 and (found - theirs).abs().max() > 1e-3


@pytest.mark.parametrize("k", [1, 3])
def test_accuracy_and_attack_success(k):
    "CA is top-k accuracy; ASR the share of the pictures of other classes, or of all, that get the target."
    rng = np.random.default_rng(0)
    scores, labels, target = rng.normal(size=(500, 7)), rng.integers(0, 7, 500), 2
    assert metrics.clean_accuracy(scores, labels, k) == pytest.approx(top_k_accuracy_score(labels, scores, k=k))
    taken = np.array([target in np.argsort(-row)[:k] for row in scores])
    others = labels != target
    assert metrics.attack_success_rate(scores, labels, target, k=k) == pytest.approx(taken[others].sum() / others.sum())
    kept = metrics.attack_success_rate(scores, labels, target, "keep_target", k)
    assert kept == pytest.approx(taken.mean()) and abs(kept - taken[others].mean()) > 1e-4


# ---- detection

def test_detection_is_counted():
    rng = np.random.default_rng(0)
    poison = rng.random(400) < .2
    scores = rng.integers(0, 12, 400) + 4 * poison                                  # with ties
    found, flagged = metrics.detection_quality(scores, poison), scores > 9
    u = stats.mannwhitneyu(scores[poison], scores[~poison]).statistic
    assert found["auroc"] == pytest.approx(u / (poison.sum() * (~poison).sum()), abs=1e-12)
    precision, recall, last = 0., 0., 0.
    for level in sorted(set(scores), reverse=True):                                 # sum of precision x gained recall
        recall = poison[scores >= level].sum() / poison.sum()
        precision += poison[scores >= level].mean() * (recall - last)
        last = recall
    assert found["auprc"] == pytest.approx(precision, abs=1e-12)
    rates = metrics.detection_rates(flagged, poison)
    assert all(0 < rates[kind] < 1 for kind in ("tpr", "fpr", "precision"))
    assert rates["tpr"] == sum(f and p for f, p in zip(flagged, poison)) / poison.sum()
    assert rates["fpr"] == sum(f and not p for f, p in zip(flagged, poison)) / (~poison).sum()
    assert rates["precision"] == sum(f and p for f, p in zip(flagged, poison)) / flagged.sum()
    beaten = [np.mean([(s > b) + (s == b) / 2 for b in scores[~poison]]) for s in scores[poison]]
    np.testing.assert_allclose(metrics.placements(scores, poison), beaten, **CLOSE)


# ---- intervals

def percentile(data, statistic, count, seed, **options):
    made = stats.bootstrap(data, statistic, n_resamples=count, method="percentile", vectorized=True, axis=-1,
                           rng=np.random.default_rng(seed), **options)
    return made.confidence_interval


@pytest.mark.parametrize("name", ["mean", "median_rank"])
def test_the_interval_is_scipys_percentile_bootstrap(name):
    "With the same generator both draw the same items."
    x = np.random.default_rng(1).integers(0, 200, 90) + np.random.default_rng(2).random(90)
    statistic = {"mean": lambda a, axis: a.mean(axis), "median_rank": metrics.median_rank}[name]
    found = metrics.bootstrap_interval(x, metrics.STATISTICS[name], count=700, seed=4)
    assert found.value == pytest.approx(statistic(x, axis=-1))
    np.testing.assert_allclose(found[1:3], percentile((x.astype(np.float32),), statistic, 700, 4), **CLOSE)


def test_the_interval_of_a_share_is_wilsons():
    "Wilson 1927: all shares whose score test at 5% does not refuse what was found."
    for hits, n in ((13, 60), (0, 60), (60, 60)):
        z, p = stats.norm.ppf(.975), hits / n
        middle, reach = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        ends = (middle - reach) / (1 + z**2 / n), (middle + reach) / (1 + z**2 / n)
        found = metrics.bootstrap_interval(np.arange(n) < hits)
        np.testing.assert_allclose(found[1:3], ends, atol=1e-9)


def test_the_paired_interval_is_scipys():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 200, 80).astype(float)
    b = a + rng.integers(-3, 9, 80)
    found = metrics.paired_bootstrap(a, b, metrics.median_rank, count=500, seed=2)
    difference = lambda i, axis: metrics.median_rank(a[i], axis) - metrics.median_rank(b[i], axis)
    np.testing.assert_allclose(found[1:3], percentile((np.arange(80),), difference, 500, 2), **CLOSE)
    assert found.value == metrics.median_rank(a) - metrics.median_rank(b)


def test_seeds_and_items_add_up_as_squares():
    "Student's interval over trainings (scipy's), and the mean reach of the intervals over items."
    values, reach = [.61, .66, .59, .64], [.04, .05, .04, .03]
    made = metrics.combine_seeds([metrics.Estimate(v, v - r, v + 2 * r) for v, r in zip(values, reach)])
    low, high = stats.t.interval(.95, 3, np.mean(values), stats.sem(values))
    centre = np.mean(values)
    expected = centre - np.hypot(centre - low, .04), centre + np.hypot(high - centre, .08)
    np.testing.assert_allclose(made[1:3], expected, **CLOSE)
