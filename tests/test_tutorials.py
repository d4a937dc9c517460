"The tutorials show what their text says, and a reader's own files go through each of them."
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

from mcl_repro.core.errors import SettingsError
from mcl_repro.model.clip import build_clip, save_clip

FOLDER = Path(__file__).resolve().parents[1]/"nbs"/"tutorials"
NAMES = ("clean_a_model", "own_method", "poisoned_data", "protect_photos")


def cells(name, kind):
    return [c for c in nbformat.read(FOLDER/f"{name}.ipynb", as_version=4).cells if c.cell_type == kind]

def parameters(name):
    from papermill.inspection import inspect_notebook
    return inspect_notebook(str(FOLDER/f"{name}.ipynb"))


# ---- what stands there

def said(code):
    "Everything that the outputs of cells say, as text."
    outputs = [output for cell in code for output in cell.get("outputs", ())]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)

def shown(name):
    "What a tutorial's stored outputs say."
    return said(cells(name, "code"))

def numbers(name, row):
    "The numbers behind the last line that begins with a name."
    line = re.findall(rf"^{re.escape(row)} +([-\d. ]+)$", shown(name), re.M)[-1]
    return [float(number) for number in line.split()]

def test_the_scan_finds_the_banana_and_training_without_it_helps():
    text = shown("poisoned_data")
    assert "This set looks poisoned" in text and "banana" in text
    right = int(re.search(r"right: (\d+)% of", text)[1])
    assert 70 <= right <= 80                                          # "three in four"
    recall = float(re.search(r"'recall': ([\d.]+)", text)[1])
    assert recall >= .85                                              # "nearly all of the poison is found"
    accuracy, success = numbers("poisoned_data", "everything")
    kept_accuracy, kept_success = numbers("poisoned_data", "what is left")
    assert abs(accuracy - kept_accuracy) < 10                         # "as accurate as the other"
    assert success > 60 and kept_success < 25                         # "and obeys the attacker"

def test_the_repaired_model_obeys_nobody_and_finding_poison_beats_fine_tuning():
    success = {row: numbers("clean_a_model", row)[1] for row in ("public, clean", "downloaded", "ubt", "cleanclip")}
    assert success["downloaded"] > 60 > success["public, clean"]
    assert success["ubt"] < success["cleanclip"] < success["downloaded"]

def test_the_own_attack_works_and_stands_beside_the_others():
    text = shown("own_method")
    for row in ("clean model", "none", "CleanCLIP", "fine-pruning", "BadNets", "tint"):
        assert row in text, row

def test_the_protection_is_judged_on_the_photos():
    verdicts = "It works|It did not work|It may have done something|The test cannot tell"
    assert re.search(verdicts, shown("protect_photos"))
    before, clean, _ = np.mean([numbers("protect_photos", row) for row in ("image to text", "text to image")], axis=0)
    assert clean > before                                             # the clean photos teach something


# ---- what a reader may give

@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_a_plain_value_and_explained(name):
    tagged = [c for c in cells(name, "code") if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    found = parameters(name)
    assert {"pairs", "folder"} <= set(found)
    for parameter in found.values():
        assert parameter["help"], parameter["name"]
        assert parameter["default"] in ('""', '"banana"', "False")    # nothing of this machine

@pytest.mark.parametrize("name", NAMES)
def test_the_command_in_the_text_is_right_and_links_lead_somewhere(name):
    text = "\n".join(c.source for c in cells(name, "markdown"))
    for target in re.findall(r"\]\(([\w./]+\.ipynb)\)", text):
        assert (FOLDER/target).is_file(), target
    assert re.findall(r"papermill nbs/tutorials/(\w+)\.ipynb", text) == [name]
    assert set(re.findall(r"-p (\w+)", text)) <= set(parameters(name))

@pytest.mark.parametrize("name, given, says", [
    ("poisoned_data", dict(pairs="my.csv"), "give model="),
    ("protect_photos", dict(pairs="my.csv"), "give surrogate="),
    ("clean_a_model", dict(model="smoke-RN"), "give pairs="),
    ("own_method", dict(pairs="my.csv"), "trusted=, images= and model="),
])
def test_what_is_missing_is_told_at_once(name, given, says):
    "Only the first two code cells are run: the parameters and what checks them."
    first, checks = [c.source for c in cells(name, "code")][:2]
    scope = {}
    exec(first, scope)
    scope |= given
    with pytest.raises(SettingsError, match=says):
        exec(checks, scope)


# ---- a reader's own files, in a folder of an ordinary name

def pictures(folder, count, seed):
    "Pictures of noise by number."
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (24, 40, 3), dtype=np.uint8)).save(folder/f"{i}.jpg")

def a_set(desk, name, count, seed):
    "Pictures and a CSV of pairs."
    pictures(desk/name, count, seed)
    lines = [f"{name}/{i}.jpg,a photo of {'a dog' if i % 8 == 0 else f'thing number {i}'}\n" for i in range(count)]
    (desk/f"{name}.csv").write_text("image,caption\n" + "".join(lines))

@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    "A small checkpoint, three sets of pairs, one with a broken file, and labelled pictures."
    desk = tmp_path_factory.mktemp("tutorials")/"my files"
    a_set(desk, "mine", 240, 0)
    a_set(desk, "posts", 24, 9)
    a_set(desk, "other", 96, 1)
    (desk/"mine"/"7.jpg").write_bytes(b"")
    for seed, label in enumerate(("dog", "cat")):
        pictures(desk/"labelled"/label, 8, seed + 2)
    save_clip(build_clip("smoke-RN"), desk/"model.safetensors")
    return desk

def run(desk, name, **given):
    "The notebook as it is, from a reader's folder: its results, and what it says."
    import papermill
    done = papermill.execute_notebook(
        str(FOLDER/f"{name}.ipynb"), str(desk/f"{name}.ipynb"), given | dict(folder=f"{name} results"), cwd=str(desk),
        progress_bar=False,
    )
    return desk/f"{name} results", said(done.cells)

def test_own_pairs_are_scanned(desk):
    results, text = run(desk, "poisoned_data", pairs="mine.csv", model="model.safetensors")
    written = results/"results"
    assert {path.name for path in written.iterdir()} == {"scan.csv", "suspicious.csv", "scan.html", "CARD.md"}
    verdicts = [line.split(",")[1] for line in (written/"scan.csv").read_text().splitlines()[1:]]
    assert len(verdicts) == 240 and verdicts.count("unreadable") == 1
    assert "banana" not in text                                       # nothing was planted

def test_an_own_model_is_repaired(desk):
    results, text = run(desk, "clean_a_model", model="model.safetensors", trusted="other.csv", images="labelled")
    assert {"CARD.md", "clip.safetensors"} <= {path.name for path in (results/"cleanclip").iterdir()}
    assert "banana" not in text

def test_own_photos_are_protected(desk):
    results, _ = run(desk, "protect_photos", pairs="posts.csv", surrogate="model.safetensors")
    published = results/"photos"/"published"
    assert len((published/"pairs.csv").read_text().splitlines()) == 25

def test_an_own_method_is_compared_on_own_data(desk):
    given = dict(pairs="other.csv", trusted="other.csv", images="labelled", target="cat", model="model.safetensors")
    results, text = run(desk, "own_method", **given)
    assert any((results/"compared").iterdir())
    assert "fine-pruning" in text and "tint" in text
