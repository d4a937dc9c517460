"The source tree as a whole: notebooks and library in step, rooms kept, versions pinned, nothing of one machine."
import ast
import configparser
import importlib.metadata
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mcl_repro.dev.outputs import FIGURE_LIMIT, NOTEBOOKS_LIMIT, directives, is_papers, stale

ROOT = Path(__file__).resolve().parent.parent     # tests/
while not (ROOT/"settings.ini").exists():
    ROOT = ROOT.parent
MADE = {".git", ".venv", "runs", "data", "build", "dist", ".stamps",
        "__pycache__", ".pytest_cache", ".ipynb_checkpoints"}     # folders that running something makes
NOTEBOOKS = [p for p in sorted((ROOT/"nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
LIBRARY = [p for p in sorted((ROOT/"mcl_repro").rglob("*.py")) if p.name != "_modidx.py"]


def name_of(notebook):
    return notebook.relative_to(ROOT/"nbs").as_posix()


def cells(notebook):
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def code_cells(notebook):
    return [c for c in cells(notebook) if c["cell_type"] == "code"]


def source(cell):
    return "".join(cell["source"])


def contents(folder):
    "Path -> bytes of everything in notebooks and library that is not made by running something."
    made = {"__pycache__", ".ipynb_checkpoints"}
    paths = [p for top in ("nbs", "mcl_repro") for p in (folder/top).rglob("*") if p.is_file()]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths if not made & set(p.parts)}


def tracked():
    "Files under version control; without git all that are not made by running something."
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    except (OSError, subprocess.CalledProcessError):
        listed = ""
    names = [n for n in listed.split("\0") if n]
    if not names:
        paths = [p.relative_to(ROOT) for p in ROOT.rglob("*")]
        names = [p.as_posix() for p in paths if not MADE & set(p.parts)]
    return [ROOT/n for n in names if (ROOT/n).is_file()]


# ---- notebooks and library

def run_nbdev(folder):
    "Export and clean in a folder. nbdev does nothing where IN_TEST is set."
    environment = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"PYTHONDONTWRITEBYTECODE": "1"}
    code = "from nbdev.doclinks import nbdev_export; from nbdev.clean import nbdev_clean; nbdev_export(); nbdev_clean()"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_export_and_clean_change_nothing(tmp_path):
    """Mend with: nbdev_export; nbdev_clean.

    It is tried in a copy with harm done to it, so that a command that did nothing would be noticed.
    """
    copy = tmp_path/"a copy"
    copy.mkdir()
    for name in ("nbs", "mcl_repro"):
        shutil.copytree(ROOT/name, copy/name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "README.md"):
        shutil.copy(ROOT/name, copy)
    before = contents(copy)
    notebook = copy/"nbs/papers/ubt.ipynb"
    harmed = json.loads(notebook.read_text(encoding="utf-8"))
    harmed["cells"][-2]["metadata"]["collapsed"] = True
    next(c for c in harmed["cells"] if c["cell_type"] == "code")["execution_count"] = 7
    notebook.write_text(json.dumps(harmed), encoding="utf-8")
    with (copy/"mcl_repro/papers/ubt.py").open("a") as f:
        f.write('\nedited = "by hand"\n')
    run_nbdev(copy)
    after = contents(copy)
    assert sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n)) == []


def exported_to(notebook):
    "The module that a notebook is exported to, None without one."
    for cell in code_cells(notebook):
        if name := directives(cell).get("default_exp"):
            return name
    return None


def test_a_notebook_and_its_module_have_the_same_place():
    modules = {name_of(n): exported_to(n) for n in NOTEBOOKS if exported_to(n)}
    assert len(modules) > 40
    assert {n: m for n, m in modules.items() if m.replace(".", "/") + ".ipynb" != n} == {}


def test_only_papers_and_tutorials_have_a_parameters_cell_and_exactly_one():
    counts = {name_of(n): sum("parameters" in c["metadata"].get("tags", []) for c in cells(n)) for n in NOTEBOOKS}
    assert {n for n, count in counts.items() if count > 1} == set()
    assert {n for n, count in counts.items() if count and n.partition("/")[0] not in ("papers", "tutorials")} == set()
    assert {"papers/ubt.ipynb", "papers/mem.ipynb"} <= {n for n, count in counts.items() if count}


def wrapped_lines(text, width=120):
    "Lines of code as a page of this width shows them, without docstrings, comments and blank lines."
    said = set()
    for node in ast.walk(ast.parse(text)):
        documented = isinstance(node, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        if documented and ast.get_docstring(node) is not None:
            said |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = [line for i, line in enumerate(text.splitlines(), 1) if i not in said]
    code = [line for line in lines if line.strip() and not line.strip().startswith("#")]
    return sum(math.ceil(len(line)/width) for line in code)


def test_wrapped_lines_are_counted():
    text = '#| export\ndef f(x): # why\n    "What."\n\n    # because\n    return (x +\n            1)\n'
    assert wrapped_lines(text) == 3
    assert wrapped_lines("x = [" + "1, "*100 + "]") == 3


def test_exported_cells_are_short():
    exported = [(n, c) for n in NOTEBOOKS for c in code_cells(n) if {"export", "exports"} & directives(c).keys()]
    lengths = {f"{name_of(n)} #{c['id']}": wrapped_lines(source(c)) for n, c in exported}
    assert len(lengths) > 100
    assert {name: count for name, count in lengths.items() if count > 45} == {}


def test_every_notebook_has_a_title_and_says_what_it_is():
    texts = {name_of(n): [source(c) for c in cells(n) if c["cell_type"] == "markdown"] for n in NOTEBOOKS}
    first = {name: found[0] for name, found in texts.items()}
    assert [name for name, text in first.items() if not re.match(r"# \S.*\n+> \S", text)] == []


def test_contents_names_every_notebook():
    text = "".join(source(c) for c in cells(ROOT/"nbs/guides/contents.ipynb"))
    linked = {(ROOT/"nbs/guides"/link).resolve() for link in re.findall(r"\]\(([^)#:]+\.ipynb)", text)}
    expected = [n for n in NOTEBOOKS if n.parent.name != "guides" and n.name != "index.ipynb"]
    assert [name_of(n) for n in expected if n.resolve() not in linked] == []


# ---- what notebooks show

def outputs(notebook):
    return [(c, o) for c in code_cells(notebook) for o in c.get("outputs", [])]


def test_no_stored_output_has_a_traceback():
    errors = [f"{name_of(n)} #{c['id']}" for n in NOTEBOOKS for c, o in outputs(n) if o["output_type"] == "error"]
    assert errors == []


# notebooks that hold code and show nothing, each with its reason
SHOW_NOTHING = {}


def test_every_notebook_with_code_shows_something():
    "Mend with: python -m mcl_repro.dev.outputs --run; a paper's notebook: make reproduce; make publish."
    silent = {name_of(n) for n in NOTEBOOKS if code_cells(n) and not outputs(n)}
    assert silent == set(SHOW_NOTHING)


def test_outputs_are_not_older_than_the_code():
    "Mend with: make outputs RUN=--run. The papers' notebooks are left out: whole runs fill them."
    assert list(stale(ROOT/"nbs", papers=False)) == []


def test_notebooks_are_small_and_pictures_compressed():
    pictures = {f"{name_of(n)} #{c['id']}": len(o["data"]["image/png"])
                for n in NOTEBOOKS for c, o in outputs(n) if "image/png" in o.get("data", {})}
    assert {name: size for name, size in pictures.items() if size > FIGURE_LIMIT} == {}
    assert sum(n.stat().st_size for n in NOTEBOOKS) <= NOTEBOOKS_LIMIT


def test_the_papers_are_found():
    papers = ("ubt", "mem", "cleanclip", "cfbd", "baselines")
    assert {name_of(n) for n in NOTEBOOKS if is_papers(n)} == {f"papers/{p}.ipynb" for p in papers}


# ---- the front page

def readme():
    return (ROOT/"README.md").read_text(encoding="utf-8")


def test_readme_is_the_index_notebook():
    "Mend with: make readme."
    from nbconvert import MarkdownExporter
    body, _ = MarkdownExporter().from_filename(str(ROOT/"nbs/index.ipynb"))
    assert readme().strip() == body.strip()


def test_readme_is_short_with_one_picture_and_one_table():
    text = readme()
    assert len(text.split()) <= 1000
    assert len(re.findall(r"!\[[^\]]+\]\((?!https?:)", text)) == 1
    assert len(re.findall(r"^\|[-:| ]+\|$", text, re.M)) == 1


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_pages_link_only_to_what_is_there(name):
    text = (ROOT/name).read_text(encoding="utf-8")
    assert [link for link in re.findall(r"\]\(((?!https?:)[^)#]+)", text) if not (ROOT/link).exists()] == []


def test_notebooks_link_only_to_notebooks_that_are_there():
    "Links of the index are as the README has them, from the top of the tree."
    missing = []
    for notebook in NOTEBOOKS:
        folder = ROOT if name_of(notebook) == "index.ipynb" else notebook.parent
        text = "\n".join(source(c) for c in cells(notebook) if c["cell_type"] == "markdown")
        missing += [(name_of(notebook), link) for link in re.findall(r"\]\(((?!https?:)[^)#\s]+\.ipynb)", text)
                    if not (folder/link).exists()]
    assert missing == []


def test_pages_name_only_targets_of_make():
    targets = set(re.findall(r"^(\w+):", (ROOT/"Makefile").read_text(encoding="utf-8"), re.M))
    text = readme() + (ROOT/"CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:`|^)make (\w+)", text, re.M))
    assert {"reproduce", "test", "lab", "site", "bench"} <= named <= targets


# ---- rooms

def imported(tree):
    "(module, name) of every `from module import name`."
    return [(n.module or "", a.name) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names]


def modules_in(tree):
    "The names under which a file has modules of ours."
    plain = [a.asname or a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    names = {f"{p.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.')}" for p in LIBRARY}
    from_imports = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    taken = {a.asname or a.name for n in from_imports for a in n.names if f"{n.module}.{a.name}" in names}
    return taken | {p for p in plain if p in names}


def private_names(path):
    "Names with a leading underscore that a file takes from another module of ours."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    ours = modules_in(tree)
    taken = [(m, n) for m, n in imported(tree) if m.startswith("mcl_repro")]
    attributes = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)]
    reached = [(n.value.id, n.attr) for n in attributes if n.value.id in ours]
    return [f"{where}.{name}" for where, name in taken + reached if re.match("_[^_]", name)]


def test_private_names_are_found(tmp_path):
    path = tmp_path/"a.py"
    path.write_text("from mcl_repro.core.files import _write, write\nfrom mcl_repro.core import files\n"
                    "files._hidden(); files.shown(); self._own; files.__name__\n")
    assert private_names(path) == ["mcl_repro.core.files._write", "files._hidden"]


def test_no_private_name_is_taken_from_another_module():
    found = {p.relative_to(ROOT).as_posix(): private_names(p) for p in LIBRARY}
    assert {path: names for path, names in found.items() if names} == {}


def test_ones_own_model_needs_nothing_that_only_reproducing_needs():
    "`scan` and its like, imported where the packages of the extra `reproduce` are missing."
    missing = ["IPython", "dask", "distributed", "ipykernel", "jupyter_client", "jupyterlab", "latex2mathml",
               "nbclient", "nbconvert", "nbdev", "nbformat", "nltk", "papermill", "rocrate", "seaborn",
               "transformers"]
    functions = "scan, attack, measure, repair, protect, verify, compare"
    code = f"""
import sys
sys.modules.update(dict.fromkeys({missing!r}))
from mcl_repro import {functions}
import mcl_repro.cli.tools
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


# ---- nothing of one machine, nothing dangerous

def test_no_file_names_a_folder_of_one_machine():
    homes = re.compile(r"(?<![\w.])(/(home|Users|root|work|mnt|media|scratch|srv)/[\w.-]+|[A-Za-z]:\\+Users)")
    here = [p for p in (ROOT, Path.home(), Path(sys.prefix), Path(tempfile.gettempdir()).resolve()) if len(p.parts) > 2]
    patterns = [homes, *(re.compile(re.escape(str(p)) + r"(?=[/\s\"'\\]|$)") for p in here)]
    found = []
    for path in tracked():
        if path == Path(__file__).resolve():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {m[0]}" for p in patterns for m in p.finditer(text)]
    assert found == []


DANGEROUS = ["import pickle\npickle.load(p)", "from joblib import load\nload(p)", "eval('1')", "exec('1')",
             "import torch\ntorch.load(p)", "import yaml\nyaml.load(t, yaml.Loader)", "import yaml\nyaml.full_load(t)",
             "import subprocess\nsubprocess.run(c, shell=True)", "import os\nos.system(c)",
             "import pandas as pd\npd.read_pickle(p)"]


def ruff(*paths, cwd=ROOT):
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise"]
    options = ["--config", str(ROOT/"pyproject.toml"), *map(str, paths)]
    return subprocess.run([*command, *options], cwd=cwd, capture_output=True, text=True)


def test_ruff_finds_what_could_run_foreign_code(tmp_path):
    "With the project's own settings, so that a rule that is switched off by accident is noticed."
    for i, text in enumerate(DANGEROUS):
        (tmp_path/f"d{i}.py").write_text(f"c = p = t = {i}\n{text}\n")
    said = ruff("--select", "S,TID251", tmp_path).stdout
    assert [text for i, text in enumerate(DANGEROUS) if f"d{i}.py" not in said] == []


def test_ruff_looks_at_library_notebooks_and_tests():
    files = {Path(line) for line in ruff("--show-files", ".").stdout.splitlines()}
    assert {*LIBRARY, *NOTEBOOKS, Path(__file__).resolve()} <= files


def test_arrays_are_read_without_pickle():
    "numpy is the one thing that no rule of ruff knows."
    assert [str(p) for p in LIBRARY if re.search(r"allow_pickle\s*=\s*True", p.read_text(encoding="utf-8"))] == []


# ---- packages and continuous integration

def settings():
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT/"settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def requirements():
    "Requirements of the package and of every extra that `make` installs."
    extras = re.search(r"--editable '\.\[([\w,]+)\]'", (ROOT/"Makefile").read_text(encoding="utf-8"))[1].split(",")
    keys = ["requirements", *(f"{e}_requirements" for e in extras)]
    return [Requirement(r) for k in keys for r in settings()[k].split()]


def pins():
    "Package -> version."
    lines = (ROOT/"constraints.txt").read_text(encoding="utf-8").splitlines()
    lines = [l for l in lines if l and not l.startswith("#")]
    assert [l for l in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==\S+( ;.*)?", l)] == []
    pairs = [l.split(" ")[0].split("==") for l in lines]
    return {canonicalize_name(name): version for name, version in pairs}


def test_every_requirement_is_pinned_to_a_version_that_it_allows():
    pinned, wanted = pins(), requirements()
    names = {canonicalize_name(r.name) for r in wanted}
    assert {"torch", "open-clip-torch", "nbdev", "papermill", "jupyterlab", "ruff"} <= names
    version = {r: pinned.get(canonicalize_name(r.name)) for r in wanted}
    assert [str(r) for r, v in version.items() if not v or not r.specifier.contains(v)] == []


def needed_by(requirement):
    "What an installed package requires here with these extras; nothing where it is not installed."
    try:
        needs = importlib.metadata.requires(requirement.name) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    extras = requirement.extras or {""}
    return [n for n in map(Requirement, needs) if not n.marker or any(n.marker.evaluate({"extra": e}) for e in extras)]


def test_what_the_requirements_require_is_pinned_too():
    "As far as it is installed here. torch pins its CUDA packages itself."
    pinned, queue, seen, missing = pins(), requirements(), set(), set()
    while queue:
        wanted = queue.pop()
        name = canonicalize_name(wanted.name)
        if (name, frozenset(wanted.extras)) in seen:
            continue
        seen.add((name, frozenset(wanted.extras)))
        if name not in pinned and not re.match(r"nvidia-|cuda-|triton", name):
            missing.add(name)
        queue += needed_by(wanted)
    assert missing == set() and len(seen) > 50


IMPORT_NAMES = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml", "open_clip": "open-clip-torch",
                "fontTools": "fonttools", "IPython": "ipython", "docutils": "sphinx", "timm": "open-clip-torch",
                "huggingface_hub": "open-clip-torch"}     # import -> what brings it, where that has another name


def test_what_is_imported_is_required():
    listed = [r for k, v in settings().items() if k.endswith("requirements") for r in v.split()]
    declared = {canonicalize_name(Requirement(r).name) for r in listed}
    top = set()
    for path in LIBRARY:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                top |= {a.name.partition(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                top.add(node.module.partition(".")[0])
    foreign = {n for n in top if n not in sys.stdlib_module_names and n != "mcl_repro"}
    assert {n for n in foreign if canonicalize_name(IMPORT_NAMES.get(n, n)) not in declared} == set()


def test_continuous_integration_runs_what_the_readme_says():
    ci, make = ROOT/".ci/run", (ROOT/"Makefile").read_text(encoding="utf-8")
    assert os.access(ci, os.X_OK) and re.search(r"^make test$", ci.read_text(encoding="utf-8"), re.M)
    assert "run: .ci/run" in (ROOT/".github/workflows/test.yml").read_text(encoding="utf-8")
    assert re.search(r"^test:.*\n\t@.*tests/run_all\.py", make, re.M)
    assert all(re.search(rf"^{v} \?=", make, re.M) for v in ("PAPER", "PROFILE", "DEVICE", "JOBS", "SEEDS"))
    command = ["make", "--dry-run", "test", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "tests/run_all.py" in done.stdout, done.stderr


@pytest.mark.parametrize("module", ["mcl_repro", "mcl_repro.dev.site", "mcl_repro.dev.publishing",
                                    "mcl_repro.dev.outputs"])
def test_what_make_calls_answers(module):
    assert f"-m {module} " in (ROOT/"Makefile").read_text(encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage:"), done.stderr


def test_data_files_are_packaged():
    "Every file of the package that is no code has an ending that `setup.py` takes along."
    kinds = ast.literal_eval(re.search(r"^DATA = (\(.*?\))", (ROOT/"setup.py").read_text(encoding="utf-8"), re.M)[1])
    files = [p for p in tracked() if p.is_relative_to(ROOT/"mcl_repro") and p.suffix != ".py" and p.name != "py.typed"]
    assert len(files) > 30 and [p.name for p in files if p.suffix[1:] not in kinds] == []


def test_the_manifest_is_found_from_anywhere(tmp_path, monkeypatch):
    from mcl_repro.data.registry import read_manifest
    monkeypatch.chdir(tmp_path)
    assert {"world", "flickr8k", "cc3m"} <= set(read_manifest())
    assert "data_manifest.yaml" in (ROOT/"MANIFEST.in").read_text(encoding="utf-8")
    assert (ROOT/"data_manifest.yaml").is_file()
