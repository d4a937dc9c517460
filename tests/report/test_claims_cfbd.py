"""The claims of CFBD: every one has a rule or a reason, every rule finds its cells, and the audit agrees with a
reader's and with plain arithmetic.
"""
from functools import cache

import numpy as np
import pandas as pd
import pytest

from mcl_repro.papers.cfbd_study import OWN_TABLES, TABLES
from published_tables import not_on_record
from mcl_repro.report.claims import audit, judge
from mcl_repro.report.rules import pair_cells, Printed, read_claims, rule_pairs, Run
from mcl_repro.measures.metrics import Items
from mcl_repro.report.printed import paper_table, printed_entries
from mcl_repro.report.tables import tidy, write_table

CLAIMS = {id: c for id, c in read_claims().items() if c.paper == "cfbd"}

# audits that differ from those by hand, and why
DIFFERS = {
    "cfbd.c01": 'by hand one detector was not enough for "most existing detectors"',
    "cfbd.c10": "by hand the missing FPR counted; rules on tables of our own take no part in the audit",
    "cfbd.c11": "by hand only 100.0 counted as 100%; 99.69 rounds to it",
    "cfbd.c24": "by hand Table 5 was asked, which holds the share of benign pairs fixed",
    "cfbd.c29": "by hand 15 of 18 zeros counted as failed",
    "cfbd.c32": "by hand half of the sentence, which is true of ISSBA, counted as failed",
    "cfbd.c33": "by hand 4 of 9 attacks counted as failed",
    "cfbd.c35": "by hand one wrong end of the range counted as failed",
    "cfbd.c38": "by hand eight zeros where seven are said counted as failed; a gain is at least what is said",
    "cfbd.c47": "by hand the missing false positives counted",
    "cfbd.c49": "by hand the cause was asked for, which is not printed; the rule has the trend",
}
# tables that the notebook writes: their factors, and labels that rules name (in every profile)
OWN = {
    "separation": dict(
        attack=None,
        score=[
            "image and caption", "image and generated text", "consistency", "caption and all poison", "caption and D_p",
            "captions of one kind",
        ],
        metric=["poisoned", "benign", "AUROC", "overlap"],
    ),
    "kept": dict(
        attack=None, defense=["CFBD (coarse-grained)", "CFBD (coarse-to-fine-grained)", "CFBD, q chosen"],
        metric=["poison kept", "benign kept"],
    ),
    "false_positives": dict(
        poison_rate=[0.6, 0.5, 0.4, 0.3], method=["ABL", "Similarity", "CFBD", "CFBD, q chosen"], attack=None,
        metric=["FPR", "precision"],
    ),
    "precision": dict(
        attack=None,
        stage=["coarse", "fine"],
        metric=[
            "AUPRC", "precision at recall 10%", "precision at recall 50%", "precision at recall 90%",
            "precision of the first n", "poison in D_b", "precision of D_sp", "TPR", "FPR",
        ],
    ),
    "fit": dict(K=[1, 5], below=[1, 50, 99]),
    "regions": dict(K=[1, 5], gamma=[80, 90, 95, 99], metric=["poison", "size"]),
    "sizes": dict(attack=None, q=[50, 400], metric=["TPR", "FPR", "AUROC", "poison in D_p"]),
}
ATTACKS = ["BadNets", "Blended", "Trojan", "ISSBA", "LC", "WaNet", "mmPoison", "BadCLIP", "SIG"]


@cache
def printed(table):
    return paper_table(f"cfbd.{table}")
def value(table, **labels):
    t = printed(table)
    for f, v in labels.items():
        t = t[t[f] == v]
    assert len(t) == 1, labels
    return t.paper_value.iloc[0]
def states(id):
    return [c.state for c in audit(CLAIMS[id]).comparisons]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run with made-up outcomes in every cell that a rule can ask for."
    folder, rng = tmp_path_factory.mktemp("run"), np.random.default_rng(0)
    def made(scale):
        x = rng.random(20)
        return dict(value=scale*x.mean(), ci_low=0, ci_high=scale, items=[Items(x, scale=scale)])
    for name, table in printed_entries("tables").items():
        if table["paper"] == "cfbd":
            rows = [{f: row[f] for f in (*table["factors"], "metric")} | made(100 if row["unit"] == "%" else 1)
                    for row in table["rows"]]
            write_table(tidy(name, rows), name, folder, "made up")
    for name, factors in OWN.items():
        keys = pd.MultiIndex.from_product([labels or ATTACKS for labels in factors.values()], names=factors)
        rows = [{"metric": "excess", "unit": "%"} | dict(zip(factors, key)) | made(100) for key in keys]
        extra = dict(title=name, factors=list(factors), columns=[list(factors)[-1]])
        write_table(tidy(f"cfbd.{name}", rows, extra=extra), f"cfbd.{name}", folder, "made up")
    return Run(folder, 200)


def test_every_claim_has_an_entry():
    assert len(CLAIMS) == 65 and [id for id, c in CLAIMS.items() if not c.rules and not c.untestable] == []
    assert {id for id, c in CLAIMS.items() if c.untestable} == {"cfbd.c05", "cfbd.c20"}


def test_what_claims_need_is_asked_for_where_the_sentence_hangs_on_it():
    assert all(bool(c.needs) == bool(c.rules) for c in CLAIMS.values())
    by_detection = {"P7", "P9", "P12", "P22", "P24"}
    for id, c in CLAIMS.items():
        said = str(c.rules)
        if "cfbd.table3" in c.tables and "'CFBD'" in said:
            assert by_detection | {"P4"} <= set(c.needs), id
        if "cfbd.table2" in c.tables:
            assert {"P5", "P6"} <= set(c.needs), id
        assert ("P11" in c.needs) == ("(coarse-grained)" in said and "cfbd.kept" not in c.tables), id
        for method, needed in (("RoCLIP", "P14"), ("CleanCLIP", "P15")):
            assert (needed in c.needs) == (method in said), id
    assert {id for id, c in CLAIMS.items() if "P8" in c.needs} == {"cfbd.c24", "cfbd.c63"}


def test_most_claims_can_be_judged_without_what_a_small_run_cannot_have():
    "All four papers: closeness of the weights, overlap, times, steps of a hacker and of a search are out of reach."
    unmet = {"P2", "P10", "P16", "P19", "P20"}
    decided = [c for c in read_claims().values() if c.rules and not all(r.get("levels") for r in c.rules)]
    assert sum(not unmet & set(c.needs) for c in decided) >= 130


def table3(folder, cfbd, abl):
    "A run whose detectors find these shares of a thousand poisoned pairs."
    rows = []
    for row in paper_table("cfbd.table3").to_dict("records"):
        labels = {f: row[f] for f in printed_entries("tables")["cfbd.table3"]["factors"]} | {"metric": "TPR"}
        share = cfbd if row["method"] == "CFBD" else abl
        x = np.arange(1000) < 1000*share
        rows.append(labels | dict(value=100*x.mean(), ci_low=0, ci_high=100, unit="%", items=[Items(x, scale=100)]))
    write_table(tidy("cfbd.table3", rows), "cfbd.table3", folder, "made up")
    return Run(folder, 200)


def test_a_detector_that_finds_nothing_is_no_rival(tmp_path):
    at_work, idle = table3(tmp_path/"at work", .99, .2), table3(tmp_path/"idle", .99, 0)
    for id in ("cfbd.c01", "cfbd.c48"):
        assert judge(CLAIMS[id], at_work).verdict == "replicated"
        assert judge(CLAIMS[id], idle).verdict != "replicated"
    assert judge(CLAIMS["cfbd.c02"], at_work).verdict == "replicated"
    assert judge(CLAIMS["cfbd.c02"], table3(tmp_path/"half", .5, .2)).verdict == "in_direction"
    assert judge(CLAIMS["cfbd.c02"], table3(tmp_path/"guess", .01, .2)).verdict == "not_replicated"


@pytest.mark.parametrize("id", [id for id, c in CLAIMS.items() if c.rules])
def test_every_rule_finds_cells_and_no_row_of_ours(id, run):
    for rule in CLAIMS[id].rules:
        source = Printed() if rule["of"]["table"] in printed_entries("tables") else run
        pairs = rule_pairs(source, rule, id)
        assert pairs
        cells = [labels for p in pairs for _, labels in pair_cells(p)]
        assert all("q chosen" not in label for labels in cells for label in labels.values())
    only_levels = all(r.get("levels") for r in CLAIMS[id].rules)
    decided = judge(CLAIMS[id], run).verdict != "not_testable"
    assert decided != only_levels


def test_tables_of_our_own_are_those_that_claims_ask_for_and_made_as_planned():
    asked = {t.partition(".")[2] for c in CLAIMS.values() for t in c.tables} - {t.partition(".")[2] for t in TABLES}
    assert asked == set(OWN) == set(OWN_TABLES) - {"unlearning", "chosen", "density"}     # of which no claim speaks
    assert {name: list(factors) for name, factors in OWN.items()} == {name: OWN_TABLES[name]["factors"] for name in OWN}


@pytest.mark.parametrize("name", OWN)
def test_published_tables_of_our_own_hold_the_labels_that_rules_name(name):
    rules = [rule for c in CLAIMS.values() for rule in c.rules if rule["of"]["table"] == f"cfbd.{name}"]
    assert rules and [label for rule in rules for label in not_on_record(rule)] == []


def test_the_audit_agrees_with_the_reader_but_for_known_differences():
    found = {id: (audit(c).verdict, c.by_hand) for id, c in CLAIMS.items()}
    assert {id for id, (ours, theirs) in found.items() if ours != theirs} == set(DIFFERS)
    assert all(CLAIMS[id].reading for id in DIFFERS)


def test_all_rules_of_figures_and_prose_take_no_part_in_the_audit():
    for id, c in CLAIMS.items():
        if all(t not in printed_entries("tables") for t in c.tables):
            assert audit(c).verdict == "not_checkable", id


# ---- audits by plain arithmetic on the printed cells

FULL, COARSE = "CFBD (coarse-to-fine-grained)", "CFBD (coarse-grained)"

def test_detection_rates():
    cfbd, abl = (printed("table3").query(f'method == "{m}"').paper_value for m in ("CFBD", "ABL"))
    assert (
        len(cfbd) == 20 and cfbd.min() == 98.02 > 98 and (cfbd >= 99.5).sum() == states("cfbd.c46").count("holds") == 2
    )
    found = audit(CLAIMS["cfbd.c01"]).rules
    carried = [sum(c.state == "holds" for c in made) for _, made, _ in found]
    assert carried == [(abl < 50).sum(), (abl > 3).sum()] == [19, 20]
    assert [value("table3", method="ABL", attack="BadNets", poison_rate=r) for r in (0.6, 0.5, 0.4, 0.3)] == [
        54.66, 45.41, 47.65, 29.57,
    ] and set(states("cfbd.c49")) == {"holds"}
    best = {
        a: max(value("table3", method="CFBD", attack=a, poison_rate=r) for r in (0.6, 0.5, 0.4, 0.3))
        for a in ("BadNets", "Blended", "Trojan")
    }
    assert [v >= 99.5 for v in best.values()] == [s == "holds" for s in states("cfbd.c11")] == [True, False, True]


def test_accuracies():
    ca = lambda d, a: value("table1", defense=d, attack=a)
    gaps = {a: ca("Train on Clean", a) - ca(FULL, a) for a in ATTACKS}
    assert (
        sum(g < 1 for g in gaps.values()) == states("cfbd.c33").count("holds") == 4 and max(gaps, key=gaps.get) == "LC"
    )
    deficit = {a: ca(FULL, a) - ca(COARSE, a) for a in ATTACKS}
    others = [a for a in ATTACKS if a not in ("ISSBA", "WaNet")]
    assert (
        round(deficit["ISSBA"], 2) == 32.54 == round(max(deficit.values()), 2)
        and sorted(deficit, key=deficit.get)[2] == "WaNet"
    )
    assert [deficit[x] >= deficit[a] for x in ("ISSBA", "WaNet") for a in others] == [
        s == "holds" for s in states("cfbd.c32")
    ]
    made = audit(CLAIMS["cfbd.c32"]).comparisons
    assert np.allclose([c.margin for c in made], [deficit[x] - deficit[a] for x in ("ISSBA", "WaNet") for a in others])
    losses = [ca("Train on Clean", a) - ca("RoCLIP", a) for a in ATTACKS]
    assert (round(min(losses), 2), round(max(losses), 2)) == (10.51, 19.32)
    assert (
        sum(ca(FULL, a) >= max(ca("CleanCLIP", a), ca("RoCLIP", a)) for a in ATTACKS)
        == states("cfbd.c27").count("holds")
        == 8
    )


def test_attack_successes():
    asr = lambda d: {a: value("table2", defense=d, attack=a) for a in ATTACKS}
    assert {a for a, v in asr(FULL).items() if v > 0.5} == {"LC"} and {
        a for a, v in asr(COARSE).items() if v > 0.5
    } == {"LC", "BadCLIP"}
    assert states("cfbd.c29").count("fails") == 3 and states("cfbd.c42").count("fails") == 1 == states(
        "cfbd.c43"
    ).count("fails")
    assert asr("CleanCLIP")["BadCLIP"] > .5*asr("No Defense")["BadCLIP"]
    assert (
        sum(asr(FULL)[a] <= asr(d)[a] for a in ATTACKS for d in ("CleanCLIP", "RoCLIP"))
        == states("cfbd.c39").count("holds")
        == 16
    )


def test_fault_tolerance():
    t = printed("table5").pivot_table(index="attack", columns=["q", "fault_ratio"], values="paper_value")
    assert (t[400] >= t[50]).to_numpy().sum() == states("cfbd.c54").count("holds") == 22
    assert (
        t[50][80].min() == 0.9136
        and t[400][80].min() == 0.9905
        and ((t.xs(80, axis=1, level=1)) >= 0.9 * t.xs(20, axis=1, level=1)).to_numpy().all()
    )
    slopes = {(a, q): np.polyfit(range(4), t.loc[a, q], 1)[0] for a in t.index for q in (50, 400)}
    made = audit(CLAIMS["cfbd.c51"]).comparisons
    assert len(made) == 12 and np.allclose(sorted(-v for v in slopes.values()), sorted(c.margin for c in made))
