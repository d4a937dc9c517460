"The report page while a run is going: what is there, what is still to come and when; and without a run it is over."
import re
from html.parser import HTMLParser

import pytest

from mcl_repro.report.page import write_report
from mcl_repro.report.printed import headline_tables
from mcl_repro.report.tables import tidy, write_table


class Structure(HTMLParser):
    "Ids, links into the page, meta elements, and the texts of headings, in order."
    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.meta, self.headings, self.scripts, self._open = [], [], [], [], 0, False
        self.feed(text)
        self.close()
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs["href"][1:]] if attrs.get("href", "").startswith("#") else []
        self.meta += [attrs] if tag == "meta" else []
        self.scripts += tag == "script"
        if re.fullmatch("h[1-6]", tag):
            self.headings.append("")
            self._open = True
    def handle_endtag(self, tag):
        self._open = self._open and not re.fullmatch("h[1-6]", tag)
    def handle_data(self, data):
        if self._open:
            self.headings[-1] += data


def printed(folder, *ids):
    "A table of each id, with a cell or none."
    for id in ids:
        rows = [dict(attack="BadNet", defense="UBT", metric="CA", value=70.)] if id == "ubt.table1" else []
        write_table(tidy(id, rows), id, folder, "Made-up numbers.")


def own(folder, id, title):
    table = tidy(id, [dict(attack="BadNet", metric="CA", value=70.)], dict(title=title, factors=["attack", "metric"]))
    write_table(table, id, folder, "Made-up numbers.")


def output(id, state="waiting", left=None):
    return dict(id=id, state=state, left=left)


PROGRESS = dict(
    left=1860., done=412, stages=905, running=["ubt.ubt_unlearn: step 30 of 200"],
    failed=["mem.attention: <loss> is nan"], updated="2026-01-01T10:20:00+00:00",
    outputs=[output("ubt.table1", "done", 0.), output("mem.table1", "running", 130.),
             output("cleanclip.main", left=500.), output("ubt.table3", left=720.), output("ubt.fig5", left=5400.),
             output("ubt.closeness"), output("mem.table2", "failed")],
)


@pytest.fixture
def folder(tmp_path):
    "A run that has two tables of UBT."
    printed(tmp_path/"mini", "ubt.table1", "ubt.table2")
    return tmp_path/"mini"


def page(folder, progress=None):
    text = write_report(folder, progress).read_text("utf-8")
    return text, Structure(text)


def section(text, id):
    "The part of a page that a heading names."
    start = text.index(f'aria-labelledby="{id}"')
    return text[start:text.index("</section>", start)]


def test_a_run_that_goes_is_told_in_one_line_and_loads_itself_anew(folder):
    text, found = page(folder, PROGRESS)
    assert "so far: 412 of 905 stages, about 31 min left" in text
    assert [meta["content"] for meta in found.meta if meta.get("http-equiv") == "refresh"] == ["30"]
    assert found.scripts == 0 and '<progress max="905" value="412"' in text
    assert "ubt.ubt_unlearn: step 30 of 200" in text and "2026-01-01 10:20:00 UTC" in text
    assert "mem.attention: &lt;loss&gt; is nan" in text and "<loss>" not in text


def test_without_progress_it_is_the_page_of_a_run_that_is_over(folder):
    text, found = page(folder)
    assert not any("http-equiv" in meta for meta in found.meta)
    assert not any(words in text for words in ("so far:", "till to come", "Comes here", "earlier run", "<progress"))
    assert "Printed tables not run yet: III" in section(text, "ubt")


def test_headline_tables_stand_on_top_once_and_in_the_papers_order(folder):
    own(folder, "cleanclip.main", "Two repairs")
    printed(folder, "cfbd.table4", "cfbd.table1")
    _, found = page(folder)
    tables = [id for id in found.ids if "." in id]
    assert tables == ["ubt.table1", "cleanclip.main", "cfbd.table1", "cfbd.table4", "ubt.table2"]
    assert found.ids.index("headline") < found.ids.index("ubt.table1") < found.ids.index("ubt")
    assert [id for id in tables if id in headline_tables()] == tables[:4]


def test_what_waits_stands_where_it_will_come(folder):
    text, found = page(folder, PROGRESS)
    assert [id for id in found.ids if "." in id] == [
        "ubt.table1", "mem.table1", "cleanclip.main", "ubt.table2", "ubt.table3", "mem.table2",
    ]
    top = section(text, "headline")
    assert "MEM Table 1" in top and "Comes here: at work, in about 2 min." in top
    assert "CleanCLIP main table (ours)" in top and "Comes here: in about 8 min." in top
    assert "Comes here: in about 12 min." in section(text, "ubt.table3")


def test_each_paper_lists_what_is_still_to_come(folder):
    text, _ = page(folder, PROGRESS)
    lists = [re.sub("<[^>]*>", " ", section(text, paper)) for paper in ("ubt", "mem", "cleanclip")]
    said = [" ".join(part[part.index("Still to come"):].split()) for part in lists]
    assert said[0].startswith("Still to come UBT Table III in about 12 min UBT Figure 5 in about 1 h 30 min "
                              "UBT Closeness (ours) later ")
    assert said[1].startswith("Still to come MEM Table 1 at work, in about 2 min MEM Table 2 failed")
    assert said[2].startswith("Still to come CleanCLIP main table (ours) in about 8 min")
    assert "not run yet: IV" in lists[0], "tables that the run does not make are no promise"


def test_a_table_of_an_earlier_run_says_so_until_it_is_made_anew(folder):
    waits = PROGRESS | dict(outputs=[output("ubt.table2", left=700.), output("ubt.table1", "done", 0.)])
    text, found = page(folder, waits)
    assert found.ids.count("ubt.table2") == 1 and "The new one: in about 12 min." in section(text, "ubt.table2")
    assert "The new one" not in section(text, "headline")


@pytest.mark.parametrize("progress", [PROGRESS, dict(PROGRESS, outputs=[]), None])
def test_every_link_into_the_page_leads_somewhere_and_ids_are_unique(folder, progress):
    _, found = page(folder, progress)
    assert set(found.links) <= set(found.ids) and len(found.ids) == len(set(found.ids))


def test_a_run_that_has_nothing_yet(tmp_path):
    (tmp_path/"mini").mkdir()
    outputs = [output("ubt.table1", left=None), output("cfbd.table1", left=10.)]
    text, found = page(tmp_path/"mini", dict(left=None, done=0, stages=40, running=[], failed=[], updated="",
                                             outputs=outputs))
    assert "so far: 0 of 40 stages<" in text and "in less than a minute" in text and "Comes here: later." in text
    assert ["UBT", "CFBD"] == [heading for heading in found.headings if heading in ("UBT", "MEM", "CFBD")]


def test_printed_tables_are_counted_against_all_that_the_paper_prints(folder):
    for progress in (PROGRESS, None):
        text, _ = page(folder, progress)
        assert "<strong>2</strong> of 10 printed tables" in section(text, "glance")
