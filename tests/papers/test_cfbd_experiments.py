"CFBD's plan: computes nothing; every table and figure can be had alone; the notebook looks at what is planned."
import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from mcl_repro.core.errors import SettingsError
from mcl_repro.lab.lab import Lab
from mcl_repro.lab.status import with_inputs
from mcl_repro.papers.cfbd_study import cfbd_plan, CHOSEN, COMPARED, FED_BY, OUTPUTS, OWN_TABLES, plan_overview, TABLES
from mcl_repro.papers.cleanclip import cleanclip_plan
from mcl_repro.report.printed import headline_tables, printed_entries

NOTEBOOK = Path(__file__).resolve().parents[2]/"nbs"/"papers"/"cfbd.ipynb"
OWN = [f"cfbd.{name}" for name in OWN_TABLES]


@pytest.fixture
def lab(tmp_path, monkeypatch):
    "A lab that may not run anything."
    monkeypatch.setattr(Lab, "run", lambda *args: pytest.fail("something was computed"))
    lab = Lab("smoke", device="cpu", runs=tmp_path/"runs", progress=False, seeds=2)
    yield lab
    lab.close()


def stages(nodes):
    return {node.stage.name for node in with_inputs(nodes)}


def planned(lab, output):
    "The plan of one table or figure."
    if output in TABLES + OWN:
        return cfbd_plan(lab, lab.profile, tables=[output])
    return cfbd_plan(lab, lab.profile, figures=[output])


def test_outputs_are_all_that_the_paper_prints_and_our_own():
    # figG is of an appendix that was not at hand
    printed = {id for kind in ("tables", "figures") for id, entry in printed_entries(kind).items()
               if entry["paper"] == "cfbd"}
    assert len(OUTPUTS) == len(set(OUTPUTS)) and printed - {"cfbd.figG"} | set(OWN) <= set(OUTPUTS)


def test_a_plan_names_everything_once_and_computes_nothing(lab):
    plan = cfbd_plan(lab, lab.profile)
    parts = plan.parts
    assert len(plan.nodes) == len(set(plan.nodes))
    assert [output for output in OUTPUTS if output not in plan.readers] == ["cfbd.fig3"]     # a drawing
    assert len(parts.at_rate) == len(parts.isolated) == 4 * len(parts.rated)
    assert set(parts.judged) == {(a, name, 0) for a in parts.fed for name in FED_BY}
    assert len(parts.verdicts) == len(lab.profile.cfbd.scan_targets) * (len(plan.attacks) + 2)
    assert len(parts.strained) == lab.profile.cfbd.robustness.points.draws


def test_headline_tables_repeat_over_seeds_and_the_others_when_asked(lab):
    plan = cfbd_plan(lab, lab.profile)
    over = {line.table: {chain.seed for chain in line.chains} for line in plan.lines}
    assert over == {"cfbd.table1": {0, 1}, "cfbd.table2": {0, 1}, "cfbd.chosen": {0}}
    assert {"cfbd.table1", "cfbd.table2", "cfbd.table4"} < set(headline_tables())
    assert {seed for _, seed in plan.parts.scans} == {0, 1}
    assert len(plan.readers["cfbd.table4"]) == 2 * 2 * len(plan.attacks)
    assert len(plan.readers["cfbd.separation"]) == len(plan.attacks)
    lab.seed_all = True
    assert len(cfbd_plan(lab, lab.profile).readers["cfbd.separation"]) == 2 * len(plan.attacks)


def test_lines_are_those_of_the_tables_of_models(lab):
    plan = cfbd_plan(lab, lab.profile)
    attacks = len(lab.profile.cfbd.attacks)
    counts = {table: sum(line.table == table for line in plan.lines) for table in ("cfbd.table1", "cfbd.table2",
                                                                                  "cfbd.table3", "cfbd.chosen")}
    assert counts == {"cfbd.table1": attacks * (len(COMPARED) + 1), "cfbd.table2": attacks * len(COMPARED),
                      "cfbd.table3": 0, "cfbd.chosen": len(lab.profile.cfbd.chosen_attacks) * len(CHOSEN)}
    overview = plan_overview(plan).reads
    assert overview["cfbd.table4"] == len(plan.readers["cfbd.table4"]) and overview.iloc[-1] == len(plan.nodes)


@pytest.mark.parametrize("output, there, missing", [
    ("cfbd.table1", "baselines.roclip", "cfbd.cfbd_choose_q"),
    ("cfbd.table2", "cleanclip.cleaned_clip", "scan_sets.scan"),
    ("cfbd.chosen", "cfbd.cfbd_choose_q", "baselines.roclip"),
    ("cfbd.kept", "cfbd.cfbd_choose_q", "cfbd.cfbd_filtered_clip"),
    ("cfbd.table3", "baselines.abl_isolation", "scan_sets.scan"),
    ("cfbd.table4", "scan_sets.scan", "stages.finetuned_clip"),
    ("cfbd.table5", "cfbd_measures.faulty_subsets", "scan_sets.scan"),
    ("cfbd.fig1", "cfbd_measures.picture_changes", "stages.finetuned_clip"),
    ("cfbd.fig2", "cfbd_measures.caption_likeness", "cfbd.mapping_network"),
    ("cfbd.fig6", "cfbd_measures.subset_sizes", "cfbd_measures.pair_evidence"),
    ("cfbd.unlearning", "ubt.ubt_unlearn", "baselines.roclip"),
    ("cfbd.guard", "scan_sets.robustness", "scan_sets.scan"),
    ("cfbd.density", "cleanclip.scratch_clip", "baselines.abl_isolation"),
    ("cfbd.neighbours", "scan_sets.density_scan", "scan_sets.scan"),
])
def test_a_table_or_figure_alone_needs_less(lab, output, there, missing):
    part = planned(lab, output)
    assert set(part.nodes) < set(cfbd_plan(lab, lab.profile).nodes) and list(part.readers) == [output]
    assert there in stages(part.nodes) and missing not in stages(part.nodes)


@pytest.mark.parametrize("output", OUTPUTS)
def test_alone_it_reads_what_it_reads_among_all(lab, output):
    assert planned(lab, output).readers.get(output) == cfbd_plan(lab, lab.profile).readers.get(output)


def test_the_peers_scores_read_models_that_other_plans_train_too(lab):
    plan = cfbd_plan(lab, lab.profile, tables=["cfbd.density"])
    counts, scratch = lab.profile.cfbd.density.counts, lab.profile.cleaning.scratch.count
    sets = [("finetune", count) for count in counts] + [("scratch_pairs", scratch)]
    models = {"clean": sets, "fine-tuned": sets[:-1], "from scratch": sets[-1:], "measured": sets}
    assert set(plan.parts.density[0]) == {(model, *which) for model, those in models.items() for which in those}
    cleaning = cleanclip_plan(lab, lab.profile)
    trained = {node for node in with_inputs(plan.nodes) if node.stage.name in ("cleanclip.scratch_clip",
                                                                              "stages.finetuned_clip")}
    assert trained <= set(with_inputs(cleaning.nodes))     # smoke's counts are those of CleanCLIP's sweep


def test_one_attack_needs_less_and_the_first_is_the_one_of_the_figures(lab):
    plan = cfbd_plan(lab, lab.profile, attack_names=["SIG"])
    assert {attack for attack, _ in plan.parts.scans} == {"SIG"}
    assert plan.parts.basic == "SIG" and plan.parts.rated == []


@pytest.mark.parametrize("wrong, message", [
    (dict(tables=["cfbd.table9"]), "unknown table or figure 'cfbd.table9'"),
    (dict(figures=["cfbd.fig99"]), "unknown table or figure 'cfbd.fig99'"),
    (dict(attack_names=["Nobody"]), "unknown attack 'Nobody'"),
])
def test_unknown_names_are_refused(lab, wrong, message):
    with pytest.raises(SettingsError, match=message):
        cfbd_plan(lab, lab.profile, **wrong)


def look(runs, monkeypatch, **values):
    "The notebook as a headless run executes it, without its examples; the names that it leaves."
    import matplotlib.pyplot as plt
    monkeypatch.chdir(NOTEBOOK.parent)
    names = dict(__name__="__main__", display=lambda shown: None)
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        tags = cell["metadata"].get("tags", [])
        if cell["cell_type"] == "code" and not {"example", "findings"} & set(tags):
            with redirect_stdout(io.StringIO()):
                exec("".join(cell["source"]), names)
            if "parameters" in tags:
                names.update(profile="smoke", device="cpu", runs=str(runs), **values)
    plt.close("all")
    return names


@pytest.mark.parametrize("which, there", [
    (dict(figures=["cfbd.fig2"]), {"cfbd.fig2", "cfbd.fig3"}),
    (dict(tables=["cfbd.table4"], figures=["cfbd.fig4"], attack_names=["BadNets"]),
     {"cfbd.table4", "cfbd.table4_forest", "cfbd.fig3", "cfbd.fig4"}),
])
def test_the_notebook_makes_what_was_asked_and_computes_nothing_else(tmp_path_factory, monkeypatch, which, there):
    runs = tmp_path_factory.getbasetemp()/"cfbd_runs"     # shared by both
    for file in [*runs.glob("smoke/tables/*"), *runs.glob("smoke/figures/*")]:
        file.unlink()
    names = look(runs, monkeypatch, **which)
    assert {file.stem for file in runs.glob("smoke/[tf]*/*.csv")} == there
    assert set(names["experiments"].done) == set(names["experiments"].nodes)
