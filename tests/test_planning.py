"Plans: stages are read out of the papers' notebooks, sizes are compared with what is there, and nothing starts that cannot fit."
import json, re
from pathlib import Path

import nbformat
import pytest

from mcl_repro import batch, cli, planning
from mcl_repro.errors import DataError, SettingsError
from mcl_repro.lab import read_status
from mcl_repro.planning import AMOUNTS, Setting, StageWork, make_plan, plan_json, plan_notebook, plan_rows, plan_text

NBS = Path(__file__).resolve().parent.parent/'nbs'
PARAMETERS = "profile = 'mini'\ndevice = 'auto'\njobs = 1\nseeds = 1\nroles = {}\noverrides = {}\nruns = '../runs'\ntables = []\n"
LAB = '''
from mcl_repro.data import open_data
from mcl_repro.lab import Lab
from mcl_repro.stages import clean_clip, finetuned_clip, poisoned_pairs
lab = Lab(profile, device, runs, roles=roles, seeds=seeds, jobs=jobs, settings=overrides)
settings = lab.profile
def victim(seed):
    bad = lab.node(poisoned_pairs, pairs=lab.role('finetune'), attack=None, target='banana', count=len(open_data(lab.role('finetune'))), image_size=32, seed=seed)
    return lab.node(finetuned_clip, clip=clean, poisoned=bad, recipe=dict(settings.finetune, seed=seed))
'''
NODES = "clean = lab.node(clean_clip, model=settings.model.name, pretrained=settings.model.pretrained, pairs=lab.role('pretrain'), recipe=dict(settings.pretrain))\nnodes = [victim(s) for s in lab.seeds]"


@pytest.fixture
def nbs(tmp_path):
    "A folder with one small paper: a drawing that must not be executed, a request, and what comes after it."
    nb = nbformat.v4.new_notebook()
    nb.cells = [nbformat.v4.new_code_cell(c) for c in (PARAMETERS, LAB, "raise_if_drawn = 1/0", NODES, "found = lab.run(nodes)\nprint(found[0].result['loss'])", "1/0")]
    nb.cells[0].metadata['tags'] = ['parameters']
    (tmp_path/'nbs').mkdir(); nbformat.write(nb, tmp_path/'nbs/10_ubt.ipynb')
    return tmp_path/'nbs'


def small(nbs, **kw): return make_plan(**{'profile': 'smoke', 'device': 'cpu', 'runs': nbs.parent/'runs', 'notebooks': nbs, 'calibration': 'none'} | kw)


def test_a_plan_is_what_a_run_computes_and_afterwards_it_is_done(nbs):
    before = small(nbs, seeds=2)
    assert [r['stage'] for r in plan_rows(before.stages)] == ['stages.clean_clip', 'stages.poisoned_pairs', 'stages.finetuned_clip']
    assert len(before.todo) == 5 and not before.reasons and not before.unplanned and not (nbs.parent/'runs').exists()
    lab = planning.Lab('smoke', device='cpu', runs=nbs.parent/'runs', seeds=2)
    space = dict(profile='smoke', device='cpu', runs=nbs.parent/'runs', roles={}, seeds=2, jobs=1, overrides={})
    exec(LAB + NODES + '\nlab.run(nodes)', space)
    assert {r['key'] for r in read_status(nbs.parent/'runs', 'smoke')} == {p.node.key for p in before.stages}
    after = small(nbs, seeds=3)
    assert [(r['done'], r['to_do']) for r in plan_rows(after.stages)] == [(1, 0), (2, 1), (2, 1)]


@pytest.mark.parametrize('paper, stages', [('cleanclip', 121), ('baselines', 14)])
def test_the_papers_notebooks_are_planned_whole(paper, stages, tmp_path):
    "The numbers are those of a run of profile smoke; a notebook that asks for more has another one."
    plan = plan_notebook(next(NBS.glob(f'1?_{paper}.ipynb')), dict(profile='smoke', device='cpu', runs=str(tmp_path/'runs')))
    assert len(plan.nodes) == stages and not plan.unplanned and not plan.lab.absent and not list(tmp_path.iterdir())


def test_every_stage_of_the_library_has_an_amount():
    found = set()
    for path in Path(planning.__file__).parent.glob('*.py'):
        found |= {f'{path.stem}.{name}' for name in re.findall(r'^@stage\ndef (\w+)\(', path.read_text(encoding='utf-8'), re.M)}
    assert len(found) > 30 and found == set(AMOUNTS)


def test_a_table_alone_needs_less_than_a_paper(tmp_path):
    plan = make_plan(profile='smoke', device='cpu', runs=tmp_path, notebooks=NBS, table='cleanclip.lambda', calibration='none')
    assert list(plan.papers) == ['cleanclip'] and 5 < len(plan.todo) < 40
    with pytest.raises(SettingsError, match="unknown table 'cleanclip.nu'"): make_plan(profile='smoke', runs=tmp_path, notebooks=NBS, table='cleanclip.nu', calibration='none')
    with pytest.raises(SettingsError, match="'baselines' has no tables"): make_plan(['baselines'], 'smoke', runs=tmp_path, notebooks=NBS, table='cleanclip.lambda', calibration='none')


def test_amounts_are_counted_by_hand(nbs):
    plan = small(nbs, overrides={'finetune.epochs': 3}); work = {p.node.stage.name: p.work for p in plan.stages}
    trained = work['stages.finetuned_clip']     # 400 pairs in batches of 64: 6 steps an epoch
    assert trained.amounts['train', 'smoke-RN'] == 3 * 6 * 64 and trained.amounts['step', 'smoke-RN'] == 18 and trained.amounts['draw', ''] == 400
    assert trained.steps == {('smoke-RN', 64, 'auto')} and trained.pictures == 400 * 3 * 32**2 and trained.kept == 4 * planning.model_facts('smoke-RN').parameters
    assert not work['stages.poisoned_pairs'].amounts       # a clean set is left as it is
    with pytest.raises(ValueError, match="'jump'"): StageWork().add('jump', 1)


def test_missing_data_is_named_with_the_way_to_get_it(nbs, monkeypatch, tmp_path):
    monkeypatch.setenv('MCL_REPRO_DATA', str(tmp_path/'nothing'))
    plan = small(nbs, roles={'finetune': 'flickr8k:train', 'zeroshot': 'cifar10:test'})     # the second is asked for by no stage
    assert [m['sources'] for m in plan.missing] == [['flickr8k:train']] and 'mcl_repro data fetch flickr8k' in plan.missing[0]['how']
    assert plan.reasons[0].startswith('data flickr8k:train (for finetune)') and len(plan.reasons) == 1
    assert next(p for p in plan.stages if p.node.stage.name == 'stages.poisoned_pairs').node.settings['count'] == 30_000
    assert 'cannot start:\n  1. data flickr8k:train (for finetune) is missing' in plan_text(plan)


def test_a_source_that_nobody_knows_is_a_slip_and_one_of_unknown_size_wants_a_count(nbs, monkeypatch, tmp_path):
    monkeypatch.setenv('MCL_REPRO_DATA', str(tmp_path/'nothing'))
    for source, says in [('fliker8k:train', 'unknown data set fliker8k; did you mean flickr8k'), ('flickr8k:tarin', 'no split tarin'), ('/no/pairs.csv', 'no such file'), ('flickr8k', 'with its split')]:
        with pytest.raises(SettingsError, match=f'role finetune: .*{says}'): small(nbs, roles={'finetune': source})
    with pytest.raises(SettingsError, match='plan with a count, such as flickr_pascal:all:100000'): small(nbs, roles={'finetune': 'flickr_pascal:all'})
    assert [m['sources'] for m in small(nbs, roles={'finetune': 'flickr_pascal:all:100000'}).missing] == [['flickr_pascal:all:100000']]


def test_a_step_in_parts_needs_memory_for_a_part(nbs):
    whole, parts = ({p.node.stage.name: p.work for p in small(nbs, overrides=o).stages}['stages.finetuned_clip'] for o in ({}, {'finetune.micro_batch': 16}))
    assert whole.steps == {('smoke-RN', 64, 'auto')} and parts.steps == {('smoke-RN', 16, 'auto')} and parts.amounts['train', 'smoke-RN'] == whole.amounts['train', 'smoke-RN'] * 4 // 3


def test_one_table_of_ubt_reads_no_data_of_another(tmp_path, monkeypatch):
    monkeypatch.setenv('MCL_REPRO_DATA', str(tmp_path/'nothing'))
    plan = make_plan(profile='paper', device='cpu', runs=tmp_path, notebooks=NBS, table='ubt.table2', calibration='none')
    assert {r for m in plan.missing for r in m['roles']} == {'finetune', 'zeroshot'}       # nor the pairs that public weights were trained on


def test_what_does_not_fit_is_refused_by_name_and_number(nbs, monkeypatch):
    there = dict(host=2e9, device=3e7, device_free=3e7, disk=1e7, cores=2)
    monkeypatch.setattr(planning, '_machine', lambda device, folder: dict(there))
    monkeypatch.setattr(planning, 'calibrate', lambda *a: {'smoke-RN': dict(memory_fixed=2e7, memory_pair=1e6, key='x: smoke-RN, 64, auto', measured_batch=64)})
    plan = small(nbs, calibration='known')
    assert len(plan.reasons) == 2 and 'a training step of smoke-RN with 64 pairs needs about 0.084 GB, there are 0.03 GB' in plan.reasons[0] and 'are needed, 0.01 GB are free' in plan.reasons[1]
    there.update(device=1e9, device_free=1e9, disk=1e9); assert not small(nbs, calibration='known').reasons
    there.update(host=1e5); assert 'memory of the machine: stages.' in small(nbs, calibration='known').reasons[0]


def test_times_come_from_a_calibration_that_is_kept(nbs):
    plan = small(nbs, calibration='measure'); kept = json.loads((nbs.parent/'runs/calibration.json').read_text())
    assert len(kept) == 2 and all(p.seconds >= 0 for p in plan.todo) and sum(p.seconds for p in plan.todo) > .1
    assert small(nbs, calibration='known').rates == plan.rates and 'estimated time' in plan_text(plan) and 'smoke-RN, 64, auto' in plan_text(plan)
    json.dumps(plan_json(plan), allow_nan=False)


def test_run_of_profile_paper_is_refused_before_it_starts(nbs, monkeypatch, tmp_path):
    monkeypatch.setenv('MCL_REPRO_DATA', str(tmp_path/'nothing')); monkeypatch.setattr(planning, 'calibrate', lambda *a: {})
    with pytest.raises(DataError, match=r'cannot start: data cc3m:train, cc3m:train:500000 \(for pretrain, finetune\): cc3m is not on this machine'):
        batch.run_notebooks('ubt', 'paper', 'cpu', runs=nbs.parent/'runs', notebooks=nbs)
    assert not list((nbs.parent/'runs').rglob('*.ipynb'))
    monkeypatch.setattr(planning, 'make_plan', lambda *a, **k: pytest.fail('a small profile was planned'))
    with pytest.raises(batch.NotebookError, match='ZeroDivisionError'): batch.run_notebooks('ubt', 'smoke', 'cpu', runs=nbs.parent/'runs', notebooks=nbs)


def test_command_says_it_all_and_its_exit_code_is_the_verdict(nbs, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv('MCL_REPRO_DATA', str(tmp_path/'nothing'))
    words = ['plan', '--profile', 'smoke', '--device', 'cpu', '--runs', str(nbs.parent/'runs'), '--notebooks', str(nbs), '--no-calibration']
    assert cli.main(words) == 0
    said = capsys.readouterr().out; assert 'ubt: 3 stages, 3 to compute' in said and 'train (smoke-RN)' in said and said.rstrip().endswith('can start')
    assert cli.main([*words, '--json', '--role', 'finetune=coco:train']) == 1
    told = json.loads(capsys.readouterr().out); assert told['can_start'] is False and told['missing'][0]['sources'] == ['coco:train'] and told['to_do'] == 3
    assert cli.main([*words, '--paper', 'ubtt']) == 2
