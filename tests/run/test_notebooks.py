"Papers' notebooks: found by their parameters, which are checked; what of the library they use follows from imports."
import shutil
from pathlib import Path

import nbformat
import pytest
from paper_notebooks import STANDARD, write

import mcl_repro
from mcl_repro.core.errors import SettingsError
from mcl_repro.run import notebooks
from mcl_repro.run.notebooks import (
    check_parameters, exported_module, find_notebooks, library_key, notebook_modules, notebook_parameters, source_key,
    used_files, used_modules,
)

ROOT = Path(mcl_repro.__file__).parent.parent


# which there are, and their parameters

def test_papers_are_found_in_every_folder_in_reading_order(tmp_path):
    for name in ("baselines", "papers/mem", "ubt", "rooms/zoo/my_own", "rooms/alpha"):
        path = tmp_path/f"{name}.ipynb"
        write(path.parent, path.name, STANDARD)
    for name in ("tutorials/first", "results/old", ".hidden/x", "rooms/_draft"):
        path = tmp_path/f"{name}.ipynb"
        write(path.parent, path.name, STANDARD)
    write(tmp_path, "batch.ipynb", "tags = ['parameters']", tags=())
    (tmp_path/"broken.ipynb").write_text('no notebook, "parameters"')
    assert list(find_notebooks(tmp_path)) == ["ubt", "mem", "baselines", "alpha", "my_own"]


def test_the_papers_notebooks_have_their_parameters():
    "Every paper's notebook of this checkout has one parameters cell, with the standard names and types."
    found = find_notebooks(ROOT/"nbs")
    assert list(found) == ["ubt", "mem", "cleanclip", "cfbd", "baselines"]
    for name, path in found.items():
        known = notebook_parameters(path)
        check_parameters(name, known, notebooks.STANDARD)
        assert set(notebooks.STANDARD) <= set(known), name


@pytest.mark.parametrize("cell, says", [
    ("x = 1 +", "not Python"),
    ("import os", "not `name = literal`"),
    ("a = b = 1", "not `name = literal`"),
    ("x: int", "not `name = literal`"),
])
def test_a_parameters_cell_that_cannot_be_checked_is_refused(tmp_path, cell, says):
    write(tmp_path, "ubt.ipynb", cell)
    with pytest.raises(SettingsError, match=says):
        notebook_parameters(tmp_path/"ubt.ipynb")


def test_exactly_one_parameters_cell(tmp_path):
    write(tmp_path, "ubt.ipynb", STANDARD, tags=())
    with pytest.raises(SettingsError, match="has 0 cells tagged"):
        notebook_parameters(tmp_path/"ubt.ipynb")
    (tmp_path/"ubt.ipynb").write_text("no notebook")
    with pytest.raises(SettingsError, match="cannot be read as a notebook"):
        notebook_parameters(tmp_path/"ubt.ipynb")


def test_types_of_parameters():
    known = {"i": 1, "f": 1., "b": False, "s": "", "l": [], "d": {}, "n": None}
    check_parameters("x", known, {"i": 2, "f": 2, "b": True, "s": "a", "l": (1,), "d": {"a": 1}, "n": "any"})
    wrong = [("i", 1.5), ("i", True), ("f", "1"), ("f", False), ("b", 0), ("s", None), ("l", "a"), ("d", []),
             ("n", object())]
    for given in ({name: value} for name, value in wrong):
        with pytest.raises(SettingsError, match=f"parameter '{next(iter(given))}'"):
            check_parameters("x", known, given)


# what they use

@pytest.fixture
def library(tmp_path, monkeypatch):
    "A small library in the place of this one, with a notebook."
    files = {
        "__init__.py": "def __getattr__(name):\n    return {'scan': 'tools.scanning'}",
        "errors.py": "",
        "lab/__init__.py": "",
        "lab/store.py": "from .. import errors",
        "lab/profiles.yaml": "smoke: {}",
        "papers/__init__.py": "",
        "papers/ubt.py": "def work():\n    from ..lab.store import Store",
        "papers/printed/tables.yaml": "",
        "papers/look.css": "",
        "tools/__init__.py": "",
        "tools/scanning.py": "from mcl_repro.lab import store",
        "tools/limits.yaml": "",
        "deep/rooms/alone.py": "",
    }
    for name, text in files.items():
        path = tmp_path/"mcl_repro"/name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(notebooks, "_package", lambda: tmp_path/"mcl_repro")
    write(tmp_path, "ubt.ipynb", STANDARD, "#| default_exp papers.ubt", "%pip list\nx = ", "import torch")
    return tmp_path


def names(library, *modules):
    "The files that modules use, as seen from the library."
    return {p.relative_to(library/"mcl_repro").as_posix() for p in used_files(modules)}


def test_a_notebook_uses_what_its_module_imports_also_in_functions_and_the_data_beside(library):
    assert exported_module(library/"ubt.ipynb") == "mcl_repro.papers.ubt"
    assert names(library, *notebook_modules(library/"ubt.ipynb")) == {
        "__init__.py", "errors.py", "lab/__init__.py", "lab/store.py", "lab/profiles.yaml",
        "papers/__init__.py", "papers/ubt.py", "papers/printed/tables.yaml"}


def test_a_name_that_the_package_looks_up_leads_to_its_module(library):
    write(library, "tutorial.ipynb", STANDARD, "from mcl_repro import scan")
    assert "tools/scanning.py" in names(library, *notebook_modules(library/"tutorial.ipynb"))
    assert "tools/limits.yaml" in names(library, "mcl_repro.tools.scanning")


@pytest.mark.parametrize("file, counts", [
    ("errors.py", True), ("lab/store.py", True), ("lab/profiles.yaml", True), ("papers/printed/tables.yaml", True),
    ("papers/look.css", False), ("tools/scanning.py", False), ("tools/limits.yaml", False),
    ("deep/rooms/alone.py", False),
])
def test_the_key_follows_what_is_used_and_nothing_else(library, file, counts):
    before = library_key(library/"ubt.ipynb")
    with open(library/"mcl_repro"/file, "a") as f:
        f.write("\n# changed\n")
    assert (library_key(library/"ubt.ipynb") != before) == counts
    assert library_key(library/"ubt.ipynb", ["mcl_repro.tools.scanning"]) != before


def test_the_key_is_the_same_in_another_folder(library, tmp_path_factory, monkeypatch):
    before = library_key(library/"ubt.ipynb")
    other = tmp_path_factory.mktemp("other")/"mcl_repro"
    shutil.copytree(library/"mcl_repro", other)
    monkeypatch.setattr(notebooks, "_package", lambda: other)
    assert library_key(library/"ubt.ipynb") == before


def test_stored_outputs_are_not_source(tmp_path):
    write(tmp_path, "a.ipynb", STANDARD, "6 * 7")
    before = source_key(tmp_path/"a.ipynb")
    nb = nbformat.read(tmp_path/"a.ipynb", as_version=4)
    nb.cells[1].outputs = [nbformat.v4.new_output("stream", text="42")]
    nbformat.write(nb, tmp_path/"a.ipynb")
    assert source_key(tmp_path/"a.ipynb") == before
    nb.cells[1].source = "6 * 8"
    nbformat.write(nb, tmp_path/"a.ipynb")
    assert source_key(tmp_path/"a.ipynb") != before


@pytest.mark.parametrize("paper", ["ubt", "mem", "cleanclip", "cfbd", "baselines"])
def test_no_papers_notebook_uses_what_runs_or_publishes_it(paper):
    used = used_modules(notebook_modules(find_notebooks(ROOT/"nbs")[paper]))
    rooms = {".".join(name.split(".")[1:2]) for name in used}
    assert {"lab", "papers", "report", "data"} <= rooms
    assert not {"tools", "run", "dev", "cli"} & rooms and "mcl_repro.report.archive" not in used
