"The benchmarks: that they measure what they say, and that the command leaves a table behind. Speeds are not judged here."
import csv, os, platform, shutil, subprocess, sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mcl_repro
from mcl_repro import bench

ROOT = Path(mcl_repro.__file__).parent.parent


def call(*words):
    return subprocess.run([sys.executable, '-m', 'mcl_repro.bench', *map(str, words)], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}, timeout=300)


def test_command_writes_what_it_prints(tmp_path):
    done = call('--quick', 'world_rendering', 'store_overhead', '--runs', tmp_path)
    assert done.returncode == 0, done.stderr
    with open(tmp_path/'bench'/'bench.csv', newline='', encoding='utf-8') as f: rows = list(csv.DictReader(f))
    assert list(rows[0]) == ['benchmark', 'quantity', 'value', 'unit', 'target', 'met']
    assert list(dict.fromkeys(r['benchmark'] for r in rows)) == ['machine', 'store_overhead', 'world_rendering']
    assert all(float(r['value']) > -2 for r in rows if r['benchmark'] != 'machine')
    assert all(r['quantity'] in done.stdout for r in rows) and 'bench.csv' in done.stdout
    assert not any(r['met'] for r in rows) and 'nothing is judged' in done.stdout
    assert [p.name for p in (tmp_path/'bench').iterdir()] == ['bench.csv'], 'the temporary store is gone'


def test_machine_is_described_without_its_name():
    rows = {r['quantity']: str(r['value']) for r in bench.machine_rows()}
    assert {'cpu', 'cores', 'python', 'torch', 'open_clip_torch', 'git commit'} <= set(rows)
    text = '\n'.join(rows.values())
    assert platform.node() not in text.split() and str(Path.home()) not in text and str(ROOT) not in text
    assert bench.machine_rows()[0] == bench.machine_rows()[0] and 'usable cores' not in bench._hardware('cpu'), 'the cached facts are left alone'


def test_unknown_benchmark_is_one_line_and_exit_2(tmp_path, capsys):
    assert bench.main(['speed_of_light', '--runs', str(tmp_path/'runs')]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: unknown benchmark 'speed_of_light'; known: ") and error.count('\n') == 1
    assert not (tmp_path/'runs').exists()


def test_full_run_judges_and_goes_on_after_a_failure(tmp_path, monkeypatch, capsys):
    def broken(scale): raise RuntimeError('fell over')
    def good(scale): return [bench.row('good', 'speed', 2, 'ratio', '>= 1'), bench.row('good', 'wait', 2, 's', '< 1'), bench.row('good', 'size', 2)]
    monkeypatch.setattr(bench, 'BENCHMARKS', dict(broken=broken, good=good))
    assert bench.main(['--runs', str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert 'error: broken: fell over' in said.err and '1 of 2 targets met' in said.out
    with open(tmp_path/'bench'/'bench.csv', newline='', encoding='utf-8') as f: rows = [r for r in csv.DictReader(f) if r['benchmark'] != 'machine']
    assert [(r['quantity'], r['value'], r['met']) for r in rows] == [('failed (RuntimeError)', '', ''), ('speed', '2.0', 'yes'), ('wait', '2.0', 'no'), ('size', '2.0', '')]
    monkeypatch.setattr(bench, 'BENCHMARKS', dict(good=good))
    assert bench.main(['--runs', str(tmp_path)]) == 0


def test_both_loops_do_the_same_work():
    scale = replace(bench.QUICK, steps=1)
    clip, data, recipe = bench._prepared(scale)
    bare, batches = bench.build_clip(scale.model), bench._bare_batches(clip, data, recipe)
    assert len(batches) == 1 and batches[0][0].shape == (scale.batch_size, 3, 32, 32) and batches[0][0].is_contiguous()
    loss = bench.bare_loop(bare.model, batches, recipe.learning_rate)
    assert bench.train(clip, data, recipe)[0]['loss'] == pytest.approx(loss, rel=1e-3)


def test_shares_are_parts_of_a_whole():
    before = torch.get_num_threads()
    rows = {r['quantity']: r['value'] for r in bench.time_shares(bench.QUICK)}
    assert list(rows) == ['data', 'forward', 'backward', 'optimiser', 'rest'] and sum(rows.values()) == pytest.approx(1, abs=.01)
    assert all(0 <= v < 1 for v in rows.values()) and torch.get_num_threads() == before


def test_processes_are_counted_where_they_overlap():
    assert bench.overlap_speed([[0, 1, 2, 3, 4], [2, 3, 4, 5, 6]], 8) == pytest.approx(16)
    assert bench.overlap_speed([[0, 10], [4, 6]], 10) == pytest.approx(10 * (0.2 + 1) / 2), 'steps across the ends count in part'
    with pytest.raises(ValueError, match='same time'): bench.overlap_speed([[0, 1], [1, 2]], 8)


def test_busy_machine_and_single_core_are_not_judged(monkeypatch):
    class Process:
        def __init__(self, scale, threads): pass
        def close(self): pass
        def answer(self): return 'ready'
    monkeypatch.setattr(bench, '_TrainingProcess', Process)
    def met(busy, cores):
        monkeypatch.setattr(bench, '_turn_of', lambda workers, scale, others: others.append(busy) or 150. * len(workers) ** .5)
        monkeypatch.setattr(bench, '_cores', lambda: cores)
        return [r['met'] for r in bench.training_processes(bench.QUICK) if r['target']]
    assert [met(.1, 2), met(.5, 2), met(.1, 1)] == [['yes'], [''], ['']]


@pytest.mark.skipif(not shutil.which('false'), reason='needs the command false')
def test_training_process_that_dies_is_reported_and_none_is_left(monkeypatch):
    started, real = [], bench._TrainingProcess
    def process(scale, threads):
        started.append(real(scale, threads)); return started[-1]
    monkeypatch.setattr(bench, '_TrainingProcess', process)
    monkeypatch.setattr(bench.sys, 'executable', shutil.which('false'))
    with pytest.raises(RuntimeError, match='a training process ended with exit code 1'): bench.training_processes(bench.QUICK)
    assert len(started) == 3 and all(p.process.poll() is not None for p in started)


def test_import_times_and_that_help_needs_no_torch():
    rows = {r['quantity']: r for r in bench.import_times(replace(bench.QUICK, turns=1))}
    assert rows['torch modules loaded by mcl_repro --help']['met'] == 'yes'
    assert 0 < rows['mcl_repro --help']['value'] < rows['import mcl_repro.ubt']['value']
