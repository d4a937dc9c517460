"The published tables, and what rules ask of those that no paper prints."
import csv
from pathlib import Path

import pytest

from mcl_repro.report.page import VERDICTS
from mcl_repro.report.printed import label_text, printed_entries
from mcl_repro.report.rules import RELATIONS
from mcl_repro.report.tables import read_table

RESULTS = Path(__file__).resolve().parents[1]/"nbs/results"
TABLES = RESULTS/"tables"

def skip_if_older():
    "Skips a test that compares published results with the code while they were judged in other words than these."
    with (RESULTS/"claims.csv").open(encoding="utf-8") as file:
        words = {row["verdict"] for row in csv.DictReader(file)}
    if odd := sorted(words - set(VERDICTS)):
        pytest.skip(f"the published results are older than the code: they say {', '.join(odd)}")


def labels_on_record(table):
    "Factor -> labels of a published table."
    frame = read_table(TABLES/f"{table}.csv")
    return {factor: set(map(label_text, frame[factor])) for factor in frame.attrs["table"]["factors"]}


def labels_of(wanted):
    "The labels that a selection names for a factor."
    named = wanted["not"] if isinstance(wanted, dict) else wanted
    return [label_text(label) for label in (named if isinstance(named, list) else [named])]


def not_on_record(rule):
    "Factors and labels that a rule names and the published table of ours does not have, as (table, factor, label)."
    found = []
    for name in ("of", "minus", "over", *RELATIONS):
        part = rule.get(name)
        if not isinstance(part, dict):
            continue
        table = part.get("table", rule["of"]["table"])
        if table in printed_entries("tables"):
            continue
        known = labels_on_record(table)
        for factor, wanted in part.items():
            if factor not in ("table", "times", "plus"):
                found += [(table, factor, label) for label in labels_of(wanted) if label not in known.get(factor, ())]
    return found
