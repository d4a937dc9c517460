"The metrics against slow, plain loops and known distributions."
import tracemalloc

import numpy as np
import pytest
import torch

from mcl_repro.measures import metrics as M
from mcl_repro.core.errors import DataError, SettingsError, UserError


def plain_rank(scores, right):
    "Rank of the best right answer, every tie lost, one comparison at a time"
    best = max(scores[j] for j in right)
    return sum(scores[j] >= best for j in range(len(scores)) if j not in right)


def unit(x):
    return x/np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("seed", range(3))
def test_retrieval_ranks_equal_a_plain_loop_with_uneven_captions_in_any_order(seed):
    rng = np.random.default_rng(seed)
    images, texts = unit(rng.normal(size=(9, 5))), unit(rng.normal(size=(31, 5)))
    rows = rng.permutation(np.r_[np.arange(9), rng.integers(0, 9, 22)])
    texts[3] = texts[17]   # duplicate captions, often of different images
    r, s = M.retrieval_ranks(images, texts, rows, block=50), (images @ texts.T).round(6)
    assert r.image_to_text.tolist() == [plain_rank(s[i], set(np.flatnonzero(rows == i))) for i in range(9)]
    assert r.text_to_image.tolist() == [plain_rank(s[:, j], {rows[j]}) for j in range(31)]
    assert r.each_caption.tolist() == [plain_rank(s[rows[j]], {j}) for j in range(31)]
    found = [[plain_rank(s[i], {j}) < 4 for j in np.flatnonzero(rows == i)] for i in range(9)]
    assert M.recalls(r, 4) == pytest.approx([np.mean(f) for f in found])


def test_mean_ties_are_the_average_over_random_orders():
    "One query, two right answers in a tie with three wrong ones, one wrong answer ahead"
    rng, ranks = np.random.default_rng(0), []
    for _ in range(4000):
        ranks.append(1 + min(np.flatnonzero(np.isin(rng.permutation(5), (0, 1)))))
    angles = np.radians([40, 40, 40, 40, 40, 10])
    best, _ = M._match_ranks(
        np.array([[1.0, 0]], np.float32), np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32),
        np.array([[0, 1]]), "mean",
    )
    assert best[0] == 2
    assert np.mean(ranks) == pytest.approx(2, abs=.05)


def test_a_collapsed_model_is_last_everywhere_whatever_the_rounding():
    rng = np.random.default_rng(0)
    u, v = unit(rng.normal(size=(2, 513))).astype(np.float32)
    images, texts = np.repeat(u[None], 101, 0), np.repeat(v[None], 307, 0)
    texts += rng.uniform(-1e-8, 1e-8, texts.shape).astype(np.float32)   # less than rounding can tell apart
    r = M.retrieval_ranks(images, texts, np.arange(307) % 101, block=997)
    assert M.hit_rate(r.image_to_text, 100) == M.hit_rate(r.text_to_image, 100) == 0
    weights = np.repeat(v[None], 10, 0)
    assert M.clean_accuracy(images @ weights.T, np.arange(101) % 10) == 0
    assert M.attack_success_rate(images @ weights.T, np.arange(101) % 10, 3) == 0
    assert M.retrieval_asr(images, texts, v, k=10) == 0


def test_a_perfect_model_is_first_everywhere():
    x = np.eye(12)
    r = M.retrieval_ranks(x, np.repeat(x, 5, 0), np.arange(60)//5)
    assert (M.hit_rate(r.image_to_text, 1), M.hit_rate(r.text_to_image, 1)) == (1, 1)
    assert (M.median_rank(r.image_to_text), M.median_rank(r.text_to_image)) == (1, 1)
    assert M.caption_recall(r, 5) == 1 and M.caption_recall(r, 4) < 1


def test_torch_half_precision_and_numpy_agree():
    scores = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50) % 7
    assert M.clean_accuracy(scores, labels) == M.clean_accuracy(scores.numpy(), labels.numpy())
    assert M.clean_accuracy(scores.bfloat16().requires_grad_(), labels) == pytest.approx(
        M.clean_accuracy(scores, labels), abs=0.05
    )


def test_large_galleries_stay_in_small_memory():
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(500, 16)).astype(np.float32), rng.normal(size=(10_000, 16)).astype(np.float32)
    tracemalloc.start()
    M.retrieval_ranks(images, texts, np.arange(10_000) % 500, block=2**17)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # all scores at once would be 20 MB, and their comparisons as much again
    assert peak < 10*2**20, f"{peak/2**20:.1f} MB"


@pytest.mark.parametrize("call, words", [
    (lambda: M.clean_accuracy([[.1, np.inf]], [0]), "NaN or infinity"),
    (lambda: M.clean_accuracy([.1, .2], [0]), "2 axes"),
    (lambda: M.clean_accuracy([[.1, .2]], [0, 1]), "2 given for 1"),
    (lambda: M.clean_accuracy([[.1, .2]], [-1]), "labels"),
    (lambda: M.clean_accuracy([[.1, .2]], [0], k=0), "k: must be at least 1"),
    (lambda: M.clean_accuracy([[.1, .2]], [0], ties="none"), "ties"),
    (lambda: M.attack_success_rate([[.1, .2]], [0], 1, variant="mine"), "variant"),
    (lambda: M.retrieval_ranks([[1., 0]], [[0., 0]]), "length zero"),
    (lambda: M.retrieval_ranks([[1., 0]], [[np.nan, 0]]), "text embeddings: NaN"),
    (lambda: M.retrieval_ranks([[1., 0]], [[1., 0]], [4]), "image_rows"),
    (lambda: M.prediction_kl([[1., 0]], [[1., 0]], model_scale=float("nan")), "logit scale"),
    (lambda: M.detection_rates([0, 2], [0, 1]), "yes/no"),
    (lambda: M.bootstrap_interval([np.nan, 1]), "NaN"),
    (lambda: M.bootstrap_interval([]), "non-empty"),
    (lambda: M.bootstrap_interval([1., 2], level=95), "level"),
])
def test_wrong_input_is_one_clear_line(call, words):
    with pytest.raises(UserError, match=words) as e:
        call()
    assert "\n" not in str(e.value)


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = [
        (e := M.bootstrap_interval(rng.random(400) < 0.2, seed=i, count=500)).ci_low <= 0.2 <= e.ci_high
        for i in range(300)
    ]
    assert .91 < np.mean(inside) < .98


def test_paired_bootstrap_covers_the_truth_and_beats_separate_intervals():
    rng, inside, lengths = np.random.default_rng(1), [], []
    for i in range(200):
        easy = rng.random(500)                    # what an item needs, the same for both models
        a, b = easy < .7, easy < .65
        e = M.paired_bootstrap(a, b, count=400, seed=i)
        inside.append(e.ci_low <= .05 <= e.ci_high)
        lengths.append(e.ci_high - e.ci_low)
    single = M.bootstrap_interval(a)
    assert .90 < np.mean(inside) < .99
    assert np.mean(lengths) < .7*(single.ci_high - single.ci_low)


def test_a_seed_decides_the_interval_and_nothing_else_does():
    x = np.random.default_rng(0).normal(size=300)
    np.random.seed(1)
    first = M.bootstrap_interval(x, seed=5)
    np.random.seed(2)
    again = M.bootstrap_interval(x, seed=5)
    assert first == again != M.bootstrap_interval(x, seed=6)


def test_paired_statistics_other_than_the_mean_use_the_same_draws():
    x = np.random.default_rng(0).integers(0, 100, 200).astype(float)
    e = M.paired_bootstrap(x + 3, x, M.median_rank, count=200)
    assert e == M.Estimate(3, 3, 3)   # a shift of all ranks shifts every resampled median alike


def test_kl_is_torchs_between_two_softmaxes_each_with_its_own_scale():
    "Forward is KL(retrained || defended), expectation under the retrained model; scales above 100 count as 100."
    from torch.nn.functional import kl_div
    rng = np.random.default_rng(0)
    retrained, defended = (torch.from_numpy(rng.uniform(-1, 1, (20, 7))) for _ in range(2))
    p, q = (60*retrained).log_softmax(1), (100*defended).log_softmax(1)
    for direction, expected in (
        ("forward", kl_div(q, p, log_target=True, reduction="none").sum(1)),
        ("reverse", kl_div(p, q, log_target=True, reduction="none").sum(1)),
    ):
        assert M.prediction_kl(retrained, defended, 60, 130, direction) == pytest.approx(expected.numpy())


def test_kl_is_zero_only_for_equal_predictions_and_never_negative():
    rng = np.random.default_rng(0)
    a, b = rng.uniform(-1, 1, (2, 200, 10))
    assert M.prediction_kl(a, a).max() == 0
    # a shift of all cosines changes no prediction
    assert M.prediction_kl(a, a + .1).max() == pytest.approx(0, abs=1e-12)
    assert M.prediction_kl(a, b).min() > 0
    assert M.prediction_kl(a, b).mean() == pytest.approx(M.prediction_kl(b, a, direction="reverse").mean())


def test_settings_errors_are_not_data_errors():
    with pytest.raises(SettingsError):
        M.label_ranks([[1., 2]], [0], ties="x")
    with pytest.raises(DataError):
        M.combine_seeds([])
