"What is measured of scans: cells over seeds, curves, and stages that agree with the plain way of computing them."
import json
from types import SimpleNamespace

import numpy as np
import pytest

from mcl_repro.measures.metrics import bootstrap_interval, detection_quality, detection_rates, placements
from mcl_repro.papers.cfbd import detect, fine_stage, fit_mixture, save_detection
from mcl_repro.papers import cfbd_measures as measures
from mcl_repro.papers.cfbd_measures import (
    curve_of, found_cells, keep_cells, measured, poisoned_rows, precisions, share, verdict, with_all,
)
from mcl_repro.papers.scan_sets import caption_cosines

N, POISONED = 1500, 60


def run(folder, stage, **settings):
    folder.mkdir(parents=True, exist_ok=True)
    work = SimpleNamespace(out=folder, scratch=folder, device="cpu", progress=lambda *args: None)
    return SimpleNamespace(path=folder, result=json.loads(json.dumps(stage(work, **settings), allow_nan=False)))


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Embeddings of a set whose first rows are poisoned, and what CFBD finds, as stages leave them."
    folder, rng = tmp_path_factory.mktemp("scan"), np.random.default_rng(0)
    things = unit(rng.normal(size=(30, 32)))
    shown = rng.integers(1, 30, N)
    said = np.where(np.arange(N) < POISONED, 0, shown)
    images = unit(things[shown] + .1 * rng.normal(size=(N, 32)))
    texts = unit(things[said] + .1 * rng.normal(size=(N, 32)))
    clean, changed = (SimpleNamespace(path=folder/name) for name in ("clean", "changed"))
    for at, part in ((clean.path, slice(None)), (changed.path, slice(POISONED))):
        at.mkdir()
        np.save(at/"images.npy", images[part].astype(np.float16))
        np.save(at/"texts.npy", texts[part].astype(np.float16))
    np.save(changed.path/"rows.npy", np.arange(POISONED))
    found = detect(images.astype(np.float16), texts.astype(np.float16), images, q=20, components=3, guard=False)
    detection = run(folder/"detection", lambda work: save_detection(work, found))
    scan = dict(embeddings=clean, changed=changed)
    return SimpleNamespace(folder=folder, images=images, texts=texts, flags=np.arange(N) < POISONED, found=found,
                           scan=scan, all=dict(scan, detection=detection),
                           seen=dict(changed=changed, detection=detection))


def cells(artefact, **labels):
    "Values of the cells with some labels."
    return [row["value"] for row in found_cells([artefact]) if labels.items() <= row.items()]


def test_cells_come_back_with_outcomes_and_interval_and_seeds_are_put_together(tmp_path):
    rng = np.random.default_rng(1)
    ones, two = (rng.random(300) < p for p in (.2, .6))
    kept = []
    for number, values in enumerate((ones, two)):
        folder = tmp_path/str(number)
        folder.mkdir()
        made = [share(values, metric="TPR"), measured(values, metric="mean", unit="cosine")][:2 - number]
        kept.append(SimpleNamespace(path=folder, result=dict(cells=keep_cells(SimpleNamespace(out=folder), made))))
    [tpr, mean] = found_cells(kept[:1], attack="BadNets")
    low, high = bootstrap_interval(ones.astype(float))[1:3]
    assert (tpr["attack"], tpr["unit"]) == ("BadNets", "%")
    assert tpr["value"] == pytest.approx(100 * ones.mean(), abs=1e-4)
    assert (tpr["ci_low"], tpr["ci_high"]) == pytest.approx((100 * low, 100 * high), abs=1e-3)
    assert (tpr["items"][0].outcomes == ones).all() and tpr["items"][0].scale == 100 and mean["items"][0].scale == 1
    [both] = found_cells(kept)     # the second seed has no mean
    assert both["n_seeds"] == 2 and both["value"] == pytest.approx(100 * (ones.mean() + two.mean()) / 2, abs=1e-3)
    assert 0 <= both["ci_low"] < both["ci_high"] <= 100


def test_truth_is_read_without_the_set(made, tmp_path):
    assert (poisoned_rows(made.scan["changed"]) == np.arange(POISONED)).all()
    assert len(poisoned_rows(None)) == len(poisoned_rows(SimpleNamespace(path=tmp_path))) == 0


def test_evidence_is_what_the_scores_say(made):
    artefact = run(made.folder/"evidence", measures.pair_evidence, **made.all)
    similar = caption_cosines(made.images, made.texts)
    for metric, kind in (("poisoned", made.flags), ("benign", ~made.flags)):
        [value] = cells(artefact, score="image and caption", metric=metric)
        assert value == pytest.approx(similar[kind].mean(), abs=1e-3)
    [area] = cells(artefact, score="caption and D_p", metric="AUROC")
    assert area == pytest.approx(100 * placements(made.found.correlation, made.flags).mean(), abs=1e-3)
    assert len(cells(artefact)) == 4 * 4 + 2 + 1


def test_a_judged_scan_has_areas_and_decisions(made):
    artefact, quality = run(made.folder/"judged", measures.judged_scan, **made.seen), {}
    for stage, score in (("coarse", made.found.consistency.value), ("fine", made.found.correlation)):
        quality[stage] = detection_quality(score, made.flags)["auprc"]
        assert cells(artefact, stage=stage, metric="AUPRC") == pytest.approx([100 * quality[stage]], abs=1e-3)
    assert artefact.result["auprc"] == pytest.approx(quality)
    rates = detection_rates(np.isin(np.arange(N), made.found.flagged), made.flags)
    assert cells(artefact, metric="TPR") == pytest.approx([100 * rates["tpr"]], abs=1e-3)
    assert cells(artefact, metric="FPR") == pytest.approx([100 * rates["fpr"]], abs=1e-3)


def test_rates_along_the_threshold_are_those_of_detections_with_it(made):
    artefact = run(made.folder/"threshold", measures.threshold_curve, **made.seen, steps=21)
    used, *others = artefact.result["points"]
    whole = detection_rates(np.isin(np.arange(N), made.found.flagged), made.flags)
    assert (used["alpha"], used["threshold"]) == (.05, pytest.approx(made.found.threshold))
    assert (used["tpr"], used["fpr"]) == (pytest.approx(whole["tpr"]), pytest.approx(whole["fpr"]))
    for point in others[::3]:
        fine = fine_stage(made.texts.astype(np.float16), made.found.split, alpha=point["alpha"], guard=False)
        rates = detection_rates(np.isin(np.arange(N), fine["flagged"]), made.flags)
        assert (point["tpr"], point["fpr"]) == (pytest.approx(rates["tpr"]), pytest.approx(rates["fpr"]))
    stored = np.load(made.folder/"threshold"/"curve.npz")
    assert (np.diff(stored["tpr"]) <= 0).all() and (np.diff(stored["fpr"]) <= 0).all()
    assert stored["tpr"][-1] == np.isin(made.found.split.poisoned, np.arange(POISONED)).sum() / POISONED     # D_p alone


def test_corners_are_the_whole_curve():
    from sklearn.metrics import precision_recall_curve
    rng = np.random.default_rng(2)
    flags = rng.random(3000) < .05
    score = np.round(rng.normal(size=3000) + flags, 2)     # with ties
    precision, recall, _ = precision_recall_curve(flags, score)
    curve, grid = curve_of(score, flags), np.linspace(.003, .997, 91)
    at = [np.interp(grid, r[::-1], p[::-1]) for r, p in ((recall, precision), (curve["recall"], curve["precision"]))]
    assert at[0] == pytest.approx(at[1], abs=1e-9) and len(curve["recall"]) < len(recall) / 2
    assert precisions(score, flags).mean() == pytest.approx(detection_quality(score, flags)["auprc"])


def test_a_verdict_counts_and_a_clean_set_has_no_rate_of_poison(made):
    named = made.flags.copy()
    named[100:110] = True
    told, calm = (verdict(made.found, rows, named) for rows in (np.arange(POISONED), np.zeros(0, int)))
    assert told["tp"] + told["fn"] == POISONED and told["honest_captions"] == 10
    assert told["AUROC_fine"] == pytest.approx(placements(made.found.correlation, made.flags).mean())
    assert calm["tpr"] is None and calm["tp"] == 0 and "AUROC_fine" not in calm


def test_subsets_made_by_hand_are_scored_like_one_at_a_time(made):
    artefact = run(made.folder/"faulty", measures.faulty_subsets, **made.scan, cells=[[50, 10, 20], [50, 10, 80]],
                   number=3, draws=2)
    half = made.texts.astype(np.float16)
    for fault in (20, 80):
        drawn = [measures.faulty_subset(made.flags, 10, fault, (3, 0, draw)) for draw in range(2)]
        assert [made.flags[rows].sum() for rows in drawn] == [10 - fault // 10] * 2
        expected = np.mean([placements(with_all(half, rows), made.flags).mean() for rows in drawn])
        assert cells(artefact, q=50, fault_ratio=fault) == pytest.approx([expected], abs=1e-4)


def test_mixtures_and_regions(made):
    artefact = run(made.folder/"fits", measures.mixture_fits, **made.seen, components=[1, 3], coverage=[.5, .9], q=20)
    c = made.found.consistency.value
    for k in (1, 3):
        again, stored = fit_mixture(c, k, starts=1), measures.fitted_mixture(artefact, k)
        assert all((a == b).all() for a, b in zip(again, stored))
    [small, large] = [row["benign_in_D_b"] for row in artefact.result["regions"] if row["K"] == 1]
    assert small < large and cells(artefact, K=1, gamma=90, metric="size")[0] > cells(artefact, K=1, gamma=50)[1]
    assert [row["K"] for row in artefact.result["distances"]] == [1, 3]
    assert len(cells(artefact, metric="excess")) == 2 * len(measures.LEVELS_OF_FIT)


def test_sizes_and_choices_start_from_the_scan(made):
    options = dict(q=20, components=3, guard=False)
    sizes = run(made.folder/"sizes", measures.subset_sizes, **made.all, options=options, sizes=[20, 40])
    choices = run(made.folder/"choices", measures.other_choices, **made.all, options=options, alphas=[.1, .05])
    rates = detection_rates(np.isin(np.arange(N), made.found.flagged), made.flags)
    assert sizes.result["sizes"][0]["tpr"] == pytest.approx(rates["tpr"])
    same = [row for row in choices.result["rows"] if row["variant"] == "as in the tables" and row["alpha"] == .05]
    assert len(same) == 1 and same[0]["tpr"] == pytest.approx(rates["tpr"])
    assert len(choices.result["rows"]) <= len(measures.VARIANTS) + len(measures.SWEPT_VARIANTS)


def test_likeness_of_captions(made):
    artefact = run(made.folder/"likeness", measures.caption_likeness, **made.scan, shown=10)
    stored = np.load(made.folder/"likeness"/"likeness.npz")
    assert stored["cosines"].shape == (20, 20) and stored["counts"].shape == (2, 2, 70)
    assert stored["cosines"][:10, :10].mean() > stored["cosines"][10:, 10:].mean() + .3
    assert artefact.result == dict(poisoned=POISONED, benign=N - POISONED, shown=10)


def test_detectors_of_one_set_are_judged_alike(made):
    folder, sizes = made.folder/"density", [64, 128]
    folder.mkdir()
    ranked = np.stack([made.flags, ~made.flags]).astype(np.float32)
    np.savez(folder/"scores.npz", similarity=-ranked[0], k_dist=ranked, slof=ranked, dao=-ranked)
    density = SimpleNamespace(path=folder, result=dict(batches=sizes))
    poisoned, detection = made.scan["changed"], made.all["detection"]
    judged = run(made.folder/"judged", measures.judged_detectors, poisoned=poisoned, detection=detection,
                 density=density)
    assert cells(judged, score="k-dist", metric="AUROC") == [100., 0.]
    assert cells(judged, score="DAO", metric="AUROC", batch=64) == [0.]
    assert cells(judged, score="SLOF", metric="precision of the first n", batch=64) == [100.]
    assert cells(judged, score="similarity, low", metric="AUROC") == [100.]
    assert judged.result["radius"][1] == dict(batch=128, poisoned=0., benign=1.)
    fine = 100 * placements(made.found.correlation, made.flags).mean()
    assert cells(judged, score="CFBD, fine", metric="AUROC") == [pytest.approx(fine, abs=1e-6)]
    alone = run(made.folder/"alone", measures.judged_detectors, poisoned=poisoned, detection=detection)
    low = 100 * placements(-made.found.consistency.original, made.flags).mean()
    assert cells(alone, score="similarity, low", metric="AUROC") == [pytest.approx(low, abs=1e-6)]
    assert {row["score"] for row in found_cells([alone])} == {"CFBD, coarse", "CFBD, fine", "similarity, low"}
