"Every table says over what its intervals are: once, the same in each form in which it is written."
import pytest

from mcl_repro.report.page import write_report
from mcl_repro.report.tables import show_table, tidy, write_table

ONE, THREE = "test items of one training", "trainings (3 seeds) and test items"


def table(*seeds, interval=True):
    "UBT Table I with a cell for each of some numbers of seeds."
    ends = dict(ci_low=60., ci_high=80.) if interval else {}
    return tidy("ubt.table1", [
        dict(attack="BadNet", defense=defense, metric="CA", value=70., n_seeds=count, **ends)
        for count, defense in zip(seeds, ("No defense", "UBT"))
    ])


def written(frame, folder):
    "The table as Markdown, TeX, in a notebook, and on the report page."
    write_table(frame, "ubt.table1", folder, "Made-up numbers.")
    shown = show_table(frame, "Made-up numbers.")
    files = [(folder/f"tables/ubt.table1.{kind}").read_text() for kind in ("md", "tex")]
    page = write_report(folder).read_text()
    return [*files, shown._repr_html_(), str(shown), page[page.index('id="ubt.table1"'):]]


@pytest.mark.parametrize("seeds, says", [
    ((1, 1), ONE), ((3, 3), THREE), ((3, 1), f"{THREE}, where there was one training over its test items"),
    ((5, 3), "trainings (5 or 3 seeds) and test items"),
])
def test_every_form_says_it_once(seeds, says, tmp_path):
    for text in written(table(*seeds), tmp_path/"mini"):
        assert text.count(f"interval over {says}") == 1, text
        assert text.count("test items of one training") == (says == ONE)


def test_the_mean_of_seeds_is_called_one(tmp_path):
    assert all("mean of 3 seeds" in text.lower() for text in written(table(3, 3), tmp_path/"mini"))
    assert not any("mean of" in text.lower() for text in written(table(1, 1), tmp_path/"mini"))


def test_without_an_interval_nothing_is_said_of_one(tmp_path):
    for text in written(table(1, 1, interval=False), tmp_path/"mini"):
        assert "interval over" not in text and "test items" not in text
