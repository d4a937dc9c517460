"""CFBD's mixture, regions and thresholds, and how UBT selects and multiplies: in lines of scipy, sklearn and lists.

The consistency c, the textual correlation z and z without oneself are compared with loops in papers/test_cfbd.
"""
import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.mixture import GaussianMixture

from mcl_repro.papers.baselines import isolate
from mcl_repro.papers.cfbd import (
    benign_level, benign_region, coarse_split, fine_threshold, fit_mixture, gaussian, guard_level, Mixture,
)
from mcl_repro.papers.ubt import cartesian_pairs, looks_poisoned, most_similar, ordinary_rows, split_suspicious
from plain_clip import CLOSE


@pytest.fixture(scope="module")
def values():
    rng = np.random.default_rng(0)
    parts = [rng.normal(m, s, n) for m, s, n in ((.1, .03, 1500), (.25, .05, 700), (.5, .06, 200), (.8, .05, 40))]
    return np.abs(np.concatenate(parts))


# ---- the mixture

def log_likelihood(x, weights, means, deviations):
    return np.log(sum(w * stats.norm.pdf(x, m, s) for w, m, s in zip(weights, means, deviations))).mean()


def em_step(x, weights, means, deviations):
    "One step of EM: whose each value is, then weights, means and deviations of what is theirs."
    joint = np.stack([w * stats.norm.pdf(x, m, s) for w, m, s in zip(weights, means, deviations)])
    theirs = joint / joint.sum(0)
    count = theirs.sum(1)
    means = (theirs @ x) / count
    return count / len(x), means, np.sqrt((theirs * (x - means[:, None])**2).sum(1) / count)


@pytest.mark.parametrize("components", [1, 3, 5])
def test_the_mixture_is_where_em_ends(values, components):
    "A step of EM by hand gains no more than the tolerance, 1e-4 of log likelihood, and moves next to nothing."
    found = fit_mixture(values, components)
    better = em_step(values, *found)
    gain = log_likelihood(values, *better) - log_likelihood(values, *found)
    assert -1e-9 < gain < 1e-4 and np.abs(better[1] - found.means).max() < 2e-3
    spoilt = Mixture(found.weights, found.means + .02, found.deviations)
    assert log_likelihood(values, *em_step(values, *spoilt)) - log_likelihood(values, *spoilt) > 1e-3
    theirs = GaussianMixture(components, n_init=5, tol=1e-4, max_iter=500, reg_covar=1e-8, random_state=0)
    score = theirs.fit(values[:, None]).score(values[:, None])
    assert log_likelihood(values, *found) == pytest.approx(score, abs=1e-5)
    x = np.linspace(0, 1, 50)
    for component in zip(*found):
        weight, mean, deviation = component
        np.testing.assert_allclose(gaussian(x, *component), weight * stats.norm.pdf(x, mean, deviation), **CLOSE)


# ---- regions

@pytest.mark.parametrize("coverage", [.5, .9, .99])
def test_the_benign_region_ends_at_a_quantile_of_the_lowest_gaussian(values, coverage):
    "c <= mu + ppf(gamma) sigma; `central` the middle gamma; `posterior` as sklearn's predict_proba."
    found = fit_mixture(values, 3)
    lowest = stats.norm(found.means[0], found.deviations[0])
    top, (low, high) = lowest.ppf(coverage), lowest.interval(coverage)
    for rule, edges in dict(one_sided=[top], central=[low, high]).items():
        for edge in edges:
            around = benign_region(found, edge + np.array([-1e-9, 1e-9]), coverage, rule)
            assert around.tolist() == ([False, True] if edge == low else [True, False])
    assert (benign_region(found, values, coverage) == (lowest.cdf(values) <= coverage)).all()
    inside = (values >= low) & (values <= high)
    assert (benign_region(found, values, coverage, "central") == inside).all()
    theirs = GaussianMixture(3)
    theirs.weights_, theirs.means_ = found.weights, found.means[:, None]
    theirs.covariances_ = found.deviations[:, None, None]**2
    theirs.precisions_cholesky_ = 1 / found.deviations[:, None, None]
    probable = theirs.predict_proba(values[:, None])[:, 0] > coverage
    assert (benign_region(found, values, coverage, "posterior") == probable).all()
    assert 0 < probable.sum() < len(values)


def test_the_coarse_stage_takes_the_highest_first(values):
    found = coarse_split(values, fit_mixture(values, 3), q=40)
    by_value = sorted(range(len(values)), key=lambda i: -values[i])
    assert found.poisoned.tolist() == by_value[:40]
    mixture = fit_mixture(values, 3)
    edge = mixture.means[0] + stats.norm.ppf(.9) * mixture.deviations[0]
    assert found.benign.tolist() == sorted(i for i in by_value[40:] if values[i] <= edge)
    assert found.suspicious.tolist() == sorted(i for i in by_value[40:] if values[i] > edge)


@pytest.mark.parametrize("alpha", [.05, .001])
def test_thresholds_of_the_fine_stage(alpha):
    "Half way from the level of benign captions, m + ppf(1-alpha) (Q84 - m), to the median of the core; the guard."
    rng = np.random.default_rng(0)
    z, members, chance = rng.normal(.2, .05, 3000), rng.normal(.8, .05, 11), np.array([.3, .42, .35])
    middle = np.median(z)
    level = middle + stats.norm.ppf(1 - alpha) * (np.quantile(z, stats.norm.cdf(1)) - middle)
    assert benign_level(z, alpha) == pytest.approx(level, abs=1e-5)
    assert benign_level(z, alpha, "quantile") == pytest.approx(np.quantile(z, 1 - alpha), abs=1e-5)
    assert fine_threshold(z, members, alpha) == pytest.approx((level + sorted(members)[5]) / 2, abs=1e-5)
    explained = max(level, .42)
    assert guard_level(z, chance, alpha, margin=.3) == pytest.approx(explained + .7 * (1 - explained), abs=1e-5)


# ---- UBT and ABL: which pairs

def test_suspicious_selected_trusted_and_isolated():
    "The least similar under the clean model, k of them under the overfitted one, what is held on to; ABL's choice."
    rng = np.random.default_rng(0)
    clean, overfitted = rng.normal(size=500), rng.normal(size=500)
    low_first, high_first = (sorted(range(500), key=lambda i: sign * clean[i]) for sign in (1, -1))
    suspicious, normal = split_suspicious(clean, .04)
    assert suspicious.tolist() == low_first[:20] and normal.tolist() == sorted(low_first[20:])
    chosen = most_similar(overfitted, suspicious, 6)
    assert chosen.tolist() == sorted(low_first[:20], key=lambda i: -overfitted[i])[:6]
    assert ordinary_rows(clean, 20, 1.5).tolist() == sorted(low_first[50:])
    isolated, rest = isolate(clean, .01)
    assert isolated.tolist() == high_first[:5] and rest.tolist() == sorted(high_first[5:])


@pytest.mark.parametrize("above", [True, False])
def test_a_selection_looks_poisoned_by_its_median(above):
    normal = np.random.default_rng(0).random(999)
    level = sorted(normal)[988] + .02 * (sorted(normal)[989] - sorted(normal)[988])     # 0.99 x 998 = 988.02
    selected = np.array([-1., level + (1e-9 if above else -1e-9), 2.])
    assert looks_poisoned(selected, normal) == above


def test_the_product_is_every_image_with_every_caption():
    images, tokens = torch.arange(4 * 12).view(4, 3, 2, 2).to(torch.uint8), torch.arange(15).view(3, 5)
    product = cartesian_pairs(images, tokens)
    found = [(images[i].tolist(), caption) for i, caption in zip(product.image_rows, product.tokens.tolist())]
    assert found == [(i.tolist(), t.tolist()) for i, t in itertools.product(images, tokens)]
