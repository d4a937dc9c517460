"The claims ledger: rules, audit of the printed cells, verdicts on a run, and what is refused."
import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mcl_repro.cli import main as cli
from mcl_repro.core.errors import SettingsError, StoreError
from mcl_repro.measures.metrics import bootstrap_interval, median_rank, paired_bootstrap, resamples
from mcl_repro.papers.stages import cell
from mcl_repro.report import claims as claims_module
from mcl_repro.report.claims import (
    _intervals, _outcome, _softened, audit, Comparison, judge, judge_claims, read_judged, show_claims,
    show_inconsistencies,
)
from mcl_repro.report.preconditions import read_preconditions
from mcl_repro.report.printed import inconsistencies, paper_table, printed_entries
from mcl_repro.report.rules import (
    _check_rule, MissingRows, Printed, read_claims, relation_of, rule_pairs, rule_text, Run,
)
from mcl_repro.report.tables import read_items, tidy, write_table

ITEMS = 400


def outcomes(rate, seed, shared=None):
    "Hits of one model; `shared` makes two models right on the same items."
    draw = np.random.default_rng(seed).random(ITEMS) if shared is None else shared
    return (draw < rate).astype(float)


def write(folder, rates, table="ubt.table3", seeds=1, shared=None, **fixed):
    "A table with the given rates by (attack, defence), as a run writes it."
    rows = []
    for k, ((attack, defense), rate) in enumerate(rates.items()):
        estimates = [bootstrap_interval(outcomes(rate + .01*s, 100*k + s, shared)) for s in range(seeds)]
        rows.append(
            dict(attack=attack, defense=defense, metric="ASR", unit="%", **fixed, **cell(estimates, 100, (0, 1)))
        )
    write_table(tidy(table, rows), table, folder, "made up")
    return Path(folder)


RATES = {
    (a, d): r
    for a in ("BadNet", "Blended", "SIG", "SSBA")
    for d, r in (("No defense", 0.9), ("CleanCLIP", 0.4), ("RoCLIP", 0.6), ("UBT", 0.05))
}
LOWEST = dict(of=dict(table="ubt.table3", metric="ASR", defense="UBT"), below=dict(defense=["CleanCLIP", "RoCLIP"]))


def with_rules(*rules, **more):
    return replace(read_claims()["ubt.c01"], rules=rules, untestable="", **more)


# ---- the ledger as a whole

def test_every_claim_has_rules_or_a_reason_and_every_rule_reads_as_a_sentence():
    claims = read_claims()
    assert len(claims) == 179
    assert [c.id for c in claims.values() if bool(c.rules) == bool(c.untestable)] == []
    for c in claims.values():
        for rule in c.rules:
            assert re.fullmatch(r"[A-Z].* (is|lies) .*\.", rule_text(rule)), (c.id, rule_text(rule))


def test_every_rule_resolves_on_the_printed_cells_or_names_a_table_of_our_own():
    printed = Printed()
    for c in read_claims().values():
        for rule in c.rules:
            pairs = rule_pairs(printed, rule, c.id)
            assert pairs or rule["of"]["table"] not in printed_entries("tables"), c.id


def numbers_of(rule):
    "The numbers that a rule compares with."
    bound = rule[relation_of(rule)]
    if isinstance(bound, dict):
        return [bound.get("times", 1), bound.get("plus", 0)]
    return bound if isinstance(bound, list) else [bound]


def test_no_rule_has_a_number_without_the_sentence_the_glossary_or_a_reading():
    "A threshold that is no number of the glossary must stand in the statement, the remark or the reading."
    known = {"0", "1", "2", "5", "95", "0.5", "99.5", "0.1", "0.9", "1.1", "90", "97.5", "50", "10"}
    odd = []
    for c in read_claims().values():
        text = " ".join((c.statement, c.remark, c.reading))
        for rule in c.rules:
            for n in map(abs, numbers_of(rule)):
                said = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)]
                if f"{n:g}" not in known and not any(abs(n - number) <= max(1., .11*n) for number in said):
                    odd.append((c.id, n))
    assert odd == []


# ---- audit: against plain arithmetic on the printed numbers

def printed(table, **where):
    frame = paper_table(table)
    for k, v in where.items():
        frame = frame[frame[k].astype(str) == str(v)]
    return frame.paper_value.to_numpy()


def test_an_audit_agrees_with_plain_arithmetic():
    margins = [c.margin for c in audit(with_rules(LOWEST)).comparisons]
    ubt = printed("ubt.table3", metric="ASR", defense="UBT")
    plain = np.c_[
        printed("ubt.table3", metric="ASR", defense="CleanCLIP") - ubt,
        printed("ubt.table3", metric="ASR", defense="RoCLIP") - ubt,
    ].ravel()
    assert np.allclose(margins, plain)
    mean = dict(
        of=dict(table="ubt.table3", metric="ASR", defense="CleanCLIP"), minus=dict(defense="UBT"), mean_over="attack",
        at_least=0,
    )
    assert audit(with_rules(mean)).decisive.left == pytest.approx(
        (printed("ubt.table3", metric="ASR", defense="CleanCLIP") - ubt).mean()
    )
    share = dict(
        of=dict(table="ubt.table8", metric="total_time", defense="UBT"), over=dict(defense="CleanCLIP"), at_most=0.72
    )
    assert audit(with_rules(share)).decisive.left == pytest.approx(10228/14226)


def test_a_trend_is_the_slope_over_the_cases_in_the_papers_order():
    rule = dict(of=dict(table="cfbd.table5", q=50, attack="SIG"), slope_over="fault_ratio", below=0)
    made, values = audit(with_rules(rule)), printed("cfbd.table5", q=50, attack="SIG")
    assert made.verdict == "holds" and made.decisive.left == pytest.approx(np.polyfit(range(len(values)), values, 1)[0])


def test_partly_and_fails():
    rule = dict(of=dict(table="ubt.table1", metric="ASR", defense="UBT"), at_most=1)
    assert audit(with_rules(rule)).verdict == "partly"
    assert audit(with_rules(rule | dict(how_many=4))).verdict == "holds"
    assert audit(with_rules(dict(of=dict(table="ubt.table1", metric="CA"), below=10))).verdict == "fails"


def test_a_rule_on_a_table_of_our_own_takes_no_part_in_the_audit():
    rule = dict(of=dict(table="ubt.ours", metric="CA"), below=10)
    assert audit(with_rules(rule)).verdict == "not_checkable" and audit(with_rules(LOWEST, rule)).verdict == "holds"


# ---- verdicts: intervals, pairing, multiplicity, seeds

def test_a_verdict_needs_certainty(tmp_path):
    run = Run(write(tmp_path, RATES))
    assert judge(with_rules(LOWEST), run).verdict == "replicated"
    # .05 against .06: the bound is open, that it is far below RoCLIP's is not
    assert judge(with_rules(dict(LOWEST, below=dict(defense="RoCLIP", times=.1))), run).verdict == "in_direction"
    # 5% is no less than 1%, and far less than the 90% without a defence
    assert judge(with_rules(dict(LOWEST, below=1)), run).verdict == "in_direction"
    assert judge(with_rules(LOWEST, dict(LOWEST, below=1)), run).verdict == "in_direction"


@pytest.mark.parametrize("state, low, high, expected", [
    ("open", 20., 40., "holds"),     # may well be what the rule asks, and is certainly something: print has much more
    ("open", -5., 10., "fails"),     # the bound is no effect at all, and there is next to none
    ("fails", 20., 40., "fails"),    # less than the rule asks, and less than a third of what print has
    ("fails", 20., 140., "holds"),
])
def test_next_to_no_effect_is_not_said_of_one_that_the_rule_may_be_content_with(state, low, high, expected):
    ours = Comparison("ViT", 58, "52", 6, state, "rank", -3, 16, effect=30, effect_low=low, effect_high=high)
    printed = Comparison("ViT", 343, "18", 325, "holds", "rank", effect=334)
    assert _softened(ours, printed) == expected


@pytest.mark.parametrize("rate, verdict", [
    (.05, "replicated"), (.40, "in_direction"), (.75, "not_replicated"), (.60, "in_direction"),
])
def test_a_small_effect_is_told_from_none(tmp_path, rate, verdict):
    "Print has UBT at nearly nothing of some 90%: an effect below a third of that, some 30 points, is none."
    rates = {(a, d): rate if d == "UBT" else r for (a, d), r in RATES.items()}
    rule = dict(of=dict(table="ubt.table3", metric="ASR", defense="UBT", attack="BadNet"),
                at_most=dict(defense="No defense", times=.1))
    assert judge(with_rules(rule), Run(write(tmp_path, rates))).verdict == verdict


def test_a_bound_without_a_reference_is_judged_by_its_margin(tmp_path):
    rule = dict(of=dict(table="ubt.table3", metric="ASR", defense="No defense", attack="BadNet"), at_most=95)
    printed = audit(with_rules(rule)).decisive
    assert printed.margin == pytest.approx(95 - 81.12, abs=20) and printed.state == "holds"
    near, far = (write(tmp_path/str(r), {("BadNet", "No defense"): r}) for r in (.99, .2))
    assert judge(with_rules(rule), Run(near)).verdict == "inconclusive"
    assert judge(with_rules(dict(rule, at_most=95)), Run(far)).verdict == "replicated"


def test_what_print_itself_fails_is_not_asked_of_ours(tmp_path):
    run = Run(write(tmp_path, RATES))
    wrong = dict(LOWEST, below=dict(defense="UBT", times=.5))
    assert audit(with_rules(wrong)).verdict == "fails"
    made = judge(with_rules(wrong), run)
    assert made.verdict == "paper_disagrees" and "do not carry" in made.evidence


def test_a_claim_whose_preconditions_are_unmet_is_not_testable(tmp_path):
    run, needy = Run(write(tmp_path, RATES)), with_rules(LOWEST, needs=("P1", "P2"))
    met = {("ubt", "P1"): True, ("ubt", "P2"): True}
    assert judge(needy, run, met=met).verdict == "replicated"
    for state, word in ((False, "not met: P2"), (None, "not measured: P2")):
        made = judge(needy, run, met=met | {("ubt", "P2"): state})
        assert made.verdict == "not_testable" and word in made.evidence and "P1" not in made.evidence
    assert judge(needy, run, met={}).verdict == "not_testable"


class Replica(Printed):
    "The printed cells as if they were ours: each with draws around it."
    def factors(self, table):
        if table == "ubt.readings":
            raise MissingRows("print has one reading")
        return super().factors(table)

    def numbers(self, table, labels):
        value, = super().numbers(table, labels)
        seed = int.from_bytes(json.dumps([table, labels]).encode()[-8:], "big") % 2**32
        draws = np.random.default_rng(seed).normal(0, max(.02*abs(value[0]), 1e-3), 400)
        return [np.r_[value, value + draws]]


@pytest.mark.parametrize("paper", ["ubt", "mem", "cleanclip", "cfbd"])
def test_the_printed_cells_themselves_are_never_called_not_replicated(paper):
    "Whoever repeated the papers' numbers to the digit would not be told that they are wrong."
    replica, made = Replica(), {}
    for claim in read_claims().values():
        printed = tuple(rule for rule in claim.rules if rule_pairs(replica, rule, claim.id))
        if claim.paper == paper and printed and not claim.untestable:
            made[claim.id] = judge(replace(claim, rules=printed), replica, "paper").verdict
    assert made or paper == "cleanclip"
    assert {id: verdict for id, verdict in made.items() if verdict in ("not_replicated", "contradicted")} == {}


def test_the_interval_of_a_difference_is_the_paired_one(tmp_path):
    shared = np.random.default_rng(5).random(ITEMS)
    run = Run(write(tmp_path, {("BadNet", "CleanCLIP"): .42, ("BadNet", "UBT"): .40}, shared=shared))
    rule = dict(
        of=dict(table="ubt.table3", metric="ASR", defense="UBT", attack="BadNet"), below=dict(defense="CleanCLIP")
    )
    made = judge(with_rules(rule), run).decisive
    direct = paired_bootstrap(outcomes(.42, 0, shared), outcomes(.40, 0, shared))
    assert (made.ci_low, made.ci_high) == pytest.approx((100*direct.ci_low, 100*direct.ci_high), abs=.3)
    assert made.ci_high - made.ci_low < 5       # apart, each interval alone is ten points long


def test_one_failure_among_many_must_be_certain_for_all_at_once():
    rng, alone, together = np.random.default_rng(0), 0, 0
    # twenty comparisons that are exactly on the line: at 95% each, one of them fails by chance in four trials of ten
    for trial in range(200):
        value = rng.normal(size=(20, 1, 1))
        margins = np.concatenate([value, value + rng.normal(size=(20, 1, 800))], 2)
        each, all_at_once = _intervals(margins)
        alone += (each[:, 1] < 0).any()
        together += (all_at_once[:, 1] < 0).any()
    assert alone/200 > .3 and together/200 < .06


@pytest.fixture
def all_met(monkeypatch):
    "As if a run met every precondition."
    known = {(paper, id): True for id, p in read_preconditions().items() for paper in p.papers}
    monkeypatch.setattr(claims_module, "read_met", lambda folder: known)


def test_several_seeds_give_an_interval_over_trainings_and_items(tmp_path, all_met):
    run = Run(write(tmp_path, RATES, seeds=3))
    made = judge(with_rules(LOWEST), run)
    assert made.n_seeds == 3 and made.verdict == "replicated"
    c = next(c for c in made.comparisons if c.text == "BadNet, CleanCLIP")
    def values(defense):
        return np.stack(run.numbers("ubt.table3", dict(attack="BadNet", defense=defense, metric="ASR")))
    margins = values("CleanCLIP") - values("UBT")      # [seeds, 1 + draws]
    mean, half = margins[:, 0].mean(), 4.302653*margins[:, 0].std(ddof=1)/3**.5
    low, high = np.quantile(margins.mean(0)[1:], (.025, .975))
    expected = mean, mean - np.hypot(half, mean - low), mean + np.hypot(half, high - mean)
    assert (c.margin, c.ci_low, c.ci_high) == pytest.approx(expected, rel=1e-4) and high - low > 0
    assert "trainings (3 seeds) and test items" in set(pd.DataFrame(judge_claims("ubt", tmp_path)).intervals)


def test_how_many():
    def states(text):
        return [Comparison("", 0, "", 0, s, "%") for s in text.split()]
    assert _outcome(dict(how_many="most"), states("holds holds open fails")) == "open"
    assert _outcome(dict(how_many=dict(at_least=2, at_most=3)), states("holds holds open fails")) == "holds"
    assert _outcome(dict(how_many=2), states("holds holds fails")) == "holds"
    assert _outcome(dict(how_many=0), states("holds open")) == "fails"


def test_median_ranks_of_grouped_items_are_judged(tmp_path):
    groups, rng = np.repeat(np.arange(100), 5), np.random.default_rng(1)
    labels = dict(dataset="Flickr8K", direction="text_to_image", metric="Medr")
    rows = []
    for method, scale in (("Clean", 20), ("MEM-3", 80)):
        ranks = np.floor(rng.exponential(scale, 500))
        numbers = cell([bootstrap_interval(ranks, median_rank, groups=groups)], bounds=(1, np.inf))
        rows.append(labels | dict(method=method, unit="rank") | numbers)
    write_table(tidy("mem.table1", rows), "mem.table1", tmp_path, "made up")
    rule = dict(of=dict(table="mem.table1", method="MEM-3", **labels), above=dict(method="Clean", times=2))
    assert judge(with_rules(rule), Run(tmp_path)).verdict == "replicated"
    kept = [items for seeds in read_items(tmp_path/"tables/mem.table1.npz").values() for items in seeds]
    assert [items.statistic for items in kept] == ["median_rank"]*2
    assert all(np.array_equal(items.groups, groups) for items in kept)


def test_levels_and_profiles(tmp_path):
    run = Run(write(tmp_path, RATES))
    level = dict(LOWEST, below=1, levels=True)
    assert judge(with_rules(level), run, "mini").verdict == "not_testable"
    assert judge(with_rules(level), run, "paper").verdict == "in_direction"
    assert judge(with_rules(level, LOWEST), run, "mini").verdict == "replicated"
    none = with_rules(dict(of=LOWEST["of"] | dict(defense="RoCLIP"), at_most=dict(defense="UBT", plus=70)))
    worse = Run(write(tmp_path/"worse", {k: .95 if k[1] == "RoCLIP" else r for k, r in RATES.items()}))
    verdicts = [judge(none, worse, profile).verdict for profile in ("mini", "paper")]
    assert verdicts in (["not_replicated", "contradicted"], ["paper_disagrees"]*2)
    smoke = judge(with_rules(LOWEST), run, "smoke")
    assert smoke.verdict == "not_testable" and "too small" in smoke.evidence


# ---- what is missing or was changed

def test_missing_rows_say_what_to_run(tmp_path):
    run = Run(write(tmp_path, {k: v for k, v in RATES.items() if k != ("SIG", "RoCLIP")}))
    made = judge(with_rules(LOWEST), run)
    says = "Not run: ubt.table3 (SIG, RoCLIP, ASR) was not measured; run: mcl_repro run ubt --force"
    assert (made.verdict, made.evidence) == ("not_testable", says)
    other = judge(with_rules(dict(of=dict(table="ubt.table1", metric="CA"), above=0)), run)
    assert "ubt.table1 was not made; run: mcl_repro run ubt" in other.evidence


@pytest.mark.parametrize("name", ["ubt.table3.csv", "ubt.table3.npz"])
def test_an_edited_table_is_caught(tmp_path, name, all_met):
    path = write(tmp_path, RATES)/"tables"/name
    data = bytearray(path.read_bytes())
    data[len(data)//2] ^= 1
    path.write_bytes(bytes(data))
    says = f"tables/{name} is not as it was written; make it again with: mcl_repro run ubt --force"
    with pytest.raises(StoreError, match=re.escape(says)):
        judge_claims("ubt", tmp_path)


def test_a_number_that_its_outcomes_do_not_give_is_caught(tmp_path):
    "Even when the checksums were made to fit."
    import hashlib
    path = write(tmp_path, RATES)/"tables/ubt.table3.csv"
    side = path.with_suffix(".json")
    about = json.loads(side.read_text())
    lines = path.read_text().splitlines()
    at = next(i for i, l in enumerate(lines) if l.startswith("BadNet,UBT,ASR"))
    lines[at] = re.sub(r"ASR,[\d.]+", "ASR,0", lines[at], count=1)
    path.write_text("\n".join(lines) + "\n")
    about["files"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    side.write_text(json.dumps(about))
    with pytest.raises(StoreError, match="but its outcomes give"):
        judge(with_rules(LOWEST), Run(tmp_path))


@pytest.mark.parametrize("rule, says", [
    (dict(LOWEST, above=1), "exactly one of"),
    (dict(of=LOWEST["of"]), "found none"),
    (dict(LOWEST, belwo=1), "did you mean below"),
    (dict(LOWEST, below="CleanCLIP"), "wants a number or a selection"),
    (dict(of=dict(LOWEST["of"], defence="UBT"), below=1), "factor of ubt.table3 'defence'"),
    (dict(of=dict(LOWEST["of"], defense="UTB"), below=1), "has no cell"),
])
def test_a_rule_with_a_typo_is_refused(rule, says):
    with pytest.raises(SettingsError, match=re.escape(says)):
        _check_rule("ubt.c01", rule)
        rule_pairs(Printed(), rule, "ubt.c01")


# ---- what a run leaves behind

def test_files_of_a_run(tmp_path):
    write(tmp_path, RATES)
    view = show_claims("ubt", tmp_path)
    rows = list(csv.DictReader(open(tmp_path/"claims.csv", encoding="utf-8")))
    assert list(rows[0])[:6] == ["id", "paper", "needs", "audit", "verdict", "margin"] and "evidence" in rows[0]
    assert len(rows) == len(view.rows) == 71
    first = {p.name: p.read_bytes() for p in (tmp_path/"claims").iterdir()}
    judge_claims("ubt", tmp_path)
    assert {p.name: p.read_bytes() for p in (tmp_path/"claims").iterdir()} == first
    judge_claims("cleanclip", tmp_path)
    assert len(read_judged(tmp_path)) == 76
    page = first["ubt.c01.html"].decode()
    assert str(tmp_path) not in page and not re.search(r'(src|href)="https?:', page) and page.count("<svg") == 12
    (tmp_path/"claims/ubt.csv").write_text("x")
    with pytest.raises(StoreError, match="claims/ubt.csv is not as it was written"):
        read_judged(tmp_path)


def test_the_command(tmp_path, capsys):
    write(tmp_path/"mini", RATES)
    judge_claims("ubt", tmp_path/"mini")
    assert cli.main(["claims", "--paper", "ubt", "--runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("71 claims: ") and "ubt.c01" in out
    assert cli.main(["claims", "--verdict", "not_testable", "--runs", str(tmp_path)]) == 0
    assert all("not testable" in line or "not_testable" in line for line in capsys.readouterr().out.splitlines()[1:])
    assert cli.main(["claims", "ubt.c01", "--runs", str(tmp_path)]) == 0
    assert "rule: " in (out := capsys.readouterr().out) and "page: " in out
    assert cli.main(["claims", "--verdict", "proved", "--runs", str(tmp_path)]) == 2
    assert "unknown verdict 'proved'" in capsys.readouterr().err


# ---- items

def test_items_survive_the_file_and_the_unit(tmp_path):
    hits = outcomes(.3, 0)
    estimate = bootstrap_interval(hits)
    labels = dict(attack="BadNet", defense="UBT", metric="ASR", unit="fraction")
    row = labels | estimate._asdict() | dict(items=[estimate.items])
    write_table(tidy("ubt.table3", [row]), "ubt.table3", tmp_path, "made up")
    kept = read_items(tmp_path/"tables/ubt.table3.npz")["BadNet", "UBT", "ASR"][0]
    assert np.array_equal(kept.outcomes, hits) and resamples(kept)[0] == pytest.approx(100*hits.mean())


# ---- where the papers disagree with themselves

def test_inconsistencies_stand_under_the_tables_they_name():
    shown = {e["id"] for t in printed_entries("tables") for e in inconsistencies(t)}
    naming = {
        e["id"]
        for e in printed_entries("inconsistencies").values()
        if re.search(r"Tables? ([IVX]+|\d+)\b", f"{e['where']} {e['what']} {e['detail']}")
    }
    assert shown == naming and len(naming) > 40
    counts = [len(show_inconsistencies(p)) for p in ("ubt", "mem", "cleanclip", "cfbd")]
    assert sum(counts) == len(printed_entries("inconsistencies")) == 59
