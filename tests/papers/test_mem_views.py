"MEM's notebook as a view: with any tables or figures it runs to its end, writes these, and computes what they need."

import pytest
from notebook_views import view

from mcl_repro.core.errors import SettingsError
from mcl_repro.lab.lab import Lab
from mcl_repro.lab.status import with_inputs
from mcl_repro.papers import mem
from mcl_repro.papers.mem import IN_TABLE, MEM_OUTPUTS, MEM_TABLES, mem_plan


def planned(folder, *wanted, seeds=1, seed_all=False, **chosen):
    lab = Lab("smoke", "cpu", folder, progress=False, seeds=seeds, seed_all=seed_all, module="mcl_repro.papers.mem")
    return mem_plan(lab, lab.profile, wanted, **chosen)


def kinds(plan):
    "What is done when all that is planned is done: how many of each stage."
    found = [node.stage.name.partition(".")[2] for node in with_inputs(plan.nodes)]
    return {name: found.count(name) for name in found}


# ---- the plan

def test_a_plan_computes_nothing_and_holds_all_that_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(Lab, "run", lambda *nodes: pytest.fail("a plan computes nothing"))
    monkeypatch.setattr(mem, "open_data", lambda *data: pytest.fail("a plan opens no data"))
    made = planned(tmp_path)
    asked = set(made.nodes)
    assert len(asked) == len(made.nodes) and made.whole
    for name, part in vars(made.parts).items():
        if isinstance(part, dict):
            assert part and asked >= {*part.values()}, name
    assert {made.parts.faces, made.parts.checked} < asked


def test_each_output_is_read_by_itself_and_all_of_them_are_the_whole_plan(tmp_path):
    whole, alone = planned(tmp_path).readers, {}
    for output in ["mem.preconditions", *MEM_OUTPUTS]:
        plan = planned(tmp_path, output)
        alone |= plan.readers
        assert set(plan.readers) <= {output}
    assert set(MEM_OUTPUTS) - set(whole) == {"mem.fig3"}     # a drawing
    assert {output: {n.key for n in nodes} for output, nodes in alone.items()} == {
        output: {n.key for n in nodes} for output, nodes in whole.items()
    }


def test_lines_are_the_same_alone_and_together(tmp_path):
    whole = planned(tmp_path)
    tables = list(dict.fromkeys(line.table for line in whole.lines))
    assert set(tables) < set(MEM_TABLES) and len(tables) == 7
    for table in tables:
        wanted = [(line.labels, line.found, line.models) for line in whole.lines if line.table == table]
        assert [(line.labels, line.found, line.models) for line in planned(tmp_path, table).lines] == wanted


@pytest.mark.parametrize("output, needed, spared", [
    ("mem.table1", {"rank_difference", "hacker_ranks", "published_examples"}, {"clean_clip", "shortcut", "attention"}),
    ("mem.table4", {"clean_clip", "hacker_ranks", "unlearnable_pairs"}, {"published_examples", "versions"}),
    ("mem.fig2", {"shortcut", "unlearnable_pairs"}, {"hacker_ranks", "attention", "clean_clip"}),
    ("mem.fig4", {"hacker_ranks", "hacker_clip"}, {"shortcut", "rank_difference", "clean_clip"}),
    ("mem.attention", {"attention"}, {"hacker_ranks", "shortcut", "versions", "clean_clip"}),
    ("mem.likeness", {"versions"}, {"hacker_ranks", "shortcut", "attention", "clean_clip"}),
    ("mem.fig7", {"published_examples", "clean_clip"}, {"hacker_clip", "hacker_ranks"}),
    ("mem.survival", {"publishing_check", "hacker_ranks"}, {"shortcut", "clean_clip"}),
])
def test_one_table_or_figure_needs_no_more_than_it_reads(tmp_path, output, needed, spared):
    found = set(kinds(planned(tmp_path, output)))
    assert needed <= found
    assert not spared & found


def test_a_table_does_not_ask_for_data_of_another(tmp_path):
    for output, roles in (("mem.table4", {"faces_train", "faces_test", "pretrain", "mem_pretrain"}),
                          ("mem.variants", {"mem_flickr8k_train", "mem_flickr8k_test"}),
                          ("mem.survival", {"mem_flickr8k_train", "mem_flickr8k_test"}), ("mem.fig3", set())):
        assert set(planned(tmp_path, output).lab._roles) <= roles


def test_only_table_1_repeats_over_seeds_unless_all_are_asked_to(tmp_path):
    every = {line.table for line in planned(tmp_path).lines} - {"mem.controls"}     # which are of one training
    for seed_all, repeated in ((False, {"mem.table1"}), (True, every)):
        plan = planned(tmp_path, seeds=3, seed_all=seed_all)
        assert {line.table for line in plan.lines if len(line.found) == 3} == repeated
        assert len({key[-1] for key in plan.parts.looks}) == len({key[-1] for key in plan.parts.curves}) == (
            3 if seed_all else 1
        )


def test_who_does_nothing_to_what_he_found_is_the_model_of_table_1(tmp_path):
    plan = planned(tmp_path)
    first, lines = plan.parts.first, {}
    for line in plan.lines:
        lines[line.table, *line.labels.values()] = line.found
    for method, pairs in (("MEM-3", "protected"), ("Clean", "clean")):
        assert lines["mem.survival", "nothing", pairs] == lines["mem.table1", method, first]
    assert len({tuple(found) for key, found in lines.items() if key[0] == "mem.survival"}) == 18     # nothing else is


def test_ranks_are_noted_after_every_epoch_only_where_curves_show_them(tmp_path):
    watched = {}
    for line in planned(tmp_path).lines:
        watched.setdefault(line.table, set()).add(line.models[0].settings.get("test") is not None)
    assert watched == {"mem.table1": {True, False}, "mem.table2": {True, False}, "mem.table3": {True, False},
                       "mem.table4": {False}, "mem.survival": {True, False}, "mem.variants": {False},
                       "mem.controls": {True, False}}


def test_a_plan_of_some_data_sets_and_methods(tmp_path):
    made = planned(tmp_path, "mem.table1", dataset_names=["Flickr8K"], method_names=["UAP"])
    assert [line.labels["method"] for line in made.lines] == ["Random", "Clean", "UAP"] and not made.whole
    assert {line.labels["dataset"] for line in made.lines} == {"Flickr8K"}
    clean = next(line.models[0] for line in made.lines if line.labels["method"] == "Clean")
    assert clean in made.parts.protections["Flickr8K", "UAP"].inputs.values(), "UAP's surrogate is the clean model"


def test_all_looks_are_at_one_example(tmp_path):
    looks = planned(tmp_path, "mem.fig5").parts.looks
    (first, *others) = looks.values()
    assert first.settings.get("example") is None and all(node.settings["example"] == first for node in others)
    triggers = {key[:2]: node.settings["protection"] for key, node in looks.items()}
    assert triggers["Clean", True] == triggers["EM", True] == triggers["MEM-3", True] != triggers["MEM-3", False]
    assert not any(protection for (method, with_trigger), protection in triggers.items() if not with_trigger)


@pytest.mark.parametrize("chosen, says", [
    (dict(dataset_names=["Flickr9K"]), "unknown data set 'Flickr9K' in dataset_names; profile smoke has Flickr8K"),
    (dict(method_names=["MEM-4"]), "unknown method 'MEM-4' in method_names; profile smoke has EM"),
    (dict(figures=["mem.fig9"]), "unknown table or figure 'mem.fig9'"),
])
def test_what_a_plan_does_not_know_is_refused(tmp_path, chosen, says):
    with pytest.raises(SettingsError, match=says):
        planned(tmp_path, **chosen)


# ---- the notebook

@pytest.fixture(scope="module")
def view_runs(tmp_path_factory):
    return tmp_path_factory.mktemp("views")     # what several of them need is computed once


def written(runs):
    found = {path.stem for kind in ("tables", "figures") for path in (runs/"smoke"/kind).glob("*.csv")}
    return {name for name in found if not name.endswith("_forest")}


@pytest.mark.parametrize("parameters, expected", [
    (dict(figures=["mem.fig3"]), set()),
    (dict(figures=["mem.fig1"]), {"mem.fig1"}),
    (dict(figures=["mem.fig5"]), {"mem.fig5"}),
    (dict(tables=["mem.shortcut"], figures=["mem.fig6"]), {"mem.shortcut", "mem.fig6"}),
    (dict(tables=["mem.table1"]), {"mem.table1"}),
    (dict(tables=["mem.table3", "mem.curves"]), {"mem.table3", "mem.curves"}),
    (dict(tables=["mem.table1", "mem.table4"], dataset_names=["Flickr30K"], method_names=["EM"]),
     {"mem.table1", "mem.table4"}),
    ({}, set(MEM_OUTPUTS)),
])
def test_some_tables_and_figures_alone_and_all_of_them(monkeypatch, view_runs, parameters, expected):
    monkeypatch.delenv("IN_TEST", raising=False)
    for kind in ("tables", "figures"):
        for old in (view_runs/"smoke"/kind).glob("*"):
            old.unlink()
    space = view("mem", view_runs, **parameters)
    assert written(view_runs) == expected | {"mem.fig3"}     # the drawing is always there
    assert set(space["experiments"].done) == set(space["experiments"].nodes)
    if not parameters:
        assert {line.labels["method"] for line in space["experiments"].lines if line.table == "mem.table1"} >= {
            "Random", "Clean", *IN_TABLE["mem.table1"][:4]
        }


def test_a_profile_leaves_out_variants_of_methods_that_it_does_without(tmp_path):
    roles = dict(mem_flickr8k_train="world:mem_flickr8k_train:60", mem_flickr8k_test="world:mem_flickr8k:20")
    lab = Lab("photos", "cpu", tmp_path, roles=roles, progress=False, module="mcl_repro.papers.mem")
    variants = {line.labels["variant"] for line in mem_plan(lab, lab.profile, ["mem.variants"]).lines}
    assert "public code" in variants and "UAP, bound 8/255" not in variants
