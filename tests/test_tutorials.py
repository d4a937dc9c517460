"""The tutorials: what each notebook under nbs/tutorials promises before it is run, and that a user's own data goes
through one of them.
"""
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
TUTORIALS = sorted((ROOT/"nbs/tutorials").glob("*.ipynb"))


def cells(path, kind):
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == kind]


def test_there_are_four():
    assert [p.stem for p in TUTORIALS] == ["clean_a_model", "own_method", "poisoned_data", "protect_photos"]


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_one_parameters_cell_of_plain_values_each_explained(path):
    from papermill.inspection import inspect_notebook
    tagged = [c for c in cells(path, "code") if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    found = inspect_notebook(str(path))
    assert {"pairs", "folder"} <= set(found) and all(p["help"] for p in found.values())
    assert all(p["default"] in ('""', '"banana"', "False") for p in found.values())     # nothing of this machine


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_exports_nothing_and_asserts_throughout(path):
    code = [c.source for c in cells(path, "code")]
    assert not any(re.search(r"^#\s*\|\s*(export|default_exp)", c, re.M) for c in code)
    asserting = sum("assert " in c or "test_fail(" in c for c in code)
    assert asserting >= len(code)/2, f"{asserting} of {len(code)} cells assert something"
    steps = [
        i
        for i, c in enumerate(nbformat.read(path, as_version=4).cells)
        if c.cell_type == "markdown" and re.search(r"^## \d", c.source, re.M)
    ]
    every = nbformat.read(path, as_version=4).cells
    for a, b in zip(steps, [*steps[1:], len(every)]):
        assert any("assert " in c.source or "test_fail(" in c.source for c in every[a:b] if c.cell_type == "code"), (
            every[a].source.split("\n")[0]
        )


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_links_to_other_tutorials_and_the_command_are_right(path):
    text = "\n".join(c.source for c in cells(path, "markdown"))
    for target in re.findall(r"\]\((\w+\.ipynb)\)", text):
        assert (path.parent/target).is_file(), target
    command, = re.findall(r"papermill nbs/tutorials/(\w+)\.ipynb", text)
    assert command == path.stem
    from papermill.inspection import inspect_notebook
    assert set(re.findall(r"-p (\w+)", text)) <= set(inspect_notebook(str(path)))


@pytest.mark.parametrize("name, given, says", [
    ("poisoned_data", dict(pairs="my.csv"), "give model="), ("protect_photos", dict(pairs="my.csv"), "give surrogate="),
    ("clean_a_model", dict(model="smoke-RN"), "give pairs="), ("own_method", dict(pairs="my.csv"), "trusted=, images= and model=")])
def test_what_is_missing_is_told_at_once(name, given, says):
    "Only the first two code cells are run: the parameters and what checks them."
    from mcl_repro.core.errors import SettingsError
    parameters, checks = [c.source for c in cells(ROOT/f"nbs/tutorials/{name}.ipynb", "code")][:2]
    scope = {}
    exec(parameters, scope)
    scope |= given
    with pytest.raises(SettingsError, match=says):
        exec(checks, scope)


def test_a_users_own_pairs_go_through_the_scan(tmp_path):
    "The notebook as it is, on a CSV with a broken file, and a checkpoint: no cell of the example may be in the way."
    from mcl_repro.model.clip import build_clip, save_clip
    save_clip(build_clip("smoke-RN"), tmp_path/"mine.safetensors")
    rng, lines = np.random.default_rng(0), ["image,caption"]
    for i in range(240):
        Image.fromarray(rng.integers(0, 255, (24, 40, 3), dtype=np.uint8)).save(tmp_path/f"{i}.jpg")
        lines.append(f"{i}.jpg,a photo of thing number {i}")
    (tmp_path/"7.jpg").write_bytes(b"")
    (tmp_path/"my.csv").write_text("\n".join(lines) + "\n")
    import papermill
    done = papermill.execute_notebook(
        str(ROOT / "nbs/tutorials/poisoned_data.ipynb"), str(tmp_path / "out.ipynb"),
        dict(pairs="my.csv", model="mine.safetensors", folder="kept"), cwd=str(tmp_path), progress_bar=False,
    )
    assert not any("exception" in str(c.metadata.get("papermill", {}).get("status")) for c in done.cells)
    results = tmp_path/"kept/results"
    assert {"scan.csv", "suspicious.csv", "scan.html", "CARD.md"} == {p.name for p in results.iterdir()}
    verdicts = [l.split(",")[1] for l in (results/"scan.csv").read_text().splitlines()[1:]]
    assert len(verdicts) == 240 and verdicts.count("unreadable") == 1
    assert not any("banana" in str(c.get("outputs", "")) for c in done.cells)           # nothing was planted
