"""UBT's PAC-Bayes section: the numbers that its equations give, found again with scipy's root finders.

The gap is compared with exact arithmetic, the KL between weights with torch.distributions, in measures/test_pac_bayes.
"""
import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import xlogy

from mcl_repro.measures import pac_bayes


def gap(kl, m, delta):
    "Eq. 8."
    return np.sqrt((kl + np.log(m / delta)) / (2 * (m - 1)))


@pytest.mark.parametrize("kl, known", [(.01, 458), (1, 513), (10, 996), (100, 5583), (1e3, 5.1e4), (1e6, 5.0e7)])
def test_the_smallest_sample_for_a_gap_of_a_tenth(kl, known):
    root = brentq(lambda m: gap(kl, m, .05) - .1, 2, 1e9, xtol=1e-6)
    found = pac_bayes.smallest_sample_size(kl, .1, .05)
    assert found == np.ceil(root) and gap(kl, found, .05) <= .1 < gap(kl, found - 1, .05)
    assert float(f"{found:.4g}" if known < 1e4 else f"{found:.2g}") == known


@pytest.mark.parametrize("delta", [.05, .01])
@pytest.mark.parametrize("a", [.5, .7, .8, .9, .95])
def test_from_where_on_lemma_1_holds(a, delta):
    "The last crossing of both sides, in the logarithm of m: some 10, 80, 7,500, 6e11 and 4e31 for delta = 0.05."
    ratio = lambda x: np.log(x - np.log(delta)) - np.log(2) - np.log(np.expm1(x)) + a * x
    root = brentq(ratio, 1.5, 200, xtol=1e-13)
    assert (ratio(np.linspace(root + 1e-6, root + 100, 1000)) < 0).all()
    found = float(pac_bayes.lemma1_m0(a, delta))
    assert found == np.ceil(np.exp(root)) if a < .9 else found == pytest.approx(np.exp(root), rel=1e-9)


@pytest.mark.parametrize("a, kl, epsilon, star, too_much", [(.9, 0, .5, 5, .759), (.8, .05, .1, 337, .115)])
def test_lemma_3_alone_is_not_enough(a, kl, epsilon, star, too_much):
    "The counter-examples: m* as printed, and the gap that is left there."
    m = np.ceil(((kl + 1) / epsilon**2)**(1 / a))
    assert np.ceil(pac_bayes.paper_sample_size(kl, epsilon, a)) == m == star
    assert pac_bayes.paper_sample_size(kl, epsilon, a) == pytest.approx(((kl + 1) / epsilon**2)**(1 / a), rel=1e-12)
    assert float(pac_bayes.generalisation_gap(kl, m, .05)) == pytest.approx(gap(kl, m, .05), abs=1e-12)
    assert round(gap(kl, m, .05), 3) == too_much > epsilon and m < pac_bayes.lemma1_m0(a, .05)


@pytest.mark.parametrize("kl, epsilon", [(0., .1), (3., .05), (1e4, .2)])
def test_the_closed_form(kl, epsilon):
    "(KL + ln 1/delta + 2 eps^2 - ln eps^2 - 1)/eps^2."
    need = (kl + np.log(1 / .05) + 2 * epsilon**2 - np.log(epsilon**2) - 1) / epsilon**2
    assert pac_bayes.explicit_sample_size(kl, epsilon, .05) == np.ceil(need)
    assert gap(kl, np.ceil(need), .05) <= epsilon


@pytest.mark.parametrize("kl, m, empirical", [(0., 50, 0.), (2., 300, .1), (20., 1000, .7)])
def test_maurers_bound(kl, m, empirical):
    "The largest p with kl(q || p) <= (KL + ln(2 sqrt(m)/delta))/m."
    budget = (kl + np.log(2 * np.sqrt(m) / .05)) / m
    def over(p):
        spent = xlogy(empirical, empirical / p) + xlogy(1 - empirical, (1 - empirical) / (1 - p))
        return spent - budget
    root = brentq(over, max(empirical, 1e-12), 1 - 1e-12, xtol=1e-14)
    assert float(pac_bayes.maurer_bound(kl, m, .05, empirical)) == pytest.approx(root, abs=1e-9)
    relaxed = empirical + np.sqrt(budget / 2)
    assert float(pac_bayes.maurer_bound(kl, m, .05, empirical, relaxed=True)) == pytest.approx(relaxed, abs=1e-12)
