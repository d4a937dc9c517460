"CFBD's plan: it computes nothing, has all that the notebook shows, each once, and parts of it are parts of the whole."
import pytest

from mcl_repro.papers.cfbd_study import cfbd_plan, COMPARED, FED_BY, plan_overview, TABLES
from mcl_repro.core.errors import SettingsError
from mcl_repro.lab.lab import Lab


@pytest.fixture
def lab(tmp_path, monkeypatch):
    "A lab that may not run anything."
    monkeypatch.setattr(Lab, "run", lambda *args: pytest.fail("something was computed"))
    lab = Lab("smoke", device="cpu", runs=tmp_path/"runs", progress=False, seeds=2)
    yield lab
    lab.close()


def stages(nodes):
    return {node.stage.name for node in nodes}


def test_a_plan_names_everything_once_and_computes_nothing(lab):
    plan = cfbd_plan(lab, lab.profile)
    attacks, parts = list(lab.profile.cfbd.attacks), plan.parts
    assert len(plan.nodes) == len(set(plan.nodes))
    assert set(parts.trained) == {(a, s) for a in [*attacks, "none"] for s in lab.seeds}
    assert len(parts.at_rate) == len(parts.isolated) == 4 * len(parts.rated) * 2
    assert set(parts.judged) == {(a, name, s) for a in parts.fed for name in FED_BY for s in lab.seeds}
    shown = [parts.mapping, parts.untouched, parts.embeddings, parts.strained, *parts.isolated.values()]
    shown += [*parts.repaired.values(), *parts.judged.values()]
    for chain in [*parts.trained.values(), *parts.at_rate.values()]:
        shown += [chain.poisoned, chain.detect, chain.chosen.detect]
    assert set(shown) <= set(plan.nodes)


def test_lines_are_those_of_the_two_tables_of_models(lab):
    plan = cfbd_plan(lab, lab.profile)
    attacks = len(lab.profile.cfbd.attacks)
    counts = {table: sum(line.table == table for line in plan.lines) for table in TABLES}
    assert counts == {"cfbd.table1": attacks * (len(COMPARED) + 1), "cfbd.table2": attacks * len(COMPARED),
                      "cfbd.table3": 0, "cfbd.table4": 0, "cfbd.table5": 0}
    overview = plan_overview(plan)
    assert overview.loc["cfbd.table2", "how many"] == counts["cfbd.table2"]
    assert overview["how many"].iloc[-1] == len(plan.nodes)


@pytest.mark.parametrize("table, there, missing", [
    ("cfbd.table2", "ubt.ubt_unlearn", "scan_sets.scan"),
    ("cfbd.table3", "baselines.abl_isolation", "scan_sets.scan"),
    ("cfbd.table4", "scan_sets.robustness", "baselines.abl_isolation"),
])
def test_one_table_needs_less(lab, table, there, missing):
    whole, part = cfbd_plan(lab, lab.profile), cfbd_plan(lab, lab.profile, [table])
    assert set(part.nodes) < set(whole.nodes)
    assert there in stages(part.nodes) and missing not in stages(part.nodes)


def test_one_attack_needs_less_and_the_first_is_the_one_of_the_figures(lab):
    plan = cfbd_plan(lab, lab.profile, attack_names=["SIG"])
    assert {attack for attack, _ in plan.parts.trained} == {"SIG", "none"}
    assert plan.parts.basic == "SIG" and plan.parts.rated == []


@pytest.mark.parametrize("wrong, message", [
    (dict(tables=["cfbd.table9"]), "unknown table 'cfbd.table9'"),
    (dict(attack_names=["Nobody"]), "unknown attack 'Nobody'"),
])
def test_unknown_names_are_refused(lab, wrong, message):
    with pytest.raises(SettingsError, match=message):
        cfbd_plan(lab, lab.profile, **wrong)
