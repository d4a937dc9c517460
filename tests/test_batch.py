"Notebooks run headless: a throw-away notebook per test, no torch, no network."
import io, json, os, signal, subprocess, sys, time
from pathlib import Path

import nbformat
import pytest

from mcl_repro import batch
from mcl_repro.batch import NotebookError, Progress, check_parameters, find_notebooks, notebook_page, notebook_parameters, run_notebooks
from mcl_repro.errors import DataError, SettingsError, TrainingError, UserError
from test_crash import alive, gone

STANDARD = "profile = 'mini'\ndevice = 'auto'\njobs = 1\nseeds = 1\nroles = {}\noverrides = {}\nruns = '../runs'\n"
TABLE = '''
from pathlib import Path
from mcl_repro.report import tidy, write_table
df = tidy('ubt.table1', [dict(attack='BadNet', defense='UBT', metric='CA', value=value, unit='%')])
write_table(df, 'ubt.table1', Path(runs)/profile, 'Made-up numbers.')
'''


def write(folder, name, *cells, tags=('parameters',), kernel='python3', markdown=''):
    "A notebook whose first code cell has the tags."
    nb = nbformat.v4.new_notebook(metadata={'kernelspec': {'name': kernel, 'display_name': kernel, 'language': 'python'}})
    if markdown: nb.cells.append(nbformat.v4.new_markdown_cell(markdown))
    nb.cells += [nbformat.v4.new_code_cell(c) for c in cells]
    nb.cells[1 if markdown else 0].metadata['tags'] = list(tags)
    folder.mkdir(exist_ok=True); nbformat.write(nb, folder/name)


@pytest.fixture
def nbs(tmp_path):
    write(tmp_path/'nbs', '10_ubt.ipynb', STANDARD + 'value = 80.0', TABLE, 'assert value < 100')
    return tmp_path/'nbs'


def go(nbs, papers='ubt', **kw):
    return run_notebooks(papers, **{'profile': 'smoke', 'device': 'cpu', 'runs': nbs.parent/'runs', 'notebooks': nbs, 'progress': Progress(nbs.parent/'runs', 'smoke', out=io.StringIO())} | kw)


def test_run_leaves_copy_page_table_and_report(nbs):
    done, = go(nbs); out = nbs.parent/'runs/smoke'
    assert done.state == 'complete' and done.notebook == out/'notebooks/ubt.ipynb'
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob('[!.]*') if p.is_file()) == [
        'index.html', 'notebooks/ubt.html', 'notebooks/ubt.ipynb', 'ro-crate-metadata.json', 'ro-crate-preview.html', *(f'tables/ubt.table1.{s}' for s in ('csv', 'json', 'md', 'tex'))]
    meta = json.loads(done.notebook.read_text())['metadata']
    assert meta['papermill']['exception'] is None and meta['papermill']['end_time'] and set(meta['mcl_repro']['outputs']) == {f'tables/ubt.table1.{s}' for s in ('csv', 'json', 'md', 'tex')}
    assert 'notebooks/ubt.html' in (out/'index.html').read_text()


def test_executed_copy_and_page_name_no_folder_of_this_machine(nbs):
    go(nbs)
    for p in (nbs.parent/'runs/smoke').rglob('*'):
        if p.is_file(): assert str(nbs.parent) not in p.read_text(errors='replace'), p


def test_second_run_does_nothing_until_something_changes(nbs):
    done, = go(nbs); out = nbs.parent/'runs/smoke'; before = done.notebook.stat().st_mtime_ns; key = json.loads(done.notebook.read_text())['metadata']['mcl_repro']['key']
    assert go(nbs, jobs=2)[0].state == 'unchanged' and done.notebook.stat().st_mtime_ns == before      # how many processes does not change a result
    current = lambda: batch._unchanged(out, 'ubt', key)
    assert current() and not batch._unchanged(out, 'ubt', 'other')
    for path in (out/'tables/ubt.table1.csv', out/'tables/ubt.table1.tex', out/'notebooks/ubt.html'):
        content = path.read_bytes(); path.unlink(); assert not current(); path.write_bytes(content); assert current()
    (out/'tables/ubt.table1.csv').write_text('edited by hand'); assert not current()
    assert go(nbs, parameters={'value': 81.0})[0].state == 'complete' and ',81,' in (out/'tables/ubt.table1.csv').read_text()
    assert go(nbs, parameters={'value': 81.0}, force=True)[0].state == 'complete'


def test_a_file_of_weights_is_part_of_the_key_and_found_from_the_notebooks(nbs, monkeypatch):
    from mcl_repro.lab import Lab
    weights = nbs.parent/'mine'/'victim.safetensors'; weights.parent.mkdir(); weights.write_bytes(b'one'); monkeypatch.chdir(nbs.parent)
    given = batch._found_from(nbs, {'poison.checkpoints': {'BadNet': 'mine/victim.safetensors'}, 'model.pretrained': 'openai', 'poison.count': 3})
    assert given == {'poison.checkpoints': {'BadNet': os.path.join('..', 'mine', 'victim.safetensors')}, 'model.pretrained': 'openai', 'poison.count': 3}
    lab = Lab('smoke', device='cpu', runs=nbs.parent/'runs'); key = lambda: batch.run_key(nbs/'10_ubt.ipynb', {'overrides': given}, lab)
    first = key(); weights.write_bytes(b'two'); assert key() != first
    weights.write_bytes(b'one'); assert key() == first != batch.run_key(nbs/'10_ubt.ipynb', {'overrides': {}}, lab)


def test_key_follows_library_data_and_versions(nbs, monkeypatch):
    from mcl_repro.lab import Lab
    lab = Lab('smoke', device='cpu', runs=nbs.parent/'runs'); key = lambda: batch.run_key(nbs/'10_ubt.ipynb', {'seeds': 1, 'runs': 'a'}, lab)
    first = key(); assert batch.run_key(nbs/'10_ubt.ipynb', {'seeds': 2, 'runs': 'a'}, lab) != first
    assert key() == first == batch.run_key(nbs/'10_ubt.ipynb', {'seeds': 1, 'runs': 'b', 'jobs': 4}, lab)
    for name, value in (('_library', lambda: 'other'), ('_source', lambda p: 'other')):
        with monkeypatch.context() as m: m.setattr(batch, name, value); assert key() != first
    with monkeypatch.context() as m: m.setattr(batch.report, '_version', lambda p: '0.0'); assert key() != first
    role = next(iter(lab.profile['roles'])); ref = lab.role(role); lab._roles[role] = type(ref)(ref.source, '0'*64); assert key() != first


def test_a_table_that_the_notebook_no_longer_writes_goes(nbs):
    go(nbs); out = nbs.parent/'runs/smoke/tables'; (out/'mem.table1.csv').write_text('of another notebook')
    write(nbs, '10_ubt.ipynb', STANDARD, 'x = 1'); go(nbs)
    assert sorted(p.name for p in out.iterdir()) == ['mem.table1.csv']


@pytest.mark.parametrize('given, says', [({'parameters': {'valeu': 1.}}, "no parameter 'valeu' \\(did you mean value\\?\\)"), ({'parameters': {'value': 'x'}}, 'is float'),
    ({'parameters': {'seeds': 2}}, 'option of its own'), ({'papers': 'mme'}, "unknown paper 'mme'; known: ubt"), ({'profile': 'huge'}, "unknown profile 'huge'"),
    ({'roles': {'jury': 'x'}}, "unknown role 'jury'"), ({'overrides': {'train.epoch': 1}}, 'train.epoch'), ({'jobs': 0}, 'jobs is 0'), ({'seeds': 0}, 'seeds is 0'), ({'device': 'tpu'}, "'tpu'")])
def test_wrong_requests_are_refused_before_anything_runs(nbs, given, says):
    with pytest.raises(SettingsError, match=says): go(nbs, **given)
    assert not (nbs.parent/'runs/smoke/notebooks').exists()


def test_role_with_missing_data_is_refused_before_anything_runs(nbs):
    from mcl_repro.lab import load_profile
    role = next(iter(load_profile('smoke')['roles']))
    with pytest.raises(UserError, match='nowhere.csv'): go(nbs, roles={role: str(nbs/'nowhere.csv')})
    assert not (nbs.parent/'runs/smoke/notebooks').exists()


@pytest.mark.parametrize('cell, says', [('x = 1', 'lacks profile'), ('x = 1 +', 'not Python'), ('import os', 'not `name = literal`'), ('a = b = 1', 'not `name = literal`'), ('x: int', 'not `name = literal`')])
def test_a_parameters_cell_that_cannot_be_checked_is_refused(nbs, cell, says):
    write(nbs, '10_ubt.ipynb', cell)
    with pytest.raises(SettingsError, match=says): go(nbs)


def test_exactly_one_parameters_cell(nbs):
    write(nbs, '10_ubt.ipynb', STANDARD, tags=())
    with pytest.raises(SettingsError, match='has 0 cells tagged'): notebook_parameters(nbs/'10_ubt.ipynb')
    (nbs/'10_ubt.ipynb').write_text('no notebook')
    with pytest.raises(SettingsError, match='cannot be read as a notebook'): notebook_parameters(nbs/'10_ubt.ipynb')


def test_types_of_parameters():
    known = {'i': 1, 'f': 1., 'b': False, 's': '', 'l': [], 'd': {}, 'n': None}
    check_parameters('x', known, {'i': 2, 'f': 2, 'b': True, 's': 'a', 'l': (1,), 'd': {'a': 1}, 'n': 'any'})
    for bad in ({'i': 1.5}, {'i': True}, {'f': '1'}, {'f': False}, {'b': 0}, {'s': None}, {'l': 'a'}, {'d': []}, {'n': object()}):
        with pytest.raises(SettingsError, match=f"parameter '{next(iter(bad))}'"): check_parameters('x', known, bad)


@pytest.mark.parametrize('kind', [DataError, TrainingError])
def test_a_users_error_in_a_cell_comes_through_as_its_own_line(nbs, kind):
    write(nbs, '10_ubt.ipynb', STANDARD, f'from mcl_repro.errors import {kind.__name__}\ndef deep(n):\n    if n: deep(n-1)\n    else: raise {kind.__name__}("photo.jpg is missing; restore it")\ndeep(20)')
    with pytest.raises(kind) as e: go(nbs)
    assert str(e.value) == 'photo.jpg is missing; restore it'
    assert 'photo.jpg is missing' in (nbs.parent/'runs/smoke/index.html').read_text()


def test_a_failed_run_keeps_the_last_good_copy_and_the_others_run(nbs):
    write(nbs, '11_mem.ipynb', STANDARD, 'ok = True'); go(nbs, ()); out = nbs.parent/'runs/smoke/notebooks'; good = (out/'ubt.ipynb').read_bytes()
    write(nbs, '10_ubt.ipynb', STANDARD, 'numbers = []', 'numbers[0]'); write(nbs, '11_mem.ipynb', STANDARD, 'ok = 2')
    with pytest.raises(NotebookError, match=r"notebook 'ubt' stopped in cell \d+: IndexError: list index out of range \(traceback in .*ubt.failed.html\)"): go(nbs, ())
    assert (out/'ubt.ipynb').read_bytes() == good and 'ok = 2' in (out/'mem.ipynb').read_text()
    assert 'IndexError' in (out/'ubt.failed.html').read_text() and 'of the run before' in (nbs.parent/'runs/smoke/index.html').read_text()
    assert batch._executed(out/'ubt.failed.ipynb') == {}
    write(nbs, '10_ubt.ipynb', STANDARD + 'value = 80.0', TABLE); go(nbs, ())
    assert sorted(p.name for p in out.glob('[!.]*')) == ['mem.html', 'mem.ipynb', 'ubt.html', 'ubt.ipynb']


def test_a_dead_kernel_is_not_a_finished_notebook(nbs):
    write(nbs, '10_ubt.ipynb', STANDARD, 'import os; os.kill(os.getpid(), 9)')
    with pytest.raises(NotebookError, match='its Python process died'): go(nbs)
    out = nbs.parent/'runs/smoke/notebooks'
    assert not (out/'ubt.ipynb').exists() and not list(out.glob('.ubt.*.ipynb'))


def test_kernel_is_this_interpreter_with_this_package(nbs, tmp_path, monkeypatch):
    "A kernelspec called python3 that points elsewhere is ignored, and so is the name in the notebook."
    spec = tmp_path/'share/kernels/python3'; spec.mkdir(parents=True)
    (spec/'kernel.json').write_text(json.dumps({'argv': ['/bin/false', '{connection_file}'], 'display_name': 'python3', 'language': 'python'}))
    monkeypatch.setenv('JUPYTER_PATH', str(tmp_path/'share'))
    write(nbs, '10_ubt.ipynb', STANDARD, f'import sys, os, mcl_repro\nassert sys.executable == {sys.executable!r}\nassert mcl_repro.__file__ == {str(Path(batch.__file__).with_name("__init__.py"))!r}\nassert os.getcwd() == {str(nbs)!r}\nassert os.environ["MCL_REPRO_NOTEBOOK"] == "ubt"', kernel='conda-elsewhere')
    assert go(nbs)[0].state == 'complete' and 'MCL_REPRO_NOTEBOOK' not in os.environ


def test_paths_with_spaces_and_without_permission(tmp_path):
    odd = tmp_path/'my runs ü'; odd.mkdir(); write(odd/'nbs', '10_ubt.ipynb', STANDARD + 'value = 80.0', TABLE)
    assert go(odd/'nbs')[0].state == 'complete' and (odd/'runs/smoke/tables/ubt.table1.csv').exists()
    blocked = odd/'blocked'; blocked.write_text('a file where a folder should be')
    with pytest.raises(UserError): go(odd/'nbs', runs=blocked)


def test_page_of_a_notebook_loads_nothing_and_draws_formulas():
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell('# Loss & <loss>\n\nInline $\\frac{1}{2}$, `code $x$`, and\n\n$$\\sum_i x_i$$\n\n$\\unknowncommandhere{$'),
        nbformat.v4.new_code_cell('#| hide\nsecret = 1'), nbformat.v4.new_code_cell('#| export\nvisible = "a < b"')])
    page = notebook_page(nb, 'ubt')
    assert '<mfrac>' in page and 'display="block"' in page and '$x$' in page and 'unknowncommandhere' in page
    assert 'secret' not in page and 'visible' in page and '#| export' not in page
    assert not any(w in page for w in ('https://cdn', '<script src', 'require.min.js', 'MathJax.js'))


def start(nbs, *more):
    env = dict(os.environ, OMP_NUM_THREADS='1')
    return subprocess.Popen([sys.executable, '-m', 'mcl_repro.cli', 'run', 'ubt', '--profile', 'smoke', '--device', 'cpu', '--runs', str(nbs.parent/'runs'), '--notebooks', str(nbs), *more],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=Path(batch.__file__).parent.parent, start_new_session=True)


def wait_for(path, seconds=90):
    end = time.time() + seconds
    while not path.exists() or not path.read_text():
        assert time.time() < end, f'{path} did not appear'
        time.sleep(.05)
    return path.read_text()


SLEEPER = '''
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])
open(os.path.join(runs, '..', 'pids.part'), 'w').write(f'{os.getpid()} {child.pid}'); os.rename(os.path.join(runs, '..', 'pids.part'), os.path.join(runs, '..', 'pids'))
time.sleep(300)
'''


@pytest.mark.parametrize('how, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_ends_kernel_and_children_within_seconds(nbs, how, code):
    write(nbs, '10_ubt.ipynb', STANDARD, SLEEPER); process = start(nbs)
    try:
        pids = [int(p) for p in wait_for(nbs.parent/'pids').split()]; assert all(map(alive, pids))
        began = time.time(); process.send_signal(how); out, err = process.communicate(timeout=60)
        assert process.returncode == code and time.time() - began < 30, err
        assert 'Traceback' not in err and (how == signal.SIGTERM or 'stopped; what is finished is kept' in err)
        assert gone(pids) is True
    finally: process.kill(); process.wait()
    out = nbs.parent/'runs/smoke/notebooks'; assert not (out/'ubt.ipynb').exists() and not list(out.glob('.ubt.*.ipynb'))


def test_killed_batch_is_not_done_and_the_next_run_is(nbs):
    write(nbs, '10_ubt.ipynb', STANDARD, SLEEPER); process = start(nbs)
    kernel, child = (int(p) for p in wait_for(nbs.parent/'pids').split())
    process.kill(); process.wait(); out = nbs.parent/'runs/smoke/notebooks'
    try:
        assert not (out/'ubt.ipynb').exists()
        write(nbs, '10_ubt.ipynb', STANDARD + 'value = 80.0', TABLE); assert go(nbs)[0].state == 'complete'
        assert not list(out.glob('.ubt.*.ipynb'))
    finally:
        for pid in (kernel, child):
            try: os.kill(pid, signal.SIGKILL)
            except ProcessLookupError: pass


def test_two_runs_at_once_do_the_work_once(nbs):
    write(nbs, '10_ubt.ipynb', STANDARD, "import os, time\nopen(os.path.join(runs, '..', 'starts'), 'a').write('x')\ntime.sleep(1)")
    both = [start(nbs), start(nbs)]; errs = [p.communicate(timeout=60)[1] for p in both]
    assert [p.returncode for p in both] == [0, 0], errs
    assert (nbs.parent/'starts').read_text() == 'x' and sum('unchanged' in e for e in errs) == 1


def test_the_papers_notebooks_have_their_parameters():
    "Every notebook 1x_ of this checkout has exactly one parameters cell, with the standard names and their defaults' types."
    for name, path in find_notebooks().items():
        known = notebook_parameters(path); check_parameters(name, known, batch.STANDARD)
        assert set(batch.STANDARD) <= set(known), name


def test_progress_finds_its_run_from_another_folder(tmp_path, monkeypatch):
    "papermill changes the working directory while a notebook runs; a relative folder must still be the one that was meant."
    monkeypatch.chdir(tmp_path); progress = Progress('runs', 'smoke', out=io.StringIO()); monkeypatch.chdir(tmp_path.parent)
    assert progress.runs == tmp_path/'runs'
