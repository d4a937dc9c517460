"What a paper's notebook tells first: from the published results of a checkout, or from a run."
import shutil

import nbformat
import pytest
from published_tables import skip_if_older

from mcl_repro.report.findings import Findings, findings_outputs, findings_settings, published_folder, show_findings
from mcl_repro.report.rules import read_claims
from mcl_repro.core.errors import SettingsError
from mcl_repro.dev.publishing import published, published_claims, published_table, tell_findings

PAPERS = ("ubt", "mem", "cleanclip", "cfbd")


@pytest.mark.parametrize("paper", PAPERS)
def test_what_is_told_is_what_was_published(paper):
    skip_if_older()
    text, picture = (output["data"] for output in findings_outputs(paper))
    said = text["text/markdown"]
    claims = published_claims()
    verdicts = dict(zip(claims["id"], claims["verdict"]))
    for claim in findings_settings(paper)["claims"]:
        line = next(part for part in said.splitlines() if f"({claim};" in part)
        assert line.startswith(f"- **{verdicts[claim].replace('_', ' ').capitalize()}**")
        assert read_claims()[claim].statement in line
    assert f"run `{published()['run']}`, profile {published()['profile']}" in said.splitlines()[0]
    assert f"**{(claims['paper'] == paper).sum()} claims**" in said and picture["image/png"]


def test_the_table_has_the_published_numbers():
    table = published_table("ubt.table1")
    row = table[(table.attack == "SIG") & (table.defense == "UBT") & (table.metric == "CA")].iloc[0]
    line = f"{row.paper_value:.2f} | {row.value:.2f} [{row.ci_low:.2f}, {row.ci_high:.2f}]"
    assert line in str(Findings("ubt"))


def test_without_published_results_it_says_where_they_are(tmp_path, capsys):
    assert [list(o["data"]) for o in findings_outputs("mem", tmp_path)] == [["text/markdown"]]
    assert "nbs/results" in str(Findings("mem", tmp_path))
    show_findings("mem", tmp_path)
    with pytest.raises(SettingsError, match="unknown paper with findings 'memm'; did you mean mem"):
        Findings("memm")


def test_a_notebook_that_is_published_tells_of_its_own_run(tmp_path):
    run = shutil.copytree(published_folder(), tmp_path / "run")
    (run / "run.json").unlink()
    cell = nbformat.v4.new_code_cell("show_findings('cfbd')", metadata={"tags": ["findings"]})
    other = nbformat.v4.new_code_cell("1", metadata={"tags": ["hide-input"]})
    notebook = nbformat.v4.new_notebook(cells=[other, cell])
    tell_findings(notebook, "cfbd", run, dict(run="0a1b2c3d", profile="paper", seeds=3, commit="f" * 40))
    said = notebook.cells[1].outputs[0].data["text/markdown"]
    assert said.startswith("Published results: run `0a1b2c3d`, profile paper, commit `fffffff`, seeds 3.")
    assert "stand-ins" not in said and notebook.cells[0].outputs == []
