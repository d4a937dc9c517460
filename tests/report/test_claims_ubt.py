"""UBT's claims: each has a rule or a reason, rules say what the sentences say, and what decides them is in the printed
tables or in what the notebook writes.
"""
import json
import numpy as np
import pytest

from published_tables import not_on_record
from mcl_repro.report.claims import audit, judge
from mcl_repro.report.rules import Printed, read_claims, rule_pairs, Run
from mcl_repro.measures.metrics import Items
from mcl_repro.report.printed import paper_table
from mcl_repro.report.tables import tidy, write_table

CLAIMS = {id: c for id, c in read_claims().items() if c.paper == "ubt"}
PRINTED = [f"ubt.table{i}" for i in range(1, 11)]
UNTESTABLE = {"ubt.c06", "ubt.c09", "ubt.c14", "ubt.c16", "ubt.c20", "ubt.c21", "ubt.c37", "ubt.c69", "ubt.c70"}
OTHER_THAN_BY_HAND = {"ubt.c14": "a number in the text against a row label of Table IX: no cell says it",
                      "ubt.c27": "the end value is wrong, the starting value and the direction are not",
                      "ubt.c54": "the number is wrong, that the success is greatly lowered is not"}


def on_figures(claim):
    return bool(claim.tables) and not set(claim.tables) & set(PRINTED)
def exactly(value):
    return Items(np.array([round(1000*value)]), scale=.001)
def as_measured(labels, value, unit, seeds):
    return dict(
        labels, value=value, ci_low=value, ci_high=value, n_seeds=seeds, unit=unit, items=[exactly(value)] * seeds
    )


def printed_run(folder, seeds=1):
    "A run that measured what the paper prints, without any uncertainty."
    for table in PRINTED:
        rows = paper_table(table)
        known = rows[rows.paper_value.notna()]
        cells = []
        for row in known.to_dict("records"):
            labels = {k: v for k, v in row.items() if k not in ("paper_value", "printed", "unit")}
            cells.append(as_measured(labels, row["paper_value"], row["unit"], seeds))
        write_table(tidy(table, cells), table, folder, "as printed")
    return folder


# What the tables of our own say if the paper is right about its figures, and if it is wrong: cells by table.
ATTACKS = ("BadNet", "Blended", "SIG", "SSBA", "TrojVQA")
APART = "similarity of poisoned pairs", "similarity of other pairs", "AUROC"

def own_cells(right):
    pick = lambda yes, no: yes if right else no
    def apart(poisoned, others, auroc):
        return dict(zip(APART, (poisoned, others, auroc)))
    yield "along_path", ["steps"], {(n,): {"CA": 80 - pick(1, -1)*n, "ASR": 99 - pick(2, -1)*n} for n in (0, 4, 8)}
    yield (
        "selection",
        ["attack"],
        {
            (a,): {
                "poison among the selected": pick(100, 5), "poison among the rest": 10,
                "similarity of the selected": pick(0.9, 0.5), "spread of the selected": pick(0.02, 0.3),
                "taken to be poisoned": 100,
            }
            for a in ATTACKS
        }
        | {
            ("none",): {
                "similarity of the selected": 0.6, "spread of the selected": 0.1, "taken to be poisoned": pick(0, 100),
            }
        },
    )
    yield (
        "separation_abl",
        ["method", "attack"],
        {
            (m, a): {"AUROC": x, "poison among the chosen": p}
            for a in ATTACKS[:2]
            for m, x, p in (("ABL", 70, pick(3, 80)), ("UBT", pick(99, 45), 100))
        },
    )
    yield (
        "separation_losses",
        ["model"],
        {
            ("before overfitting",): apart(0.3, 0.1, 90),
            ("first term only",): pick(apart(0.95, 0.9, 60), apart(0.9, 0.05, 99)),
            ("both terms",): pick(apart(0.94, 0.76, 99), apart(0.2, 0.3, 40)),
        },
    )
    yield (
        "separation_sizes", ["dataset_size"],
        {(n,): apart(0.9, 0.4, pick(98, 45)) for n in ("250K", "500K", "750K", "1M")},
    )
    yield (
        "separation_counts",
        ["backdoor_number"],
        {
            (n,): apart(0.9 + pick(1, -1) * n / 1e5, 0.4, pick(98, 45)) | {"poison among the selected": pick(100, 15)}
            for n in (750, 1000, 1500, 2000, 3000, 5000)
        },
    )
    yield (
        "trigger_relevance",
        ["attack"],
        {
            (a,): {"relevance beyond chance": pick(5, -0.1) if a in ("BadNet", "TrojVQA") else pick(0.2, 2)}
            for a in ATTACKS
        },
    )
    yield (
        "closeness",
        ["models"],
        {
            ("poisoned → retrained",): {"KL of weights": pick(100, 900), "pairs for a gap of 0.1": pick(5000, 20)},
            ("public → retrained",): {"KL of weights": 500, "pairs for a gap of 0.1": 30000},
        },
    )
    yield (
        "unlearned_pairs", ["pairs"],
        {("all selected",): {"ASR": pick(0, 40), "number": 48}, (1,): {"ASR": 60, "number": 1}},
    )

def own_run(folder, right, seeds=1):
    for name, factors, cells in own_cells(right):
        rows = [
            as_measured(dict(zip(factors, key), metric=metric), value, "units", seeds)
            for key, metrics in cells.items()
            for metric, value in metrics.items()
        ]
        write_table(
            tidy(f"ubt.{name}", rows, dict(title=name, factors=[*factors, "metric"])), f"ubt.{name}", folder, "made up"
        )
    return folder


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    return printed_run(tmp_path_factory.mktemp("printed"))


# ---- every claim

def test_every_claim_has_rules_or_a_reason():
    assert len(CLAIMS) == 71 and {id for id, c in CLAIMS.items() if c.untestable} == UNTESTABLE
    assert all(bool(c.rules) != bool(c.untestable) for c in CLAIMS.values())
    assert all(len(c.untestable) > 40 for c in CLAIMS.values() if c.untestable), "a reason is a sentence"


def test_what_claims_need_is_asked_for_where_the_sentence_hangs_on_it():
    assert all(bool(c.needs) == bool(c.rules) for c in CLAIMS.values())
    def asks(claim, word):
        return word in json.dumps(claim.rules)
    for id, c in CLAIMS.items():
        assert ("P16" in c.needs) == asks(c, "total_time"), id
        if asks(c, '"KL"') or asks(c, "KL of weights"):
            assert "P2" in c.needs, id
        if "ubt.table3" in c.tables:    # those whose cells are compared
            named = [m for m in ("CleanCLIP", "RoCLIP") if asks(c, m)]
            assert {dict(CleanCLIP="P15", RoCLIP="P14")[m] for m in named} <= set(c.needs), id
        if "ubt.table1" in c.tables and asks(c, "ASR"):
            assert {"P1", "P4", "P5", "P6", "P25"} <= set(c.needs), id


def test_rules_speak_of_the_papers_method_only():
    "Our option with retention is no defence of the paper."
    assert not any("retention" in json.dumps(c.rules) or "CFBD" in json.dumps(c.rules) for c in CLAIMS.values())


def test_every_inconsistency_that_touches_a_claim_is_named():
    named = {i for c in CLAIMS.values() for i in c.see}
    # a figure that is never cited, and a remark that breaks no claim
    assert named == {f"ubt.i{n:02d}" for n in range(1, 20)} - {"ubt.i13", "ubt.i15"}


def test_every_rule_resolves():
    "On printed cells, or on a table of ours that the published run has, with the labels that the rule asks for."
    for claim in CLAIMS.values():
        for rule in claim.rules:
            if rule["of"]["table"] in PRINTED:
                assert rule_pairs(Printed(), rule, claim.id), (claim.id, rule)
            assert not_on_record(rule) == [], claim.id


# ---- the audit

def test_audit_is_what_a_reader_found():
    assert {id for id, c in CLAIMS.items() if audit(c).verdict != c.by_hand} == set(OTHER_THAN_BY_HAND)
    assert {id: audit(CLAIMS[id]).verdict for id in OTHER_THAN_BY_HAND} == {
        "ubt.c14": "not_checkable",
        "ubt.c27": "partly",
        "ubt.c54": "partly",
    }


def test_what_only_figures_show_cannot_be_audited():
    figures = {id for id, c in CLAIMS.items() if on_figures(c)}
    assert figures == {f"ubt.c{n}" for n in (13, 15, 17, 19, 26, 38, 39, 40, 41, 46, 47, 50, 66, 67, 68)}
    assert {audit(CLAIMS[id]).verdict for id in figures} == {"not_checkable"}


def value(table, metric, **labels):
    rows = paper_table(table)
    rows = rows[rows.metric == metric]
    for k, v in labels.items():
        rows = rows[rows[k].astype(str) == str(v)]
    return rows.paper_value.to_numpy()

def found(id, rule=0):
    return audit(CLAIMS[id]).rules[rule][1]

@pytest.mark.parametrize("id, metric, sign, other, points", [
    ("ubt.c02", "ASR", -1, "CleanCLIP", 19.0425),
    ("ubt.c03", "CA", 1, "CleanCLIP", 2.5725),
    ("ubt.c31", "ASR", -1, "CleanCLIP", 19.0425),
    ("ubt.c32", "ASR", -1, "RoCLIP", 52.5175),
    ("ubt.c33", "CA", 1, "CleanCLIP", 2.5725),
    ("ubt.c34", "CA", 1, "RoCLIP", 1.045),
])
def test_headline_differences(id, metric, sign, other, points):
    plain = sign*(value("ubt.table3", metric, defense="UBT") - value("ubt.table3", metric, defense=other)).mean()
    assert plain == pytest.approx(points) and [c.left for c in found(id)] == pytest.approx([plain])


def test_some_audits_by_plain_code():
    cost = value("ubt.table1", "CA", defense="No defense") - value("ubt.table1", "CA", defense="UBT")
    assert [c.left for c in found("ubt.c23")] == pytest.approx(cost.tolist()) and cost.max() == pytest.approx(1.98)
    assert (
        max(c.left for c in found("ubt.c23", 1)) == pytest.approx(62.58 - 60.56)
        and audit(CLAIMS["ubt.c23"]).verdict == "partly"
    )
    lost = value("ubt.table2", "CA", defense="No defense") - value("ubt.table2", "CA", defense="ABL")
    assert sorted(c.left for c in found("ubt.c25", 1)) == pytest.approx(sorted(lost)) and sorted(lost) == pytest.approx(
        [11.06, 11.91]
    )
    times = {d: value("ubt.table8", "total_time", defense=d)[0] for d in ("UBT", "CleanCLIP", "RoCLIP")}
    assert 1 - times["UBT"] / times["CleanCLIP"] == pytest.approx(0.281, abs=1e-3) and {
        c.state for c in found("ubt.c61")
    } == {"holds"}
    drops = [
        (
            value("ubt.table6", "ASR", defense="No defense", dataset=d)
            - value("ubt.table6", "ASR", defense="CleanCLIP", dataset=d)
        )[0]
        for d in ("CIFAR100", "Caltech101")
    ]
    assert (
        found("ubt.c55")[0].left == pytest.approx(drops[1] - drops[0])
        and found("ubt.c54", 1)[0].left == pytest.approx(drops[1])
        and drops[1] == pytest.approx(60.18)
    )
    lower = (value("ubt.table6", "CA", defense="No defense") - value("ubt.table6", "CA", defense="CleanCLIP") > 2).sum()
    assert lower == 4 == sum(c.state == "holds" for c in found("ubt.c57"))
    kl = {d: value("ubt.table3", "KL", defense=d) for d in ("No defense", "UBT", "CleanCLIP", "RoCLIP")}
    assert (
        (kl["UBT"] <= np.minimum(kl["CleanCLIP"], kl["RoCLIP"])).all()
        and (kl["No defense"] < kl["UBT"]).all()
        and audit(CLAIMS["ubt.c35"]).verdict == "partly"
    )


# ---- our verdicts

def test_a_run_that_measured_the_printed_numbers_is_judged_as_the_audit(printed):
    run = Run(printed, count=4)
    for id, c in CLAIMS.items():
        if c.untestable or not set(c.tables) <= set(PRINTED):
            continue
        made = judge(c, run, "paper")
        printed_too = audit(c)
        carried = [x for x in printed_too.comparisons if x.state == "holds"]
        assert made.verdict == "replicated" and printed_too.verdict in ("holds", "partly"), (id, made.evidence)
        if printed_too.verdict == "partly":     # what print itself fails is not asked
            assert len(made.comparisons) == len(carried) < len(printed_too.comparisons), id


def test_levels_are_not_asked_of_stand_ins(printed):
    "Without them ABL's wrong end value and CleanCLIP's wrong drop do no harm: what is left is the relation."
    run = Run(printed, count=4)
    assert [judge(CLAIMS[id], run, "mini").verdict for id in ("ubt.c27", "ubt.c54")] == ["replicated"]*2
    assert all(any(not r.get("levels") for r in c.rules) for c in CLAIMS.values() if c.rules), (
        "every claim with rules has one that stand-ins can decide"
    )


@pytest.mark.parametrize("right, verdict", [(True, "replicated"), (False, "not_replicated")])
@pytest.mark.parametrize("seeds", [1, 3])
def test_figures_are_judged_on_tables_of_our_own(right, verdict, seeds, tmp_path):
    run = Run(own_run(printed_run(tmp_path, seeds), right, seeds), count=4)
    judged = {id: judge(c, run) for id, c in CLAIMS.items() if set(c.tables) - set(PRINTED)}
    assert {id: j.verdict for id, j in judged.items() if j.verdict != verdict} == {}, {
        id: j.evidence for id, j in judged.items()
    }
    assert {j.n_seeds for j in judged.values()} == {seeds}


def changed_run(folder, table, change):
    "The printed cells, but for those of a table that `change` (of labels and value) gives another value."
    printed_run(folder)
    cells = []
    for row in paper_table(table).to_dict("records"):
        labels = {k: v for k, v in row.items() if k not in ("paper_value", "printed", "unit")}
        cells.append(as_measured(labels, change(labels, row["paper_value"]), row["unit"], 1))
    write_table(tidy(table, cells), table, folder, "made up")
    return Run(folder, count=4)


def test_nobody_is_outdone_who_does_nothing(tmp_path):
    "UBT is 52 points below RoCLIP also where RoCLIP leaves all attacks as they were: that is no gain over a defence."
    undefended = {a: value("ubt.table3", "ASR", defense="No defense", attack=a)[0] for a in ATTACKS[:4]}
    def idle(labels, number):
        of_roclip = labels["defense"] == "RoCLIP" and labels["metric"] == "ASR"
        return undefended[labels["attack"]] if of_roclip else number
    run = changed_run(tmp_path, "ubt.table3", idle)
    made = judge(CLAIMS["ubt.c32"], run)
    assert made.verdict != "replicated" and [outcome for *_, outcome in made.rules] == ["holds", "open"]
    assert judge(CLAIMS["ubt.c31"], run).verdict == "replicated"


@pytest.mark.parametrize("auroc, verdict", [(70, "replicated"), (99, "not_replicated")])
def test_few_poisoned_among_one_per_cent_is_no_failure_of_the_ranking(auroc, verdict, tmp_path):
    "Where 0.3% is poisoned, most of the 1% that ABL isolates are clean even if it ranks all poison first."
    rows = [as_measured(dict(method=m, attack=a, metric=k), v, "%", 1) for a in ATTACKS[:2]
            for m, numbers in (("ABL", (auroc, 30)), ("UBT", (99, 100)))
            for k, v in zip(("AUROC", "poison among the chosen"), numbers)]
    factors = ["method", "attack", "metric"]
    table = tidy("ubt.separation_abl", rows, dict(title="ranked", factors=factors))
    write_table(table, "ubt.separation_abl", tmp_path, "made up")
    assert judge(CLAIMS["ubt.c26"], Run(tmp_path, count=4)).verdict == verdict


def test_a_clean_model_is_rejected_where_it_comes_back_as_it_was(tmp_path):
    def verdict(name, loss):
        def change(labels, number):
            return number - loss if (labels["defense"], labels["metric"]) == ("UBT", "CA") else number
        return judge(CLAIMS["ubt.c52"], changed_run(tmp_path/name, "ubt.table5", change)).verdict
    assert verdict("same", 0) == "replicated" and verdict("unlearned", 1.5) == "not_replicated"


def test_a_run_of_some_attacks_only_leaves_the_rest_open(tmp_path):
    "What was not run is no contradiction and no error."
    own_run(tmp_path, True)
    rows = [as_measured(dict(attack="BadNet", metric="relevance beyond chance"), 5, "ratio", 1)]
    table = tidy("ubt.trigger_relevance", rows, dict(title="one attack", factors=["attack", "metric"]))
    write_table(table, "ubt.trigger_relevance", tmp_path, "made up")
    made = judge(CLAIMS["ubt.c47"], Run(tmp_path, count=4))
    assert made.verdict == "not_testable" and "Not run: ubt.trigger_relevance has no cell with" in made.why
