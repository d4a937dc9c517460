"""Preconditions: what is measured, from hand-made numbers; what is planned; what reaches the run's folder."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mcl_repro.core.errors import SettingsError
from mcl_repro.lab.lab import Lab
from mcl_repro.papers import preconditions as measuring
from mcl_repro.papers.cfbd_study import cfbd_plan
from mcl_repro.papers.cleanclip import cleanclip_plan
from mcl_repro.papers.mem import mem_plan
from mcl_repro.papers.preconditions import (
    fixed, keep_preconditions, like_the_target, matched_and_not, mean_of, measured_preconditions, needed_preconditions,
    overfitted_means, pairs_passed, points_lost, Probe, PROBES, separation, unread_words, worse_than_poison,
)
from mcl_repro.papers.ubt import ubt_plan
from mcl_repro.report.preconditions import read_preconditions
from mcl_repro.report.rules import read_claims
from mcl_repro.run.notebooks import with_needs
from mcl_repro.run.planning import PlanningLab

PLANS = dict(ubt=ubt_plan, mem=mem_plan, cleanclip=cleanclip_plan, cfbd=cfbd_plan)


def planned(paper, tmp_path, profile="smoke", kind=PlanningLab, **asked):
    lab = kind(profile, "cpu", tmp_path/"runs", module=f"mcl_repro.papers.{paper}")
    return PLANS[paper](lab, lab.profile, **asked)


def result(**numbers):
    return SimpleNamespace(result=numbers)


# numbers

def test_separation_is_in_standard_deviations():
    first, second = np.array([1., 3.]), np.array([-1., 1.])     # means 2 and 0, standard deviations of 1
    assert separation(first, second) == 2 and separation(second, first) == -2
    assert separation(np.zeros(2), np.zeros(3)) == 0


def test_nobody_is_shuffled_onto_himself_and_templates_are_met():
    eye = torch.eye(50)
    found = matched_and_not(eye, eye, eye[:1], seed=3)
    assert (found["own"] == 1).all() and (found["shuffled"] == 0).all()
    assert found["target"].tolist() == [1] + 49 * [0]


def test_a_clean_pair_is_worse_than_poison_below_its_median():
    own = np.array([.05, .1, .2, .3, .4, .5, .6, .7, .8, .9])
    assert worse_than_poison(own, np.array([0., .1, .9])) == .1     # median .1, which is not below itself
    assert worse_than_poison(own, np.array([1.])) == 1


def test_captions_like_the_target_are_as_near_as_its_own():
    templates = torch.nn.functional.normalize(torch.tensor([[1., .2, 0], [1., -.2, 0]]), dim=1)
    texts = np.array([[1, 0, 0], [0, 1, 0], [.99, 0, .141], [.5, .866, 0], [0, 0, 1]], np.float16)
    assert like_the_target(texts, templates) == pytest.approx(.4)
    assert like_the_target(texts, templates, block=2) == pytest.approx(.4)
    spread = torch.tensor([[1., 0, 0], [1, 0, 0], [0, 1, 0]])       # nearness .89, .89, .45 to their mean
    assert like_the_target(np.array([[1, 0, 0], [.2, .98, 0], [0, 0, 1]]), spread) == pytest.approx((1 + 1/3) / 3)


def test_a_word_is_read_from_ten_captions_on():
    templates = ["a photo of a {}.", "graffiti of the {}!"]
    captions = 10 * ["a Photo of THE cup"] + 9 * ["graffiti"]
    assert unread_words(captions, templates) == {"graffiti of the {}!": ["graffiti"]}
    assert unread_words([*captions, "graffiti"], templates) == {}


def test_suspicious_pairs_are_parted_by_what_they_are():
    similarities = np.array([.9, .2, .8, .6, .7])
    found = overfitted_means(similarities, suspicious=np.array([4, 0, 3]), poisoned=np.array([0, 1]))
    assert found == {"poison": .9, "other suspicious pairs": pytest.approx(.65)}
    assert overfitted_means(similarities, np.array([3]), np.array([0]))["poison"] is None


def test_a_mean_of_probes_reads_every_node_once():
    lost = mean_of([points_lost("a", "b"), points_lost("a", "c")])
    assert lost.nodes == ("a", "b", "a", "c")
    assert lost.read(*(result(clean=n) for n in (.8, .7, .8, .75))) == pytest.approx(7.5)
    assert mean_of([fixed(1.), Probe((), lambda: None)]).read() is None


def test_time_is_counted_in_pairs(tmp_path):
    plan = planned("ubt", tmp_path, "paper")
    chain = plan.chain("BadNet")
    assert pairs_passed([chain.victim]) == 3 * (500_000 // 128) * 128
    assert pairs_passed([chain.split]) == pytest.approx(500_000 / 3)
    probes = plan.preconditions["P16"]
    known = read_preconditions()["P16"]
    assert known.holds("ubt", {name: probe.read() for name, probe in probes.items()})      # the paper's own settings


# plans

@pytest.mark.parametrize("paper", PLANS)
def test_every_precondition_of_a_paper_has_its_measurement(paper):
    assert set(PROBES[paper]) == {id for id, known in read_preconditions().items() if paper in known.papers}


@pytest.mark.parametrize("paper", PLANS)
def test_whoever_wants_all_measures_all(paper, tmp_path):
    plan = planned(paper, tmp_path)
    assert list(plan.preconditions) == list(PROBES[paper])
    asked = plan.readers[f"{paper}.preconditions"]
    other = {node.key for id, nodes in plan.readers.items() if id != f"{paper}.preconditions" for node in nodes}
    own = {node.stage.name for node in asked if node.key not in other}
    # they are read from what the paper's tables have and from looks at clean data; only a control is trained for them
    looks = {"preconditions.clean_pair_facts", "preconditions.scan_set_facts", "preconditions.template_words",
             "stages.classification", "mem_measures.hacker_ranks"}
    assert own <= looks | {"mem": {"mem.hacker_clip"}}.get(paper, set())


def test_bounds_know_every_label(tmp_path):
    for paper in PLANS:
        plan = planned(paper, tmp_path, "mini")
        for id, probes in plan.preconditions.items():
            for label in probes:
                assert read_preconditions()[id].bound(paper, label), (paper, id, label)


def test_settings_of_the_paper_have_its_proportions(tmp_path):
    for paper, ids in dict(ubt=["P4", "P12"], mem=["P19"], cfbd=["P4", "P9", "P12"]).items():
        probes = planned(paper, tmp_path, "paper").preconditions
        for id in ids:
            measured = {label: probe.read() for label, probe in probes[id].items()}
            assert read_preconditions()[id].holds(paper, measured), (paper, id, measured)


def test_a_table_alone_asks_for_what_its_claims_need(tmp_path, monkeypatch):
    claim = next(c for c in read_claims().values() if c.tables == ["ubt.table1"])
    other = next(c for c in read_claims().values() if c.tables == ["ubt.table9"])
    needy = {claim.id: claim.__class__(**{**vars(claim), "needs": ("P1", "P6")}), other.id: other}
    monkeypatch.setattr(measuring, "read_claims", lambda: needy)
    plan = planned("ubt", tmp_path, tables=["ubt.table1", "ubt.preconditions"])
    assert list(plan.preconditions) == ["P1", "P6"]
    assert planned("ubt", tmp_path, tables=["ubt.table1"]).preconditions == {}
    assert list(planned("ubt", tmp_path, tables=["ubt.table2", "ubt.preconditions"]).preconditions) == []
    assert needed_preconditions(planned("ubt", tmp_path, tables=["ubt.preconditions"])) == list(PROBES["ubt"])


def test_a_run_of_a_table_is_asked_for_preconditions_too(monkeypatch):
    from mcl_repro.run import notebooks
    claim = next(c for c in read_claims().values() if c.tables == ["ubt.table1"])
    needy = {claim.id: claim.__class__(**{**vars(claim), "needs": ("P1",)})}
    monkeypatch.setattr(notebooks, "read_claims", lambda: needy)
    asked = dict(tables=["ubt.table1"], figures=["ubt.fig1"])
    assert with_needs("ubt", asked) == dict(tables=["ubt.table1", "ubt.preconditions"], figures=["ubt.fig1"])
    assert with_needs("ubt", dict(tables=["ubt.table2"])) == dict(tables=["ubt.table2"])
    assert with_needs("ubt", {}) == {}


# a run

def test_what_was_computed_is_written_and_the_rest_said_to_be_unknown(tmp_path, monkeypatch):
    plan = planned("ubt", tmp_path, kind=Lab, tables=["ubt.preconditions"])
    assert set(measured_preconditions(plan)) == {"P4", "P16"}       # settings say it
    wanted = {id: plan.preconditions[id] for id in ("P1", "P12")}
    plan.lab.run([node for probes in wanted.values() for probe in probes.values() for node in probe.nodes])
    again = planned("ubt", tmp_path, kind=Lab, tables=["ubt.table1"])     # a later run of something else
    measured = measured_preconditions(again)
    assert set(measured) == {"P1", "P4", "P12", "P16"} and 0 <= measured["P1"]["clean pairs"] <= 100
    rows = keep_preconditions(again).set_index("id")
    assert rows.met["P1"] == "not judged" and rows.met["P5"] == "not measured"      # smoke is never judged
    assert (again.lab.folder/"preconditions.csv").read_text().startswith("id,paper,fact,where,printed,measured,")


def test_data_that_are_not_here_leave_a_number_out(tmp_path, monkeypatch):
    plan = planned("cfbd", tmp_path, kind=Lab, tables=["cfbd.table1"])

    def absent(self, name):
        raise SettingsError(f"role {name}: not here")
    monkeypatch.setattr(Lab, "role", absent)
    assert "P7" not in measured_preconditions(plan) and "P9" in measured_preconditions(plan)
