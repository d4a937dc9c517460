"Where commands write: nothing is overwritten silently, what cannot be written is told first, output may be cut off."
import contextlib
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mcl_repro.cli import main as cli
from mcl_repro.cli.main import main
from mcl_repro.core.errors import foreseen
from mcl_repro.tools import folders, scanning

SMALL = ("--model", "smoke-RN", "--device", "cpu")


def call(*words):
    "Exit code, stdout and stderr."
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()


def process(line, **env):
    "The same as a process of its own, called by a shell; {} is the command."
    line = line.replace("{}", f'"{sys.executable}" -m mcl_repro')
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONPATH": str(root), **env}
    return subprocess.run(line, shell=True, capture_output=True, text=True, env=env, encoding="utf-8", errors="replace")


def pairs(folder, shade, count=100):
    "A list called pairs.csv of a folder."
    folder.mkdir(parents=True)
    rng, lines = np.random.default_rng(shade), []
    for k in range(count):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder/f"{k}.png")
        lines.append(f"{k}.png,picture {k} of shade {shade} and number {rng.integers(1e6)}\n")
    (folder/"pairs.csv").write_text("image,caption\n" + "".join(lines), encoding="utf-8")
    return folder/"pairs.csv"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(folder):
    "Name -> content of the files of a folder."
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file()}


def test_two_lists_of_one_name_have_a_folder_each_and_the_same_list_its_own_again(here):
    pairs(here/"a", 1), pairs(here/"b", 2), pairs(here/"other/a", 3)
    tables = [json.loads(call("scan", source, *SMALL, "--json")[1])["files"]["table"]
              for source in ("a/pairs.csv", "b/pairs.csv", "other/a/pairs.csv", here/"a/pairs.csv")]
    assert tables == ["scan-a-pairs-csv/scan.csv", "scan-b-pairs-csv/scan.csv", "scan-a-pairs-csv-2/scan.csv",
                      "scan-a-pairs-csv/scan.csv"]
    first = written("scan-a-pairs-csv")
    code, _, err = call("scan", "b/pairs.csv", *SMALL, "--out", "scan-a-pairs-csv")
    assert code == 1 and err == ("error: --out scan-a-pairs-csv holds the results of scan for a/pairs.csv, smoke-RN; "
                                 "choose another name, or remove it\n")
    code, _, err = call("scan", "a/pairs.csv", "--model", "smoke-ViT", "--device", "cpu", "--out", "scan-a-pairs-csv")
    assert code == 1 and "holds the results of scan for a/pairs.csv, smoke-RN" in err
    code, _, err = call("measure", "--pairs", "a/pairs.csv", *SMALL, "--out", "scan-a-pairs-csv")
    assert code == 1 and "holds the results of scan" in err
    assert written("scan-a-pairs-csv") == first
    assert call("scan", "a/pairs.csv", *SMALL, "--out", "scan-a-pairs-csv")[0] in (0, 3)
    assert written("scan-a-pairs-csv") == first and str(here) not in first[folders.NOTE].decode()


def test_names_in_other_scripts_do_not_become_one(here):
    names = ["照片.csv", "图像.csv", "фото.csv", "x" * 200 + ".csv", "x" * 201 + ".csv", "a. .csv", "a. ..csv"]
    assert len({folders.folder_name("scan", name) for name in names[:5]}) == 5
    for name in names:
        made = folders.made_for("scan", pairs=name)
        place = folders.results_place(None, made, folders.folder_name("scan", name))
        with folders.claimed(place, made):
            (place/"scan.csv").touch()
    assert len(list(here.iterdir())) == len(names)
    assert all(len(p.name.encode()) < 200 and not p.name.endswith((".", " ")) for p in here.iterdir())


def test_results_without_a_note_are_somebody_elses(here):
    pairs(here/"a", 1)
    for name in ("CARD.md", "scan.csv"):
        (here/"mine").mkdir()
        (here/"mine"/name).write_text("mine")
        code, _, err = call("scan", "a/pairs.csv", *SMALL, "--out", "mine")
        assert code == 1 and f"--out mine holds other things ({name})" in err
        assert written("mine") == {name: b"mine"}
        shutil.rmtree(here/"mine")


def test_a_second_attack_gets_a_folder_of_its_own_and_no_note(here):
    words = ("attack", "world:train:100", "--target", "banana", "--count", "2", "--image-size", "32", "--json")
    cards = [json.loads(call(*words)[1])["files"]["card"] for _ in range(2)]
    assert cards == ["attack-world-train-100/CARD.md", "attack-world-train-100-2/CARD.md"]
    assert sorted(os.listdir("attack-world-train-100")) == ["CARD.md", "images", "pairs.csv", "truth"]
    assert call(*words, "--out", "attack-world-train-100")[0] == 1


def test_a_training_overwrites_its_own_weights_and_no_others(here):
    words = ("--model", "smoke-RN", "--epochs", "1", "--batch-size", "16", "--out", "w.safetensors")
    assert call("train", "world:train:32", *words)[0] == 0
    first = (here/"w.safetensors").read_bytes()
    assert call("train", "world:train:32", *words)[0] == 0 and (here/"w.safetensors").read_bytes() == first
    for source, model in (("world:train:48", "smoke-RN"), ("world:train:32", "w.safetensors")):
        code, _, err = call("train", source, "--model", model, *words[2:])
        assert code == 1 and "--out w.safetensors holds the results of train for world:train:32, smoke-RN" in err
    (here/"w.made_for.json").unlink()
    code, _, err = call("train", "world:train:32", *words)
    assert code == 1 and "w.safetensors is there already, and no note says what it was made of" in err
    assert (here/"w.safetensors").read_bytes() == first


def test_failed_work_leaves_no_note_in_a_folder_that_was_there(here):
    (here/"mine").mkdir()
    assert call("scan", "world:train:4", *SMALL, "--out", "mine")[0] == 1
    assert call("protect", "world:train:8", *SMALL, "--format", "csv", "--set", "no=1", "--out", "mine/new")[0] == 1
    assert list((here/"mine").iterdir()) == []


@pytest.mark.parametrize("words", [
    ("scan", "world:train:240", *SMALL), ("repair", "world:train:64", *SMALL, "--method", "finetune"),
    ("protect", "world:train:8", *SMALL), ("attack", "world:train:64", "--target", "banana", "--count", "1"),
    ("measure", "--pairs", "world:train:8", *SMALL), ("train", "world:train:64", *SMALL),
])
def test_a_folder_that_may_not_be_written_is_told_before_any_work(here, monkeypatch, words):
    (here/"shut").mkdir()
    real = tempfile.TemporaryFile

    def refuse(*args, dir=None, **more):
        "As a read-only disk does."
        if Path(dir).name == "shut":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(dir))
        return real(*args, dir=dir, **more)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    out = "shut/new/x.safetensors" if words[0] == "train" else "shut/new"
    code, _, err = call(*words, "--out", out)
    assert code == 1 and re.fullmatch(rf"error: --out {out}: .*shut cannot be written \(Read-only.*\n", err), err
    assert list((here/"shut").iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="permissions do not bind root")
def test_a_folder_without_permission(here):
    (here/"shut").mkdir(mode=0o555)
    code, _, err = call("scan", "world:train:240", *SMALL, "--out", "shut/new")
    assert code == 1 and "cannot be written (Permission denied); choose another place" in err


# ---- what Python, the disk and the memory refuse

@pytest.mark.parametrize("problem, says", [
    (PermissionError(errno.EACCES, "Permission denied", "a"), "a: Permission denied; mend the permissions"),
    (OSError(errno.ENOSPC, "No space left on device", "a"), "make room"),
    (OSError(errno.EMFILE, "Too many open files"), "ulimit"),
    (OSError(errno.ENAMETOOLONG, "File name too long", "a"), "shorter name"),
    (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), "a file stands where a folder is wanted"),
    (IsADirectoryError(errno.EISDIR, "Is a directory", "a"), "name a file"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "lower the batch size"),
    (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "the connection"),
    (MemoryError("Unable to allocate 8 TiB"), "lower the batch size"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"), "lower the batch size"),
    (RuntimeError("CUDA out of memory. Tried to allocate"), "--device cpu"),
    (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
    (ValueError("embedded null byte"), "null character"),
    (UnicodeEncodeError("utf-8", "\udce9", 0, 1, "surrogates not allowed"), r"'\udce9'"),
])
def test_what_python_refuses_is_one_line_with_a_remedy(here, monkeypatch, problem, says):
    def fail(*args, **more):
        raise problem
    monkeypatch.setattr(scanning, "scan", fail)
    code, out, err = call("scan", "world:train:240", *SMALL, "--json")
    assert code == 1 and says in err and err.startswith("error: ") and err.count("\n") == 1
    assert json.loads(out) == dict(command="scan", error=err[7:-1])
    assert foreseen(problem) == err[7:-1] and list(here.iterdir()) == []


def test_what_nobody_foresaw_goes_into_a_file_without_private_paths(here, monkeypatch):
    def fail(*args, **more):
        raise KeyError("page")
    monkeypatch.setattr(scanning, "scan", fail)
    code, _, err = call("scan", here/"a.csv", *SMALL)
    path = Path(err.split()[-1])
    text = path.read_text(encoding="utf-8")
    path.unlink()
    assert code == 1 and err.startswith("error: this should not have happened: KeyError: 'page'; please report it")
    assert "Traceback" in text and "in fail" in text and str(here) not in text and err.count("\n") == 1
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", lambda *a, **k: open(here/"none"/"x"))
    assert call("scan", "a.csv", *SMALL)[2].endswith("please report it, with what MCL_REPRO_DEBUG=1 shows\n")
    monkeypatch.setenv("MCL_REPRO_DEBUG", "1")
    with pytest.raises(KeyError):
        call("scan", "a.csv", *SMALL)


def test_an_error_in_a_thread_and_one_while_tidying_up_are_lines(here, monkeypatch):
    class Untidy:
        def __del__(self):
            raise ValueError("left over")

    def lose(*args, **more):
        thread = threading.Thread(target=lambda: 1/0, name="reader")
        thread.start()
        thread.join()
        del [Untidy()][0]
        raise KeyboardInterrupt

    before = threading.excepthook, sys.unraisablehook
    monkeypatch.setattr(scanning, "scan", lose)
    code, out, err = call("scan", "world:train:240", *SMALL)
    assert code == 130 and "Traceback" not in err and (threading.excepthook, sys.unraisablehook) == before
    assert "warning: ZeroDivisionError in reader: division by zero\n" in err
    assert "warning: ValueError while tidying up: left over\n" in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full disk is a device of Linux")
def test_output_that_cannot_be_written_is_no_traceback():
    full = process("{} settings cleanclip > /dev/full")
    assert full.returncode == 2 and full.stderr == (
        "error: No space left on device; make room, or choose a place on another disk\n")
    closed = process("{} settings cleanclip >&-")
    assert (closed.returncode, closed.stderr) == (0, "")
    silent = process("{} settings nobody 2>&-")
    assert (silent.returncode, silent.stdout) == (2, "")
    both = process("{} settings cleanclip >&- 2>&-")
    assert both.returncode == 0


def test_characters_that_a_terminal_does_not_know_are_no_traceback():
    done = process("{} data show nobody-é", PYTHONIOENCODING="ascii")
    assert done.returncode == 2 and r"nobody-\xe9" in done.stderr and "Traceback" not in done.stderr
    done = process("{} scan nobody-é.csv --model smoke-RN --json", PYTHONIOENCODING="ascii:strict")
    assert done.returncode == 1 and "nobody-é.csv" in json.loads(done.stdout)["error"]
    done = process(r"""{} scan "$(printf 'caf\351.csv')" --model smoke-RN""")
    assert done.returncode == 1 and r"is not UTF-8: 'caf\udce9.csv'" in done.stderr


def test_a_stopped_command_with_json_says_so(here, monkeypatch):
    def stop(*args, **more):
        raise KeyboardInterrupt
    monkeypatch.setattr(cli, "_answer", stop)
    code, out, err = call("scan", "a.csv", *SMALL, "--json")
    assert code == 130 and json.loads(out)["error"].startswith("stopped; what is finished is kept")
