"""The claims of MEM and CleanCLIP: all have a rule or a reason, rules resolve, audits say what a reader of the tables
says, and verdicts turn with the numbers.
"""
from dataclasses import replace

import numpy as np
import pytest

from published_tables import not_on_record, skip_if_older
from mcl_repro.lab.profiles import load_profile
from mcl_repro.measures.metrics import bootstrap_interval, median_rank
from mcl_repro.papers.stages import cell
from mcl_repro.report.claims import audit, judge
from mcl_repro.report.printed import paper_table, printed_entries, table_spec
from mcl_repro.report.rules import Printed, read_claims, rule_pairs, Run
from mcl_repro.report.tables import tidy, write_table

CLAIMS = {id: c for id, c in read_claims().items() if c.paper in ("mem", "cleanclip")}
# audits that differ from the transcription's
OTHERWISE = {"mem.c05": "1.7 against 1.7 is a tie, which the glossary does not count against a method"}
# labels that the published run has not, since its data are too small for them
ONLY_AT_PAPER_SCALE = [("cleanclip.poison_count", "count", "75")]

def test_every_claim_has_rules_or_a_reason():
    assert len(CLAIMS) == 38 + 5
    untestable = ["mem.c06", "mem.c08", "mem.c12", "mem.c23", "mem.c31"]
    assert sorted(id for id, c in CLAIMS.items() if c.untestable) == untestable
    for c in CLAIMS.values():
        assert bool(c.rules) != bool(c.untestable), c.id

@pytest.mark.parametrize("id", CLAIMS)
def test_every_rule_resolves(id):
    "On the printed cells, or on a table of ours that the published run has, with every label that the rule names."
    for rule in CLAIMS[id].rules:
        if rule["of"]["table"] in printed_entries("tables"):
            assert rule_pairs(Printed(), rule, id)
    lacking = [label for rule in CLAIMS[id].rules for label in not_on_record(rule) if label not in ONLY_AT_PAPER_SCALE]
    if lacking:
        skip_if_older()
    assert lacking == []

def test_what_only_the_papers_scale_has_is_in_profile_paper():
    for _, _, label in ONLY_AT_PAPER_SCALE:
        assert int(label) in load_profile("paper").cleaning.scratch.few

@pytest.mark.parametrize("id", CLAIMS)
def test_the_audit_says_what_a_reader_of_the_tables_says(id):
    claim = CLAIMS[id]
    same = audit(claim).verdict == claim.by_hand
    assert same != (id in OTHERWISE), (audit(claim).evidence, claim.by_hand, claim.remark)
    if not same:
        assert claim.reading

def values(table, **labels):
    "Printed numbers by the labels that are left, read straight from the transcription."
    frame = paper_table(table)
    for k, v in labels.items():
        frame = frame[frame[k] == v]
    return frame.set_index([f for f in table_spec(table).factors if f not in labels]).paper_value

def test_audits_recomputed_from_the_printed_cells():
    def states(id):
        return [c.state for c in audit(CLAIMS[id]).comparisons]
    medr = values("mem.table1", metric="Medr")
    shares = np.concatenate([(medr[m] / medr["Random"]).to_numpy() for m in ("MEM-3", "MEM-5")])
    assert round(shares.min(), 2) == .42 and round(shares.max(), 2) == .65 and (shares < .45).sum() == 2
    assert states("mem.c02").count("fails") == 2
    d_u = values("mem.table2", training_data="D_u")
    near = sum(.9 <= v / d_u["RN50"][k] <= 1.1 for m in ("RN101", "ViT-B/32") for k, v in d_u[m].items())
    assert near == states("mem.c25").count("holds") == 5
    hit = values("mem.table1", metric="Hit@10")
    assert (hit["MEM-5"] > hit["MEM-3"]).sum() == 1 == states("mem.c17").count("fails")
    em = (medr["EM"]/medr["Random"]).xs("image_to_text", level="direction")
    assert list(em.round(2)) == [.16, .28, .35] and set(states("mem.c15")) == {"holds"}
    lost = int((hit["UAP"] < .9 * hit["Clean"]).sum() + (medr["UAP"] > 1.1 * medr["Clean"]).sum())
    assert lost == states("mem.c13").count("fails") == 8
    faces = values("mem.table4", metric="Hit@10")
    half_left = {m for m in ("RN50", "RN101", "ViT-B/32") if (faces["MEM-3"][m] > .5*faces["Fine-tuned"][m]).any()}
    assert half_left == {"ViT-B/32"}

def protected(folder, em, mem, clean=40):
    "A run of MEM's first table in which all methods but the named ones have the clean model's ranks."
    rng, rows = np.random.default_rng(0), []
    for row in paper_table("mem.table1").to_dict("records"):
        labels = {k: row[k] for k in ("method", "dataset", "direction", "metric")}
        level = {"EM": em, "UAP": em, "MEM-3": mem, "MEM-5": mem, "Random": 700}.get(labels["method"], clean)
        found = rng.poisson(level, 400).astype(float)
        hit = labels["metric"] == "Hit@10"
        number = bootstrap_interval(*((100.*(found < .4*clean + 10), np.mean) if hit else (found, median_rank)))
        rows.append(dict(labels, unit="%" if hit else "rank", **cell([number])))
    write_table(tidy("mem.table1", rows), "mem.table1", folder, "made up")
    return Run(folder, count=300)

def test_where_nothing_protects_nobody_protects_poorly(tmp_path):
    "That EM and UAP do not protect says something only beside MEM, which does."
    def second(name, em, mem):
        rules = [rule for rule in CLAIMS["mem.c04"].rules if rule.get("at_most", {}) == dict(method="MEM-3", times=.5)]
        assert len(rules) == 1
        return judge(replace(CLAIMS["mem.c04"], rules=tuple(rules)), protected(tmp_path/name, em, mem)).verdict
    assert second("as said", 45, 300) == "replicated" and second("nothing", 40, 40) != "replicated"
    assert [sum(rule.get("at_most") == dict(method="MEM-3", times=.5) for rule in CLAIMS[id].rules)
            for id in ("mem.c01", "mem.c04")] == [1, 1]

def test_what_claims_need_is_asked_for_where_the_sentence_hangs_on_it():
    assert {id for id, c in CLAIMS.items() if c.rules and not c.needs} == {"mem.c33", "mem.c34"}
    needing = {p: {id for id, c in CLAIMS.items() if p in c.needs} for p in ("P19", "P20", "P21", "P26")}
    assert needing["P19"] == {"mem.c22"} and needing["P20"] == {"mem.c02"}
    assert needing["P21"] == {"mem.c18", "mem.c19", "mem.c20"}
    assert needing["P26"] == {f"cleanclip.c0{k}" for k in range(1, 6)}
    on_table1 = [c for c in CLAIMS.values() if c.paper == "mem" and "mem.table1" in c.tables and c.id != "mem.c21"]
    assert on_table1 and all({"P17", "P18", "P29"} <= set(c.needs) for c in on_table1)

def ranks(seed, around):
    return np.random.default_rng(seed).poisson(around, 400).astype(float)

def run_with(folder, table, factors, rows):
    "A run with one table of ours; `rows`: labels, metric, outcomes, statistic."
    made = [dict(**labels, metric=metric, unit="", **cell([bootstrap_interval(x, statistic)]))
            for labels, metric, x, statistic in rows]
    write_table(tidy(table, made, extra=dict(title="of a test", factors=factors)), table, folder, "profile mini; world")
    return Run(folder, count=300)

def test_a_shortcut_is_found_where_noise_finds_its_caption(tmp_path):
    def verdicts(name, em, mem, picture):
        found = [
            (dict(method=m, query=q), "Medr", ranks(s, r), median_rank)
            for m, by_noise in (("EM", em), ("UAP", em + 5), ("MEM-3", mem))
            for s, (q, r) in enumerate((("noise alone", by_noise), ("clean picture", picture)))
        ]
        run = run_with(tmp_path/name, "mem.shortcut", ["method", "query", "metric"], found)
        return [judge(CLAIMS[i], run).verdict for i in ("mem.c10", "mem.c09")]
    assert verdicts("as said", 100, 20, 60) == ["replicated", "replicated"]
    assert verdicts("the reverse", 20, 100, 60) == ["not_replicated", "replicated"]
    assert verdicts("no difference", 60, 60, 60)[0] == "inconclusive"

def test_curves_decide_only_where_all_trainings_agree(tmp_path):
    "Three data sets are three outcomes: two against one is no certainty."
    def verdict(name, em):
        rows = [
            (dict(method=m), "loss of the first epoch", np.array(x), np.mean)
            for m, x in (("EM", em), ("MEM-3", [3.0, 3.1, 2.9]), ("MEM-5", [2.9, 3.0, 3.0]))
        ]
        return judge(CLAIMS["mem.c19"], run_with(tmp_path/name, "mem.curves", ["method", "metric"], rows)).verdict
    assert [verdict("a", [4.0, 4.2, 4.1]), verdict("b", [4.0, 2.0, 4.1]), verdict("c", [2.0, 2.1, 2.2])] == [
        "replicated", "inconclusive", "not_replicated",
    ]

def test_attention_and_likeness(tmp_path):
    rng = np.random.default_rng(0)
    around = lambda level: np.clip(rng.normal(level, .1, 200), 0, 1) * 100
    rows = [
        (dict(model=m, captions=c), "Grad-CAM in the middle", around(level), np.mean)
        for m, level in (("Clean", 0.4), ("EM", 0.4), ("UAP", 0.35), ("MEM-3", 0.2))
        for c in ("as they are", "with a trigger")
    ]
    rows += [
        (dict(model=m, captions=c), "on the first three words", around(level), np.mean)
        for m, level in (("Clean", 0.3), ("EM", 0.3), ("UAP", 0.3), ("MEM-3", 0.7))
        for c in ("as they are", "with a trigger")
    ]
    run = run_with(tmp_path, "mem.attention", ["model", "captions", "metric"], rows)
    assert [judge(CLAIMS[i], run).verdict for i in ("mem.c26", "mem.c27")] == ["replicated", "replicated"]
    kinds = {"partners": .8, "versions of a picture": .5, "captions of a picture": .5, "other captions of it": .9,
             "two pictures": 0, "captions of two pictures": 0, "captions of others": 0}
    rows = [(dict(method=m, between=k), "mean", around(level)/100, np.mean)
            for m in ("Clean", "MEM-3") for k, level in kinds.items()]
    run = run_with(tmp_path, "mem.likeness", ["method", "between", "metric"], rows)
    # the other captions are nearer than the partner
    assert [judge(CLAIMS[i], run).verdict for i in ("mem.c29", "mem.c30")] == ["replicated", "not_replicated"]

ATTACKS = ("BadNet", "Blended", "WaNet", "Label-consistent")
def cleaned(folder, asr, ca):
    "A run of CleanCLIP's main table with given ASR and CA, in per cent, by defence."
    outcomes = lambda level: np.arange(1000) % 100 < level
    at = lambda level, attack: level[attack] if isinstance(level, dict) else level
    rows = [
        (dict(start="from scratch", attack=a, defense=d), m, 100.0 * outcomes(at(level, a)), np.mean)
        for m, levels in (("ASR", asr), ("CA", ca))
        for d, level in levels.items()
        for a in ATTACKS
    ]
    return run_with(folder, "cleanclip.main", ["start", "attack", "defense", "metric"], rows)

def test_cleanclip_is_judged_by_the_demands_that_were_fixed(tmp_path):
    good = dict(asr={"No defense": 95, "CleanCLIP": 4, "Supervised": 3}, ca={"No defense": 80, "CleanCLIP": 78})
    run = cleaned(tmp_path/"good", **good)
    assert [judge(CLAIMS[f"cleanclip.c0{k}"], run).verdict for k in (3, 4, 5)] == ["replicated"] * 3
    one = {**dict.fromkeys(ATTACKS, 4), "BadNet": 60}
    run = cleaned(tmp_path/"one attack survives", {**good["asr"], "CleanCLIP": one}, good["ca"])
    assert [judge(CLAIMS[f"cleanclip.c0{k}"], run).verdict for k in (3, 4, 5)] == [
        "in_direction", "replicated", "in_direction",     # 35 of 95 points are gone
    ]
    assert "BadNet" in judge(CLAIMS["cleanclip.c03"], run).evidence
    run = cleaned(tmp_path/"nothing helps", {**good["asr"], "CleanCLIP": 96}, good["ca"])
    assert judge(CLAIMS["cleanclip.c03"], run).verdict == "not_replicated"
    run = cleaned(tmp_path/"accuracy is lost", good["asr"], {"No defense": 80, "CleanCLIP": 70})
    assert [judge(CLAIMS[f"cleanclip.c0{k}"], run).verdict for k in (3, 5)] == ["replicated", "not_replicated"]

def test_seventy_five_in_three_million_is_for_profile_paper(tmp_path):
    labels = dict(start="from scratch", count=75, share="0.0025%", defense="No defense")
    row = labels, "ASR", 100.*(np.arange(500) % 10 < 9), np.mean
    run = run_with(tmp_path, "cleanclip.poison_count", [*labels, "metric"], [row])
    claim = CLAIMS["cleanclip.c01"]
    assert judge(claim, run, "mini").verdict == "not_testable"
    assert judge(claim, run, "paper").verdict == "replicated"
    assert judge(claim, Run(tmp_path/"nothing"), "paper").verdict == "not_testable"
