"Local density: the formulas from all distances, sets in batches, wrong input."
import numpy as np
import pytest

from mcl_repro.core.errors import DataError, SettingsError
from mcl_repro.measures.density import density_scores, local_density
from mcl_repro.measures.metrics import placements


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def from_all_distances(x, k):
    "k-dist, SLOF and log DAO of every row."
    apart = np.sqrt(((x[:, None].astype(float) - x[None]) ** 2).sum(-1))
    np.fill_diagonal(apart, np.inf)
    near = np.argsort(apart, 1)[:, :k]
    far = np.take_along_axis(apart, near, 1)
    lid = -1 / np.log(far / far[:, -1:]).mean(1)
    ratio = far[:, -1:] / far[near, -1]
    return far[:, -1], ratio.mean(1), np.log((ratio ** lid[near]).mean(1))


@pytest.mark.parametrize("n, d, k", [(40, 3, 2), (90, 16, 16), (200, 2, 5)])
def test_scores_are_those_of_the_formulas(n, d, k):
    x = unit(np.random.default_rng(n), n, d)
    for ours, expected in zip(local_density(x, k), from_all_distances(x, k)):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_one_neighbour_tells_no_dimension_and_breaks_nothing():
    scores = local_density(unit(np.random.default_rng(0), 30, 3), 1)
    assert np.isfinite(scores).all() and (scores.slof >= 1 - 1e-6).all()


def test_copies_count_as_near_and_a_picture_beside_them_as_far():
    x = np.concatenate([np.repeat(unit(np.random.default_rng(1), 1, 8), 40, 0), unit(np.random.default_rng(2), 1, 8)])
    scores = local_density(x)
    assert np.isfinite(scores).all()
    assert all(score.argmax() == 40 for score in scores)


@pytest.mark.parametrize("poisoned, found", [(4, True), (60, False)])
def test_poison_is_found_while_a_batch_has_fewer_than_k(poisoned, found):
    rng = np.random.default_rng(3)
    place = unit(rng, 1, 32)
    x = np.concatenate([unit(rng, 1000 - poisoned, 32) * .5 - place, place + .15 * unit(rng, poisoned, 32)])
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    flags = np.arange(1000) >= 1000 - poisoned
    areas = [placements(score, flags).mean() for score in density_scores(x, batch=1000)]
    assert min(areas) > .99 if found else max(areas) < .5


def test_a_file_in_batches_is_scored_like_each_batch_alone(tmp_path):
    x = unit(np.random.default_rng(4), 500, 12).astype(np.float16)
    np.save(tmp_path/"images.npy", x)
    stored = np.load(tmp_path/"images.npy", mmap_mode="r")
    scores = density_scores(stored, 6, batch=128, seed=7)
    parts = np.array_split(np.random.default_rng(7).permutation(500), 4)
    for rows in parts:
        for whole, alone in zip(scores, local_density(x[rows].astype(np.float32), 6)):
            np.testing.assert_allclose(whole[rows], alone, rtol=1e-6)
    again, other = density_scores(stored, 6, batch=128, seed=7), density_scores(stored, 6, batch=128, seed=8)
    assert (again.dao == scores.dao).all() and (other.dao != scores.dao).any()


@pytest.mark.parametrize("change, says", [
    (dict(k=10), "k: 10 neighbours of 10 embeddings"),
    (dict(k=0), "take 1 to 9"),
])
def test_more_neighbours_than_there_are_is_refused(change, says):
    with pytest.raises(SettingsError, match=says):
        local_density(np.eye(10), **change)


def test_small_batches_and_what_is_not_a_number_are_refused():
    x = np.eye(100, dtype=np.float32)
    with pytest.raises(SettingsError, match="batch: 32 embeddings have too few neighbours for k=16"):
        density_scores(x, batch=32)
    x[31, 4] = np.inf
    with pytest.raises(DataError, match="row 31 of the embeddings is not a number"):
        density_scores(x)
