"Headline tables: known ids, in the papers' order, none of the baselines."
from mcl_repro.core.files import package_yaml
from mcl_repro.report.printed import headline_tables, LAYOUTS, paper_names, printed_entries


def test_headline_tables_are_tables_of_their_papers_in_the_papers_order():
    found, papers = headline_tables(), list(paper_names())
    assert [id for id in found if id not in printed_entries("tables")] == ["cleanclip.main"], "the others are printed"
    places = [papers.index(id.partition(".")[0]) for id in found]
    assert places == sorted(places) and len(set(found)) == len(found)


def test_every_paper_has_one_and_the_baselines_none():
    assert {id.partition(".")[0] for id in headline_tables()} == set(paper_names()) - {"baselines"}
    for paper, about in package_yaml(LAYOUTS)["papers"].items():
        assert all(id.startswith(f"{paper}.") for id in about.get("headline", ()))
