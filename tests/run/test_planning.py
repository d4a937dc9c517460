"Plans: papers say what they compute, sizes are compared with what is there, and nothing starts that cannot fit."
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from paper_notebooks import STANDARD, write

import mcl_repro
from mcl_repro.cli import main as cli
from mcl_repro.core.errors import DataError, SettingsError
from mcl_repro.lab.costs import model_facts, WORLD_TOKENS
from mcl_repro.lab.lab import Lab
from mcl_repro.lab.status import read_status
from mcl_repro.papers.stages import clean_clip, finetuned_clip, poisoned_pairs
from mcl_repro.run import batch, headless, planning
from mcl_repro.run.notebooks import chosen_outputs, find_notebooks
from mcl_repro.run.plan_text import plan_json, plan_rows, plan_text
from mcl_repro.run.planning import make_plan, plan_paper

NBS = Path(mcl_repro.__file__).resolve().parent.parent/"nbs"


def tiny_plan(lab, settings, tables=()):
    "A clean model, and a set and a model for each seed; as many pairs are poisoned as the role has."
    model, trained = settings.model, dict(pairs=lab.role("pretrain"), recipe=dict(settings.pretrain))
    clean = lab.node(clean_clip, model=model.name, pretrained=model.pretrained, **trained)
    nodes = []
    for seed in lab.seeds:
        poisoned = lab.node(poisoned_pairs, pairs=lab.role("finetune"), attack=None, target="banana",
                            count=lab.size("finetune"), image_size=32, seed=seed)
        nodes.append(lab.node(finetuned_clip, clip=clean, poisoned=poisoned, recipe=dict(settings.finetune, seed=seed)))
    return SimpleNamespace(nodes=nodes)


@pytest.fixture
def nbs(tmp_path, monkeypatch):
    "A folder with one small paper, which takes its plan from the library and cannot be run."
    module = ModuleType("mcl_repro.tiny")
    module.tiny_plan = tiny_plan
    monkeypatch.setitem(sys.modules, "mcl_repro.tiny", module)
    write(tmp_path/"nbs", "tiny.ipynb", STANDARD + "tables = []", "1/0", "from mcl_repro.tiny import tiny_plan")
    return tmp_path/"nbs"


@pytest.fixture
def no_data(monkeypatch, tmp_path):
    monkeypatch.setenv("MCL_REPRO_DATA", str(tmp_path/"nothing"))


def small(nbs, **options):
    "A plan of that paper."
    usual = dict(profile="smoke", device="cpu", runs=nbs.parent/"runs", notebooks=nbs, calibration="none")
    return make_plan(**usual | options)


# what is planned

def test_a_plan_is_what_a_run_computes_and_afterwards_it_is_done(nbs):
    before, runs = small(nbs, seeds=2), nbs.parent/"runs"
    kinds = ["stages.clean_clip", "stages.poisoned_pairs", "stages.finetuned_clip"]
    assert [r["stage"] for r in plan_rows(before.stages)] == kinds
    assert len(before.todo) == 5 and not before.reasons and not before.unplanned and not runs.exists()
    lab = Lab("smoke", device="cpu", runs=runs, seeds=2)
    lab.run(tiny_plan(lab, lab.profile).nodes)
    assert {r["key"] for r in read_status(runs, "smoke")} == {p.node.key for p in before.stages}
    after = small(nbs, seeds=3)
    assert [(r["done"], r["to_do"]) for r in plan_rows(after.stages)] == [(1, 0), (2, 1), (2, 1)]


@pytest.mark.parametrize("paper, stages", [
    ("ubt", 424), ("mem", 165), ("cleanclip", 140), ("cfbd", 346), ("baselines", 19),
])
def test_the_papers_are_planned_whole(paper, stages, tmp_path):
    "The numbers are those of a run of profile smoke; a paper that asks for more has another one."
    request = dict(profile="smoke", device="cpu", runs=str(tmp_path/"runs"))
    plan = plan_paper(paper, find_notebooks(NBS)[paper], request)
    assert plan.known and len(plan.nodes) == stages
    assert not plan.lab.absent and not list(tmp_path.iterdir())


def test_a_paper_that_does_not_say_what_it_computes_is_named(nbs):
    write(nbs, "mine.ipynb", STANDARD, "1/0")
    plan = small(nbs)
    assert plan.unplanned == ["mine"] and len(plan.todo) == 3
    assert "not planned: what mine computes is only known when it runs" in plan_text(plan)


def test_a_plan_computes_nothing(nbs, monkeypatch):
    monkeypatch.setattr(sys.modules["mcl_repro.tiny"], "tiny_plan", lambda lab, settings: lab.run([]))
    with pytest.raises(RuntimeError, match="a plan computes nothing"):
        small(nbs)


def test_a_table_alone_needs_less_than_a_paper(tmp_path):
    request = dict(profile="smoke", device="cpu", runs=tmp_path, notebooks=NBS, calibration="none")
    plan = make_plan(**request, outputs=chosen_outputs(["cleanclip.lambda"]))
    assert list(plan.papers) == ["cleanclip"] and 5 < len(plan.todo) < 40
    with pytest.raises(SettingsError, match="unknown table or figure 'cleanclip.nu'"):
        make_plan(**request, outputs=chosen_outputs(["cleanclip.nu"]))
    with pytest.raises(SettingsError, match="paper 'baselines' was named, and none of its tables and figures; leave"):
        make_plan(["baselines"], **request, outputs=chosen_outputs(["cleanclip.lambda"]))


def test_one_table_of_ubt_reads_no_data_of_another(tmp_path, no_data):
    request = dict(profile="paper", device="cpu", runs=tmp_path, notebooks=NBS, calibration="none")
    plan = make_plan(**request, outputs=chosen_outputs(["ubt.table2"]))
    roles = {r for m in plan.missing for r in m["roles"]}
    # what a claim needs reads the pairs of pre-training for P12, where weights are not public
    assert roles <= {"finetune", "zeroshot", "pretrain"} and {"finetune", "zeroshot"} <= roles


def test_the_plan_of_the_papers_size_needs_no_data(no_data, tmp_path):
    plan = make_plan(profile="paper", device="cpu", runs=tmp_path, notebooks=NBS, calibration="none")
    assert len(plan.todo) > 500 and plan.missing and not plan.unplanned and all(p.work for p in plan.todo)


def test_work_follows_settings(nbs):
    plan = small(nbs, overrides={"finetune.epochs": 3})
    work = {p.node.stage.name: p.work for p in plan.stages}
    trained = work["stages.finetuned_clip"]     # 400 pairs in batches of 64: 6 steps an epoch
    assert trained.amounts["train", "smoke-RN"] == 3 * 6 * 64 and trained.amounts["step", "smoke-RN"] == 18
    facts = model_facts("smoke-RN")
    assert trained.kept == 4 * (facts.parameters - (facts.tokens - WORLD_TOKENS) * facts.token_width)
    assert not work["stages.poisoned_pairs"].amounts       # a clean set is left as it is


# data that are not here

def test_missing_data_is_named_with_the_way_to_get_it(nbs, no_data):
    plan = small(nbs, roles={"finetune": "flickr8k:train", "zeroshot": "cifar10:test"})   # unused
    assert [m["sources"] for m in plan.missing] == [["flickr8k:train"]]
    assert "mcl_repro data fetch flickr8k" in plan.missing[0]["how"]
    reason, = plan.reasons
    assert reason.startswith("data flickr8k:train (for finetune)")
    poisoned = next(p.node for p in plan.stages if p.node.stage.name == "stages.poisoned_pairs")
    assert poisoned.settings["count"] == 30_000
    assert "cannot start:\n  1. data flickr8k:train (for finetune) is missing" in plan_text(plan)


@pytest.mark.parametrize("source, says", [
    ("fliker8k:train", "unknown data set fliker8k; did you mean flickr8k"),
    ("flickr8k:tarin", "no split tarin"),
    ("/no/pairs.csv", "no such file"),
    ("flickr8k", "with its split"),
])
def test_a_source_that_nobody_knows_is_a_slip(nbs, no_data, source, says):
    with pytest.raises(SettingsError, match=f"role finetune: .*{says}"):
        small(nbs, roles={"finetune": source})


def test_a_source_of_unknown_size_wants_a_count(nbs, no_data):
    with pytest.raises(SettingsError, match="plan with a count, such as flickr_pascal:all:100000"):
        small(nbs, roles={"finetune": "flickr_pascal:all"})
    plan = small(nbs, roles={"finetune": "flickr_pascal:all:100000"})
    assert [m["sources"] for m in plan.missing] == [["flickr_pascal:all:100000"]]


# what does not fit, and how long it takes

def test_what_does_not_fit_is_refused_by_name_and_number(nbs, monkeypatch):
    there = dict(host=2e9, device=3e7, device_free=3e7, disk=1e7, cores=2)
    rate = dict(memory_fixed=2e7, memory_pair=1e6, key="x: smoke-RN, 64, auto", measured_batch=64)
    monkeypatch.setattr(planning, "machine_room", lambda device, folder: dict(there))
    monkeypatch.setattr(planning, "calibrate", lambda *given: {"smoke-RN": rate})
    step, disk = small(nbs, calibration="known").reasons
    assert "a training step of smoke-RN with 64 pairs needs about 0.084 GB, there are 0.03 GB" in step
    assert "are needed, 0.01 GB are free" in disk
    there.update(device=1e9, device_free=1e9, disk=1e9)
    assert not small(nbs, calibration="known").reasons
    there.update(host=1e5)
    assert "memory of the machine: stages." in small(nbs, calibration="known").reasons[0]


def test_times_come_from_a_calibration_that_is_kept(nbs):
    plan = small(nbs, calibration="measure")
    assert len(json.loads((nbs.parent/"runs/calibration.json").read_text())) == 2
    assert all(p.seconds >= 0 for p in plan.todo) and sum(p.seconds for p in plan.todo) > .1
    assert small(nbs, calibration="known").rates == plan.rates
    assert "estimated time" in plan_text(plan) and "smoke-RN, 64, auto" in plan_text(plan)
    json.dumps(plan_json(plan), allow_nan=False)


def test_run_of_profile_paper_is_refused_before_it_starts(nbs, monkeypatch, no_data):
    monkeypatch.setattr(planning, "calibrate", lambda *given: {})
    says = r"cannot start: data cc3m:train, cc3m:train:500000 \(for pretrain, finetune\): cc3m is not on this machine"
    with pytest.raises(DataError, match=says):
        batch.run_notebooks("tiny", "paper", "cpu", runs=nbs.parent/"runs", notebooks=nbs)
    assert not list((nbs.parent/"runs").rglob("*.ipynb"))
    monkeypatch.setattr(planning, "make_plan", lambda *a, **k: pytest.fail("a small profile was planned"))
    with pytest.raises(headless.NotebookError, match="ZeroDivisionError"):
        batch.run_notebooks("tiny", "smoke", "cpu", runs=nbs.parent/"runs", notebooks=nbs)


# the command

def test_command_says_it_all_and_its_exit_code_is_the_verdict(nbs, capsys, no_data):
    words = ["plan", "--profile", "smoke", "--device", "cpu", "--runs", str(nbs.parent/"runs"), "--notebooks", str(nbs),
             "--no-calibration"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "tiny: 3 stages, 3 to compute" in said and "train (smoke-RN)" in said and said.rstrip().endswith("can start")
    assert cli.main([*words, "--json", "--role", "finetune=coco:train"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["can_start"] is False and told["missing"][0]["sources"] == ["coco:train"] and told["to_do"] == 3
    assert cli.main([*words, "--paper", "tinny"]) == 2
