"UBT's notebook as a view: with any tables or figures it runs to its end, writes these, and computes what they need."

import pytest
from notebook_views import view

from mcl_repro.core.errors import SettingsError
from mcl_repro.lab.lab import Lab
from mcl_repro.papers.ubt import ubt_plan, UBT_OUTPUTS, UBT_TABLES


def planned(folder, tables=(), figures=(), attack_names=(), **settings):
    lab = Lab("smoke", device="cpu", runs=folder, progress=False, **settings)
    return ubt_plan(lab, lab.profile, tables, figures, attack_names)


def kinds(plan):
    "What is done when all that is planned is done: the names of the stages."
    todo, found = list(plan.nodes), set()
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.inputs.values()
    return {node.stage.name.partition(".")[2] for node in found}


# ---- the plan

def test_each_output_is_read_by_itself_and_all_of_them_are_the_whole_plan(tmp_path):
    whole, alone = planned(tmp_path).readers, {}
    for output in ["ubt.preconditions", *UBT_OUTPUTS]:
        asked = dict(figures=[output]) if output in set(UBT_OUTPUTS) - set(UBT_TABLES) else dict(tables=[output])
        plan = planned(tmp_path, **asked)
        alone |= plan.readers
        assert set(plan.readers) <= {output}
    assert set(UBT_OUTPUTS) - set(whole) == {"ubt.fig1", "ubt.fig2"}     # drawings
    assert {output: {n.key for n in nodes} for output, nodes in alone.items()} == {
        output: {n.key for n in nodes} for output, nodes in whole.items()
    }


@pytest.mark.parametrize("output, needed, spared", [
    ("ubt.table5", {"ubt_unlearn", "cleaned_clip", "classification"}, {"roclip", "abl", "divergence"}),
    ("ubt.fig4", {"ubt_select", "ubt_overfit"}, {"classification", "ubt_unlearn", "suspicious_similarities"}),
    ("ubt.separation_losses", {"suspicious_similarities"}, {"classification", "ubt_unlearn"}),
    ("ubt.fig8", {"trigger_relevance"}, {"ubt_split", "ubt_overfit", "classification"}),
    ("ubt.closeness", {"weights_apart", "noise_size", "divergence"}, {"classification"}),
    ("ubt.fig2", set(), {"clean_clip"}),
])
def test_one_table_or_figure_needs_no_more_than_it_reads(tmp_path, output, needed, spared):
    found = kinds(planned(tmp_path, figures=[output]))
    assert needed <= found
    assert not spared & found


def test_a_table_does_not_ask_for_data_of_another(tmp_path):
    for output, roles in (("ubt.table2", {"finetune", "zeroshot", "pretrain"}), ("ubt.fig2", {"pretrain"})):
        lab = Lab("smoke", device="cpu", runs=tmp_path, progress=False)
        ubt_plan(lab, lab.profile, [output])
        assert set(lab._roles) <= roles


def test_only_headline_tables_repeat_over_seeds_unless_all_are_asked_to(tmp_path):
    for seed_all, repeated in ((False, {"ubt.table1"}), (True, {line.table for line in planned(tmp_path).lines})):
        plan = planned(tmp_path, seeds=3, seed_all=seed_all)
        assert {line.table for line in plan.lines if len(line.chains) == 3} == repeated
        assert len(plan.parts.timed) == len(plan.parts.kl_public) == len(plan.parts.apart) == (3 if seed_all else 1)


def test_every_attack_has_the_same_rows_in_table_1(tmp_path):
    rows = {}
    for line in planned(tmp_path, ["ubt.table1"]).lines:
        rows.setdefault(line.defence, []).append(line.labels["attack"])
    assert list(rows) == ["No defense", "UBT", "UBT, k = 0.01%", "CFBD -> UBT", "Public CLIP, never poisoned"]
    assert all(attacks == rows["UBT"] for attacks in rows.values()) and len(rows["UBT"]) == 5


def test_every_reading_is_tried_on_every_attack_from_the_same_victim(tmp_path):
    plan = planned(tmp_path, ["ubt.readings"])
    names = ["No defense", *plan.settings.ubt.readings]
    assert list(plan.parts.readings) == [(name, attack) for attack in plan.attacks for name in names]
    first = [plan.defences[name](plan.chain("BadNet", 0)) for name in plan.settings.ubt.readings]
    assert len({node.key for node in first}) == 8 and len({node.settings["clip"].key for node in first}) == 1
    assert first[0].key == plan.defences["UBT"](plan.chain("BadNet", 0)).key     # the reading that is taken
    watched = [node.settings.get("watched") for node in first]
    by_accuracy = [reading == "cosine ascent, ended by accuracy" for reading in plan.settings.ubt.readings]
    assert [w is not None for w in watched] == by_accuracy


def upstream(node):
    "A node and all it is made from."
    return [node, *(n for part in node.inputs.values() for n in upstream(part))]


def test_no_defence_hangs_on_the_selection_that_is_told(tmp_path):
    plan = planned(tmp_path)
    chain = plan.chain("BadNet", 0)
    (attack, told), = plan.parts.told.items()
    by_flags = [n for n in upstream(told) if n.stage.name.endswith("known_selection")]
    assert attack == "BadNet" and {n.settings["count"] for n in by_flags} == {plan.settings.ubt.unlearn_count}
    for name, defence in plan.defences.items():
        stages = {n.stage.name for n in upstream(defence(chain))}
        assert not any(stage.endswith("known_selection") for stage in stages), name


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(SettingsError, match="unknown table or figure 'ubt.fig9'"):
        planned(tmp_path, figures=["ubt.fig9"])


# ---- the notebook

@pytest.mark.parametrize("parameters, written", [
    (dict(tables=["ubt.table5"]), {"ubt.table5", "ubt.table5_forest"}),
    (dict(figures=["ubt.fig4"], attack_names=["BadNet"]), {"ubt.fig4"}),
    (dict(tables=["ubt.trigger_relevance"], figures=["ubt.fig8"], attack_names=["BadNet"]),
     {"ubt.fig8", "ubt.trigger_relevance"}),
    (dict(figures=["ubt.fig1"]), set()),
])
def test_some_tables_and_figures_alone(monkeypatch, view_runs, parameters, written):
    monkeypatch.delenv("IN_TEST", raising=False)
    for kind in ("tables", "figures"):
        for old in (view_runs/"smoke"/kind).glob("*"):
            old.unlink()
    view("ubt", view_runs, **parameters)
    found = {path.stem for kind in ("tables", "figures") for path in (view_runs/"smoke"/kind).glob("*.csv")}
    assert found == written | {"ubt.fig1", "ubt.fig2"}     # drawings are always there


@pytest.fixture(scope="module")
def view_runs(tmp_path_factory):
    return tmp_path_factory.mktemp("views")     # what several of them need is computed once
