"""The files a run leaves behind: tables, figures, provenance and the page, checked as somebody without the package
would.
"""
import csv
import json
import os
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from types import SimpleNamespace

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import pytest

from mcl_repro.core.errors import SettingsError, StoreError, UserError
from mcl_repro.lab.lab import Lab
from mcl_repro.lab.nodes import stage
from mcl_repro.report import provenance
from mcl_repro.report.diagrams import Arrow, Box, diagram_table, draw_diagram
from mcl_repro.report.figures import save_figure, use_style
from mcl_repro.report.page import write_report
from mcl_repro.report.printed import paper_table, printed_entries, table_spec
from mcl_repro.report.provenance import write_provenance
from mcl_repro.report.tables import read_table, show_table, table_note, tidy, write_table

TABLES = sorted(printed_entries("tables"))
NOTE = table_note("mini", "embedded world, 10,000 pairs", "ResNet of width 16", "8 px patch")


def cells(table_id, share=1):
    "Made-up cells for a printed table: each value a little off, the first `share` of them."
    factors = table_spec(table_id).factors
    made = []
    for row in printed_entries("tables")[table_id]["rows"]:
        if row["value"] is not None:
            numbers = dict(value=row["value"]*.9, ci_low=row["value"]*.8, ci_high=row["value"])
            made.append({factor: row[factor] for factor in factors} | numbers)
    return made[:int(len(made)*share)]


class Page(HTMLParser):
    "Structure of a page: links, ids, headings, images, and whether every tag is closed."
    VOID = {"meta", "link", "img", "br", "hr", "input"}
    def __init__(self, text):
        super().__init__()
        self.links, self.ids, self.headings, self.images, self.open = [], [], [], [], []
        self.feed(text)
        self.close()
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if "id" in attrs:
            self.ids.append(attrs["id"])
        self.links += [attrs[a] for a in ("href", "src") if a in attrs]
        if re.fullmatch(r"h\d", tag):
            self.headings.append(int(tag[1]))
        if tag == "img":
            self.images.append(attrs)
    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@stage
def one(work, *, n):
    return {"n": n}

@stage
def two(work, *, parts):
    return {"n": sum(p.result["n"] for p in parts)}


@pytest.fixture
def run(tmp_path):
    "A run's folder with two tables and a figure."
    write_table(tidy("ubt.table1", cells("ubt.table1")), "ubt.table1", tmp_path, NOTE)
    write_table(tidy("mem.table1", cells("mem.table1", .5)), "mem.table1", tmp_path, NOTE)
    use_style()
    fig, ax = plt.subplots()
    ax.plot([0, 1], [1, 0])
    save_figure(fig, "ubt.fig4", tmp_path, pd.DataFrame({"x": [0, 1], "y": [1, 0]}))
    plt.close(fig)
    return tmp_path


@pytest.mark.parametrize("table_id", TABLES)
def test_every_printed_table_round_trips(table_id, tmp_path):
    "All cells of all tables: the CSV keeps the printed digits, and the page's grid has a place for each."
    path = write_table(tidy(table_id, cells(table_id, .7)), table_id, tmp_path, NOTE)
    entry = printed_entries("tables")[table_id]
    rows = list(csv.DictReader(path.open(encoding="utf-8")))
    assert len(rows) == len(entry["rows"])
    assert list(rows[0])[-7:] == ["metric", "value", "ci_low", "ci_high", "n_seeds", "paper_value", "unit"]
    printed = ["" if r["value"] is None else str(r["printed"]).rstrip("%") for r in entry["rows"]]
    assert sorted(r["paper_value"] for r in rows) == sorted(printed)
    grid = show_table(read_table(path)).grid
    assert sum(c is not None for row in grid["body"] for c in row["cells"]) == len(entry["rows"])
    assert {len(row["cells"]) for row in grid["body"]} == {len(grid["leaves"])}
    assert [sum(n for _, n in line) for line in grid["header"]] == [len(grid["leaves"])]*len(grid["header"])
    tex = path.with_suffix(".tex").read_text(encoding="utf-8")
    body = [l for l in tex.splitlines() if l.endswith(r" \\")]
    assert {l.replace(r"\&", "").count("&") for l in body} == {len(grid["names"]) + 2*len(grid["leaves"]) - 1}
    md = [l for l in path.with_suffix(".md").read_text(encoding="utf-8").splitlines() if l.startswith("|")]
    assert {l.replace(r"\|", "").count("|") for l in md} == {len(grid["names"]) + 2*len(grid["leaves"]) + 1}


def test_same_results_same_bytes_and_order_does_not_matter(tmp_path):
    rows = cells("ubt.table3")
    for folder, order in (("a", rows), ("b", rows[::-1])):
        write_table(tidy("ubt.table3", order), "ubt.table3", tmp_path/folder, NOTE)
    names = sorted(p.name for p in (tmp_path/"a/tables").iterdir())
    assert names == [f"ubt.table3.{s}" for s in ("csv", "json", "md", "tex")]
    assert all((tmp_path/"a/tables"/n).read_bytes() == (tmp_path/"b/tables"/n).read_bytes() for n in names)


def test_what_was_not_run_is_empty_and_never_the_papers_number(tmp_path):
    path = write_table(tidy("ubt.table1", cells("ubt.table1")[:1]), "ubt.table1", tmp_path, NOTE)
    rows = list(csv.DictReader(path.open(encoding="utf-8")))
    assert [r["value"] for r in rows[1:]] == [""]*19 and all(r["paper_value"] for r in rows)
    assert "not run" in show_table(read_table(path))._repr_html_()


@pytest.mark.parametrize("change, says", [
    ({"attack": "BadNets"}, "did you mean BadNet"),
    ({"metric": "acc"}, "unknown metric 'acc'"),
    ({"value": float("inf")}, "value is inf"),
    ({"value": 12, "unit": "fraction"}, r"leaves \[0, 1\]"),
    ({"unit": "rank"}, "the table has '%'"),
    ({"ci_low": 3}, "needs both ends"),
    ({"paper_value": 1}, "looked up"),
    ({"seed": 1}, "unknown column 'seed'"),
])
def test_a_row_that_would_mislead_is_refused(change, says):
    with pytest.raises(SettingsError, match=says):
        tidy("ubt.table1", [dict(attack="BadNet", defense="UBT", metric="CA", value=50.) | change])


def test_a_row_of_ours_is_marked_and_stands_in_its_group():
    row = dict(attack="SIG", defense="UBT, k = 0.01%", metric="CA", value=70.)
    with pytest.raises(SettingsError, match="extra=True"):
        tidy("ubt.table1", [row])
    df = tidy("ubt.table1", [row | {"extra": True}])
    at = df.index[df.defense == "UBT, k = 0.01%"].item()
    assert (df.attack[at - 1], df.attack[at + 1]) == ("SIG", "SSBA")
    assert pd.isna(df.paper_value[at]) and "extra" not in df


def test_numbers_of_two_units_are_never_subtracted():
    df = tidy("ubt.table8", [dict(defense="UBT", metric="total_time", value=12.5, unit="s")])
    cell = show_table(df).grid["body"][-1]["cells"][-1]
    assert (cell["ours"], cell["paper"], cell["difference"]) == ("12.5", "10228", "")


@pytest.mark.parametrize("value, shown", [
    (224_499_670., "2.24 × 10⁸"), (-4_786_186.2, "−4.79 × 10⁶"), (99_999.4, "99,999.40"), (1234.5, "1234.50"),
    (-.001, "0.00"),
])
def test_large_numbers_are_read_at_a_glance_in_every_output(value, shown, tmp_path):
    rows = [dict(models=m, metric="KL", value=v, unit="nats") for m, v in (("one", value), ("other", .5))]
    table = tidy("ubt.far", rows, dict(title="How far", factors=["models", "metric"]))
    path = write_table(table, "ubt.far", tmp_path, NOTE)
    assert f"| one | {shown} |" in path.with_suffix(".md").read_text(encoding="utf-8")
    assert shown in show_table(table)._repr_html_()
    assert f"{value:.10g}" in path.read_text(encoding="utf-8")         # the file for machines has all digits


def test_a_table_of_ours_says_so_in_its_heading():
    table = tidy("ubt.far", [dict(models="one", metric="KL", value=1., unit="nats")],
                 dict(title="How far models are apart", factors=["models", "metric"]))
    assert str(show_table(table)).startswith("### UBT (ours): How far models are apart\n")
    assert "UBT (ours): How far models are apart" in show_table(table)._repr_html_()


def test_labels_are_text_in_every_output(tmp_path):
    nasty = "a|b & <script>alert(1)</script> 50%_{x}"
    extra = dict(title="Odd & <b>labels</b>", factors=["defense", "metric"])
    df = tidy("ubt.odd", [dict(defense=nasty, metric="CA", value=1.)], extra)
    path = write_table(df, "ubt.odd", tmp_path, "Note with <i>tags</i>.")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<script>" not in page and "&lt;script&gt;" in page and "<i>tags" not in page
    tex = path.with_suffix(".tex").read_text()
    assert r"a|b \& <script>" in tex and r"50\%\_\{x\}" in tex
    assert r"a\|b" in path.with_suffix(".md").read_text()
    assert read_table(path).defense.item() == nasty


def test_page_is_one_file_that_loads_nothing(run):
    text = write_report(run).read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open and len(page.ids) == len(set(page.ids))
    assert not re.search(r"https?://|//[a-z]+\.[a-z]|@import|<script", text)
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.ids
        elif not link.startswith("data:"):
            assert (run/link).is_file() and not link.startswith(("/", ".."))
    assert page.headings[0] == 1 and page.headings.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(page.headings, page.headings[1:]))
    assert page.images and all(i.get("alt") for i in page.images)
    assert "prefers-color-scheme:dark" in text and 'name="viewport"' in text


def test_page_with_next_to_nothing_and_with_damage(run, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    assert "Nothing has been run yet" in write_report(empty).read_text()
    (run/"tables/ubt.table1.csv").write_bytes(b"\xff\xfe")
    (run/"tables/mem.table1.json").write_text("{")
    (run/"provenance.json").write_text("[")
    (run/"claims.csv").write_text("x\n1\n")
    (run/"figures/ubt.fig4.svg").unlink()
    (run/"notebooks").mkdir()
    (run/"notebooks/ubt.ipynb").write_text("{}")
    text = write_report(run).read_text(encoding="utf-8")
    for name in ("tables/ubt.table1.json", "tables/mem.table1.json", "claims.csv", "figures/ubt.fig4.json",
                 "notebooks/ubt.ipynb"):
        assert name in text


def test_claims_stand_beside_their_sentences(run):
    row = dict(id="ubt.c01", paper="ubt", audit="holds", verdict="not_replicated", margin="-3", evidence="ubt.table3")
    pd.DataFrame([row]).to_csv(run/"claims.csv", index=False)
    text = write_report(run).read_text(encoding="utf-8")
    assert "UBT has the lowest attack success rate" in text and "not replicated" in text
    assert "<b>1 of 1</b> claim can be tested" in text


def test_nothing_half_written_is_left(run, monkeypatch):
    "A full disk in the middle: the old file stays, no part of the new one is left, and the error is one line."
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StoreError, match="No space left on device"):
        write_table(tidy("ubt.table1", []), "ubt.table1", run, NOTE)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_figures_repeat_to_the_byte_and_are_well_formed(tmp_path):
    for folder in ("a", "b"):
        use_style()
        fig, ax = plt.subplots(figsize=(3, 2))
        ax.plot([0, 1], [0, 1], label="a")
        ax.legend()
        ax.set(title="t", xlabel="x")
        save_figure(fig, "mem.fig4", tmp_path/folder, pd.DataFrame({"x": [0, 1]}))
        plt.close(fig)
    a, b = ({p.name: p.read_bytes() for p in (tmp_path/f/"figures").iterdir()} for f in "ab")
    assert a == b and sorted(a) == [f"mem.fig4.{s}" for s in ("csv", "json", "png", "svg")]
    ET.fromstring(a["mem.fig4.svg"])
    assert a["mem.fig4.png"][:8] == b"\x89PNG\r\n\x1a\n"


def test_provenance_keeps_sections_and_names_no_machine(tmp_path, monkeypatch):
    import platform
    from mcl_repro.lab.store import Store
    home = tmp_path/"home"/"somebody"
    home.mkdir(parents=True)
    roles = {"train": str(home/"pairs.csv"), "zeroshot": "world:zeroshot_test"}
    lab = SimpleNamespace(name="mini", folder=tmp_path, store=Store(tmp_path/"store"), device="cpu", seeds=[0],
                          profile={"train": {"lr": .1}, "roles": roles},
                          role=lambda n: SimpleNamespace(source=roles[n], fingerprint="f"*64))
    write_provenance(lab, [], notebook="ubt")
    monkeypatch.setenv("MCL_REPRO_NOTEBOOK", "mem")
    path = write_provenance(lab, [])
    whole = json.loads(path.read_text(encoding="utf-8"))
    text = path.read_text(encoding="utf-8")
    assert list(whole["notebooks"]) == ["mem", "ubt"] and whole["profile"] == "mini"
    assert whole["notebooks"]["mem"]["data"]["train"] == {"source": "…/pairs.csv", "fingerprint": "f"*64}
    assert str(tmp_path) not in text and "somebody" not in text and f'"{platform.node()}"' not in text
    parts = {"settings", "seeds", "code", "packages", "hardware", "data", "stages", "device"}
    assert set(whole["notebooks"]["ubt"]) >= parts


def test_stages_come_from_the_records_of_a_real_lab(tmp_path, monkeypatch):
    lab = Lab("smoke", device="cpu", runs=tmp_path, progress=False)
    done = lab.run(lab.node(two, parts=[lab.node(one, n=n) for n in (1, 2)]))
    monkeypatch.setattr(provenance, "_roles", lambda lab: {})
    stages = json.loads(write_provenance(lab, [done]).read_text())["notebooks"]["interactive"]["stages"]
    assert len(stages) == 3
    assert all(s["seconds"] >= 0 and s["peak_memory_mb"] > 0 and s["device"] == "cpu" for s in stages)


def test_unknown_ids_are_refused_with_a_hint(tmp_path):
    with pytest.raises(SettingsError, match="did you mean ubt.table1"):
        paper_table("ubt.tabel1")
    with pytest.raises(SettingsError, match="needs a note"):
        write_table(tidy("ubt.table1", []), "ubt.table1", tmp_path, "")
    with pytest.raises(UserError, match="there is no run"):
        write_report(tmp_path/"no")


# ---- diagrams

BOXES = [
    Box("a", 0, 0, "one", "data"), Box("b", 1.5, 0, "two", "model"), Box("c", 3, 0, "three", "decision"),
    Box("d", 1.5, 1.5, "four", "attack"),
]
ARROWS = [Arrow("a", "b"), Arrow("b", "c", "yes"), Arrow("b", "d")]

def test_a_diagram_holds_its_boxes_arrows_and_groups_and_is_saved_twice_alike(tmp_path, recwarn):
    use_style()
    fig = draw_diagram(BOXES, ARROWS, {"First": ["a", "b"]})
    said = [t.get_text() for t in fig.axes[0].texts]
    assert sorted(said) == sorted(["First", "one", "two", "three", "four", "yes"])
    assert sum(type(p).__name__ == "FancyArrowPatch" for p in fig.axes[0].patches) == 3
    table = diagram_table(BOXES, ARROWS)
    files = [save_figure(fig, "ubt.fig1", tmp_path/n, table) for n in "ab"]
    plt.close(fig)
    assert files[0].read_bytes() == files[1].read_bytes() and not recwarn.list
    assert list(pd.read_csv(files[0].with_suffix(".csv")).part) == ["box"]*4 + ["arrow"]*3


@pytest.mark.parametrize("change, says", [
    (dict(boxes=[*BOXES, BOXES[0]]), "'a' is given twice"),
    (dict(arrows=[Arrow("a", "e")]), "arrow 'a' to 'e': unknown box 'e'"),
    (dict(groups={"G": ["z"]}), "group 'G': unknown box"),
    (dict(boxes=[*BOXES, Box("e", .3, .2, "")]), "'a' and 'e' overlap"),
    (dict(boxes=[*BOXES, Box("e", 0, 3, "much too long for such a box")]), "text of box 'e'"),
    (dict(arrows=[Arrow("a", "c")]), "runs through the box 'b'"),
    (dict(arrows=[Arrow("b", "c", "a label that is far too long")]), "lies on the box"),
    (dict(boxes=[Box("e", 0, 0, "", "blob")], arrows=[]), "unknown kind 'blob'"),
    (dict(boxes=[], arrows=[]), "no boxes"),
])
def test_a_diagram_that_could_not_be_read_is_refused(change, says):
    with pytest.raises(SettingsError, match=re.escape(says)) as e:
        draw_diagram(**{"boxes": BOXES, "arrows": ARROWS} | change)
    assert "\n" not in str(e.value)
    plt.close("all")


def test_an_arc_goes_around_a_box_that_a_straight_arrow_hits():
    plt.close(draw_diagram(BOXES, [Arrow("a", "c", bend=-.45)]))


def test_a_table_of_ours_with_published_points_reads_back_as_it_was(tmp_path):
    "A factor of whole numbers and fractions is a column of floats; the point published at 1 must be found again."
    known = ((.5, "ASR", 7.5), (1, "ASR", 7.2), (1, "CA", 18.1))
    published = [dict(weight=w, metric=m, value=v, printed=f"{v:g}", unit="%") for w, m, v in known]
    extra = dict(title="A sweep", factors=["weight", "metric"], unknown="not known", published=published)
    def made(weight, metric, value, **more):
        return dict(weight=weight, metric=metric, value=value, ci_low=value - 1, ci_high=value + 1, n_seeds=1, **more)
    rows = [made(w, m, v) for w in (.5, 1) for m, v in (("CA", 70.), ("ASR", 5.))]
    table = tidy("cleanclip.sweep", [*rows, made(2, "CA", 69., extra=True)], extra)
    path = write_table(table, "cleanclip.sweep", tmp_path, "a note")
    back = read_table(path)
    assert back.weight.tolist() == ["0.5", "0.5", "1", "1", "2"]
    assert sorted(back.paper_value.dropna()) == [7.2, 7.5, 18.1]
    assert str(show_table(back, "a note")) == str(show_table(table, "a note"))
    grid = show_table(back).grid
    assert (grid["measured"], grid["own"], grid["printed"]) == (0, 5, 0)        # no paper printed this table
    for line in (
        "| 0.5 | not known | 70.0 [69.0, 71.0] | 7.5 | 5.0 [4.0, 6.0] |",
        "| 1 | 18.1 | 70.0 [69.0, 71.0] | 7.2 | 5.0 [4.0, 6.0] |",
    ):
        assert line in str(show_table(back, "a note"))
