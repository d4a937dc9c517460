"""How data are read can be said in every command: columns, separators, splits, folders, names of classes."""
import json

import pytest

from data_files import encoded
from mcl_repro.cli.main import main


@pytest.fixture
def place(tmp_path, monkeypatch):
    "Eight pictures in a folder that is worked in."
    monkeypatch.setenv("MCL_REPRO_DATA", str(tmp_path/"home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path/"photos").mkdir()
    for k in range(8):
        (tmp_path/"photos"/f"{k}.png").write_bytes(encoded(k))
    return tmp_path

def told(capsys, *words):
    "Exit code, the JSON object, and what went to stderr."
    code = main([*words, "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out.strip() else {}, err

ROWS = "".join(f"{k}.png*caption {k}*{k % 2}\n" for k in range(8))

@pytest.mark.parametrize("words", [
    ("measure", "--pairs", "list.csv"), ("scan", "list.csv"), ("train", "list.csv", "--out", "m.safetensors"),
    ("protect", "list.csv"), ("repair", "list.csv", "--method", "finetune"),
    ("attack", "list.csv", "--target", "banana", "--count", "1"),
])
def test_every_command_takes_the_options_of_reading(place, capsys, words):
    (place/"list.csv").write_text("view*words*kind\n" + ROWS)
    model = () if words[0] == "attack" else ("--model", "smoke-RN")
    size = ("--image-size", "32") if words[0] == "attack" else ()
    reading = ("--image-key", "view", "--caption-key", "words", "--separator", "*", "--root", "photos")
    few = ("--batch-size", "4") if words[0] == "train" else ()
    code, _, err = told(capsys, *words, *model, *size, *few, "--dry-run")
    assert code == 1 and "choose with" in err
    code, found, err = told(capsys, *words, *model, *size, *few, *reading, "--dry-run")
    few_told = "too few" in err or "at least" in err          # a scan or a repair of eight pairs
    assert code == 0 and found["dry_run"] or few_told, err

def test_an_option_that_nothing_is_read_with_is_refused(place, capsys):
    (place/"list.csv").write_text("image,caption\n" + "".join(f"photos/{k}.png,c {k}\n" for k in range(8)))
    code, _, err = told(capsys, "measure", "--pairs", "list.csv", "--model", "smoke-RN", "--classnames", "x.txt")
    assert code == 1 and "--classnames: no data of this call are read with it" in err

def test_names_of_classes_and_lists_without_header(place, capsys):
    (place/"labels.txt").write_text("".join(f"{k}.png|{1 + k % 2}\n" for k in range(8)))
    (place/"names.txt").write_text("cat\ndog\n")
    code, found, err = told(capsys, "measure", "--images", "labels.txt", "--model", "smoke-RN", "--classnames",
                            "names.txt", "--option", "header=false")
    assert code == 0, err
    assert "images: classes are numbered from 1 to 2." in found["notes"]
    assert any("pictures were found in photos" in note for note in found["notes"])

def test_what_was_left_out_is_counted_in_json_and_stands_in_the_table(place, capsys):
    rows = [f"photos/{k % 8}.png,caption {k}\n" for k in range(96)] + ["gone.png,a\n", "photos/1.png,\n"]
    (place/"list.csv").write_text("image,caption\n" + "".join(rows))
    code, found, err = told(capsys, "scan", "list.csv", "--model", "smoke-RN", "--tolerance", "0.05", "--out", "s")
    assert code in (0, 3), err
    assert found["unreadable"] == 2 and any("2 of 98 were left out" in note for note in found["notes"])
    table = (place/"s"/"scan.csv").read_text()
    assert table.count(",unreadable,") == 2 and "image gone.png is not in" in table and "the caption is empty" in table
    code, _, err = told(capsys, "scan", "list.csv", "--model", "smoke-RN", "--out", "t")
    assert code == 1 and "2 of 98 rows cannot be used" in err and "(--tolerance 0.03)" in err

def test_data_add_takes_values_as_typed_and_says_what_it_left_out(place, capsys):
    (place/"set").mkdir()
    rows = [f"{k}.png|{k}: a, b\n" for k in range(8)] + ["gone.png|x\n"]
    (place/"set"/"l.txt").write_text("view|words\n" + "".join(rows))
    for k in range(8):
        (place/"set"/f"{k}.png").write_bytes(encoded(k))
    code = main(["data", "add", "mine", "set", "--format", "csv", "--option", "path=l.txt", "--option", "sep=|",
                 "--option", "image=view", "--option", "caption=words", "--tolerance", "0.2"])
    out, err = capsys.readouterr()
    assert code == 0 and "mine:all (8 images, 8 pairs)" in out
    assert "note: mine:all: 1 rows were left out, first" in err
    code, found, err = told(capsys, "measure", "--pairs", "mine:all", "--model", "smoke-RN", "--tolerance", "0.2")
    assert code == 0 and any("1 of 9 were left out" in note for note in found["notes"]), err
