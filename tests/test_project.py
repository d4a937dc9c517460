"The source tree as a whole: notebooks and library in step, versions pinned, nothing of one machine, nothing that runs foreign code."
import ast, configparser, importlib.metadata, io, json, os, re, shutil, subprocess, sys, tempfile, tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))


def cells(notebook): return json.loads(notebook.read_text(encoding='utf-8'))['cells']
def source(cell): return ''.join(cell['source'])
def contents(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for top in ('nbs', 'mcl_repro') for p in (folder/top).rglob('*')
                              if p.is_file() and not {'__pycache__', '.ipynb_checkpoints'} & set(p.parts)}


def tracked():
    "Files under version control; without git all that are not made by running something."
    try: names = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, check=True).stdout.decode().split('\0')
    except (OSError, subprocess.CalledProcessError): names = []
    made = {'.git', '.venv', 'runs', 'data', 'build', 'dist', '.stamps', '__pycache__', '.pytest_cache', '.ipynb_checkpoints'}
    names = [n for n in names if n] or [p.relative_to(ROOT).as_posix() for p in ROOT.rglob('*') if not made & set(p.relative_to(ROOT).parts)]
    return [ROOT/n for n in names if (ROOT/n).is_file()]


# ---- notebooks and library

def test_export_and_clean_change_nothing(tmp_path):
    "In a copy with harm done to it, so that a command that did nothing would be noticed. Mend with: nbdev_export; nbdev_clean."
    copy = tmp_path/'a copy'; copy.mkdir()
    for name in ('nbs', 'mcl_repro'): shutil.copytree(ROOT/name, copy/name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for name in ('settings.ini', 'README.md'): shutil.copy(ROOT/name, copy)
    before = contents(copy); notebook = copy/'nbs/10_ubt.ipynb'; harmed = json.loads(notebook.read_text(encoding='utf-8'))
    harmed['cells'][-2]['metadata']['collapsed'] = True; next(c for c in harmed['cells'] if c['cell_type'] == 'code')['execution_count'] = 7
    notebook.write_text(json.dumps(harmed), encoding='utf-8')
    with (copy/'mcl_repro/ubt.py').open('a') as f: f.write('\nedited = "by hand"\n')
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}   # nbdev does nothing where it is set
    done = subprocess.run([sys.executable, '-c', 'from nbdev.doclinks import nbdev_export; from nbdev.clean import nbdev_clean; nbdev_export(); nbdev_clean()'],
                          cwd=copy, env={**env, 'PYTHONDONTWRITEBYTECODE': '1'}, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    after = contents(copy)
    assert sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n)) == []


def test_only_the_papers_notebooks_have_a_parameters_cell_and_exactly_one():
    found = {n.name: sum('parameters' in c['metadata'].get('tags', []) for c in cells(n)) for n in NOTEBOOKS}
    assert found and found == {name: int(bool(re.match(r'1\d_', name))) for name in found}


def code_lines(text):
    "Lines that hold code: no blank ones, comments and docstrings."
    quiet = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = {n for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in quiet for n in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_exported_cells_are_short_and_every_notebook_has_a_title():
    assert code_lines('#| export\ndef f(x): # why\n    "What."\n\n    # because\n    return (x +\n            1)\n') == 3
    long = {f"{n.name} #{c['id']}": code_lines(source(c)) for n in NOTEBOOKS for c in cells(n) if c['cell_type'] == 'code' and re.search(r'^#\s*\|\s*exports?\b', source(c), re.M)}
    assert len(long) > 100 and {name: count for name, count in long.items() if count > 45} == {}
    first = {n.name: next(source(c) for c in cells(n) if c['cell_type'] == 'markdown') for n in NOTEBOOKS}
    assert [name for name, text in first.items() if not re.match(r'# \S.*\n+> \S', text)] == []


def test_no_stored_output_has_a_traceback():
    assert [f"{n.name} #{c['id']}" for n in NOTEBOOKS for c in cells(n) for o in c.get('outputs', []) if o['output_type'] == 'error'] == []


def test_readme_is_the_index_notebook():
    "Mend with: make readme."
    from nbconvert import MarkdownExporter
    body, _ = MarkdownExporter().from_filename(str(ROOT/'nbs/index.ipynb'))
    assert (ROOT/'README.md').read_text(encoding='utf-8').strip() == body.strip()


def test_readme_names_only_what_is_there():
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    assert all((ROOT/link).exists() for link in re.findall(r'\]\(((?!https?:)[^)#]+)', text))
    assert {'reproduce', 'test', 'lab', 'bench'} <= set(re.findall(r'`?make (\w+)', text)) <= set(re.findall(r'^(\w+):', (ROOT/'Makefile').read_text(), re.M))


# ---- nothing of one machine, nothing dangerous

def test_no_file_names_a_folder_of_one_machine():
    homes = re.compile(r'(?<![\w.])(/(home|Users|root|work|mnt|media|scratch|srv)/[\w.-]+|[A-Za-z]:\\+Users)')
    here = [re.compile(re.escape(str(p)) + r'(?=[/\s"\'\\]|$)') for p in (ROOT, Path.home(), Path(sys.prefix), Path(tempfile.gettempdir()).resolve()) if len(p.parts) > 2]
    found = []
    for path in tracked():
        if path == Path(__file__).resolve(): continue
        try: text = path.read_text(encoding='utf-8')
        except UnicodeDecodeError: continue
        found += [f'{path.relative_to(ROOT)}: {m[0]}' for p in (homes, *here) for m in p.finditer(text)]
    assert found == []


def dotted(node): return f'{dotted(node.value)}.{node.attr}' if isinstance(node, ast.Attribute) else getattr(node, 'id', '')


def dangers(text):
    "What could run foreign code, by line."
    given = lambda call, name: next((getattr(k.value, 'value', dotted(k.value)) for k in call.keywords if k.arg == name), None)
    for node in ast.walk(ast.parse(text)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ''] if isinstance(node, ast.ImportFrom) else []
        yield from (f'{node.lineno}: import {n}' for n in names if n.partition('.')[0] in ('pickle', 'cPickle', 'cloudpickle', 'dill', 'joblib', 'marshal', 'shelve'))
        if not isinstance(node, ast.Call): continue
        name = dotted(node.func)
        if name in ('eval', 'exec', 'os.system', 'builtins.eval', 'builtins.exec') or name.endswith('.read_pickle') or given(node, 'shell') is True: yield f'{node.lineno}: {name}'
        if name == 'torch.load' and given(node, 'weights_only') is not True: yield f'{node.lineno}: torch.load without weights_only=True'
        if given(node, 'allow_pickle') not in (None, False): yield f'{node.lineno}: {name} with allow_pickle'
        if name in ('yaml.load', 'yaml.load_all') and not any('Safe' in ast.unparse(a) or dotted(a) == '_Yaml' for a in [*node.args[1:], *(k.value for k in node.keywords)]): yield f'{node.lineno}: {name} without a safe loader'
        if name in ('yaml.unsafe_load', 'yaml.full_load'): yield f'{node.lineno}: {name}'


def test_the_labs_own_yaml_loader_is_a_safe_one():
    import yaml
    from mcl_repro.lab import _Yaml
    assert issubclass(_Yaml, yaml.SafeLoader)


@pytest.mark.parametrize('text', ['import pickle', 'from joblib import load', 'eval("1")', 'torch.load(p)', 'torch.load(p, weights_only=False)', 'np.load(p, allow_pickle=True)',
                                  'yaml.load(t)', 'yaml.load(t, yaml.Loader)', 'subprocess.run(c, shell=True)', 'pd.read_pickle(p)'])
def test_dangers_are_found(text): assert list(dangers(text))


def test_the_library_runs_no_foreign_code():
    assert not list(dangers('model.eval()\ntorch.load(p, weights_only=True)\nnp.load(p, allow_pickle=False)\nyaml.load(t, yaml.SafeLoader)'))
    assert [f'{p.relative_to(ROOT)}:{d}' for p in (ROOT/'mcl_repro').rglob('*.py') for d in dangers(p.read_text(encoding='utf-8'))] == []


# ---- packages and continuous integration

def settings():
    parser = configparser.ConfigParser(delimiters=['=']); parser.read(ROOT/'settings.ini', encoding='utf-8')
    return parser['DEFAULT']


def pins():
    lines = [l for l in (ROOT/'constraints.txt').read_text(encoding='utf-8').splitlines() if l and not l.startswith('#')]
    assert all(re.fullmatch(r'[A-Za-z0-9._-]+==\S+( ;.*)?', l) for l in lines)
    return {re.sub(r'[-_.]+', '-', l.partition('==')[0]).lower(): l.partition('==')[2].split()[0] for l in lines}


def test_every_requirement_is_pinned_to_a_version_that_it_allows():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    pinned, wanted = pins(), [Requirement(r) for k in ('requirements', 'cluster_requirements', 'shards_requirements', 'site_requirements', 'dev_requirements') for r in settings()[k].split()]
    assert {'torch', 'open-clip-torch', 'nbdev', 'papermill', 'jupyterlab', 'matplotlib', 'seaborn', 'scikit-learn'} <= {canonicalize_name(r.name) for r in wanted}
    assert [str(r) for r in wanted if canonicalize_name(r.name) not in pinned or not r.specifier.contains(pinned[canonicalize_name(r.name)])] == []


def test_what_the_requirements_require_is_pinned_too():
    "As far as it is installed here. torch pins its CUDA packages itself."
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    pinned, missing, seen = pins(), set(), set()
    queue = [Requirement(r) for k in ('requirements', 'cluster_requirements', 'shards_requirements', 'site_requirements', 'dev_requirements') for r in settings()[k].split()]
    while queue:
        wanted = queue.pop(); name = canonicalize_name(wanted.name)
        if (name, extras := frozenset(wanted.extras)) in seen: continue
        seen.add((name, extras))
        try: needs = importlib.metadata.requires(wanted.name) or []
        except importlib.metadata.PackageNotFoundError: continue
        if name not in pinned and not re.match(r'nvidia-|cuda-|triton', name): missing.add(name)
        needs = map(Requirement, needs)
        queue += [n for n in needs if not n.marker or any(n.marker.evaluate({'extra': e}) for e in extras or {''})]
    assert missing == set() and len(seen) > 50


def test_continuous_integration_runs_what_the_readme_says():
    ci = ROOT/'.ci/run'
    assert os.access(ci, os.X_OK) and re.search(r'^make test$', ci.read_text(), re.M)
    make = (ROOT/'Makefile').read_text()
    assert re.search(r'^test:.*\n\t@.*tests/run_all\.py', make, re.M) and all(re.search(rf'^{v} \?=', make, re.M) for v in ('PAPER', 'PROFILE', 'DEVICE', 'JOBS', 'SEEDS'))
    done = subprocess.run(['make', '--dry-run', 'test', f'PYTHON={sys.executable}'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and 'tests/run_all.py' in done.stdout, done.stderr


def test_the_manifest_is_found_from_anywhere(tmp_path, monkeypatch):
    from mcl_repro.data import read_manifest
    monkeypatch.chdir(tmp_path)
    assert {'world', 'flickr8k', 'cc3m'} <= set(read_manifest()) and 'data_manifest.yaml' in (ROOT/'MANIFEST.in').read_text() and (ROOT/'data_manifest.yaml').is_file()
