"""Whatever a user gives, a command answers with an exit code and one line: no traceback, nothing that nobody foresaw.

Odd inputs of many kinds go through every command that reads data, odd values through every option, and hypothesis puts
words of both together that nobody would.
"""
import contextlib
import io
import json
import os
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from mcl_repro.cli.main import main

DEEP = "[" * 100_000


def pictures(folder, count=6):
    "Pictures of a few pixels, and a good list of them."
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(folder/f"{k}.png")
    lines = [f"{k}.png,picture number {k}\n" for k in range(count)]
    (folder/"pairs.csv").write_text("image,caption\n" + "".join(lines), encoding="utf-8")
    return folder


TEXTS = {   # name -> content
    "empty.csv": b"",
    "blank.csv": b"\n\n\n",
    "rubbish.csv": bytes(range(256)) * 20,
    "nul.csv": b"image,caption\n0\0.png,a\n",
    "utf16.csv": "image,caption\n0.png,a\n".encode("utf-16"),
    "latin1.csv": "image,caption\n0.png,caf\xe9\n".encode("latin-1"),
    "head.csv": b"image,caption\n",
    "nocolumns.csv": b"a,b\n1,2\n",
    "twice.csv": b"image,image,caption\n0.png,0.png,a\n",
    "short.csv": b"image,caption\n0.png\n",
    "quote.csv": b'image,caption\n0.png,"a\n',
    "missing.csv": b"image,caption\nnone.png,a\n",
    "zero.csv": b"image,caption\nzero.png,a\nzero.png,b\n",
    "cut.csv": b"image,caption\ncut.png,a\ncut.png,b\n",
    "folder.csv": b"image,caption\ndeep.csv,a\n",
    "long.csv": b"image,caption\n" + b"x" * 5000 + b".png,a\n",
    "bars.txt": b"0.png| 0| a\n",
    "one.json": b"1",
    "null.json": b"null",
    "list.json": b"[1, 2, 3]",
    "nested.json": b'{"images": [[]], "annotations": {}}',
    "coco.json": b'{"images": [{"id": 1}], "annotations": [{"image_id": 1}]}',
    "karpathy.json": b'{"images": [{"filename": 3, "sentences": "no"}]}',
    "deep.json": DEEP.encode(),
    "object.json": b'{"0.png": "a"}',
    "cut.json": b'{"images": [',
    "lines.jsonl": b'{"image": "0.png"}\n[]\n3\n',
    "rubbish.json": bytes(range(256)),
    "rubbish.parquet": b"PAR1" + bytes(100),
    "rubbish.tar": bytes(range(256)) * 4,
    "rubbish.tar.gz": b"\x1f\x8b" + bytes(60),
    "rubbish.zip": b"PK\x03\x04" + bytes(50),
    "rubbish.safetensors": bytes(range(256)),
    "empty.safetensors": b"",
    "huge.safetensors": b"\xff" * 8 + b"{}",
    "rubbish.pt": b"\x80\x02" + bytes(30),
    "rubbish.yaml": b"a: [b\n  - : :",
    "we{ir}d[0]*?%#.csv": b"image,caption\n0.png,a\n",
    "a:b.csv": b"image,caption\n0.png,a\n",
    "\u7167\u7247.csv": b"image,caption\n0.png,a\n",
}

SOURCES = [
    *TEXTS, "nowhere.csv", "nowhere", ".", "..", "empty", "classes", "deep.csv", "cut.tar", "odd.tar", "odd.zip",
    "pairs.csv/below", "link.csv", "loop.csv", "x" * 300, "world", "world:", ":", "::", "world:train:0",
    "world:train:-1", "world:train:x", "world:train:" + "9" * 30, "world:nosplit", "world:nosplit:3", "x:y:z:w",
    ":train",
    "nobody:train", "flickr8k:train", "cc3m:train:5", "C:\\data\\pairs.csv", "http://nowhere.invalid/pairs.csv",
    "~nobody/x", "{0..9}.tar", "{", "[", "*.tar", "-", "/dev/null", "/", "a\nb", " x ",
]

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with everything that is odd, in which commands are called."
    folder = pictures(tmp_path_factory.mktemp("odd"))
    for name, content in TEXTS.items():
        (folder/name).write_bytes(content)
    for name in ("empty", "deep.csv", "classes/a", "classes/b", "x.safetensors"):
        (folder/name).mkdir(parents=True)
    (folder/"zero.png").write_bytes(b"")
    (folder/"cut.png").write_bytes((folder/"0.png").read_bytes()[:60])
    (folder/"classes/a/0.png").write_bytes(b"")
    (folder/"link.csv").symlink_to("gone.csv")
    (folder/"loop.csv").symlink_to("loop.csv")
    with tarfile.open(folder/"odd.tar", "w") as tar:
        for name in ("0.png", "cut.json", "pairs.csv"):
            tar.add(folder/name, name)
    (folder/"cut.tar").write_bytes((folder/"odd.tar").read_bytes()[:700])
    with zipfile.ZipFile(folder/"odd.zip", "w") as archive:
        archive.write(folder/"pairs.csv", "../pairs.csv")
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        m.setenv("MCL_REPRO_DATA", str(folder/"registry"))
        m.setenv("HF_HUB_OFFLINE", "1")
        m.setattr(warnings, "showwarning", warnings.showwarning)
        yield folder


def call(*words):
    "Exit code, stdout and stderr."
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(word) for word in words])
        except SystemExit as leaves:     # of --help
            code = leaves.code
    return code, out.getvalue(), err.getvalue()


def problem(words, names=()):
    "What is wrong with the answer to a call; '' where nothing is."
    code, out, err = call(*words)
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    if code not in (0, 1, 2, 3):
        return f"exit code {code}: {err[-300:]}"
    if "Traceback" in out + err:
        return f"traceback: {err[-300:]}"
    if any("should not have happened" in line for line in errors):
        return errors[0][:300]
    if code in (1, 2) and (len(errors) != 1 or err.splitlines()[-1] != errors[0]):
        return f"{len(errors)} lines of errors with code {code}: {err[-300:]}"
    if code in (1, 2) and len(errors[0]) > 1000:
        return f"a line of {len(errors[0])} characters: {errors[0][:200]}"
    if code in (1, 2) and names and not any(name in errors[0] for name in names):
        return f"names none of {names}: {errors[0][:300]}"
    if "--json" in words and code in (1, 2) and words[0] != "data":
        told = json.loads(out)
        if told != dict(command=words[0], error=errors[0].removeprefix("error: ")):
            return f"--json says {out[:200]}"
    return ""


def told_as(source):
    "How an error may name a source: as it was given, its last part, or what is left of it in one line."
    ways = {source, Path(source).name, " ".join(source.split()), source.partition(":")[0], Path(source).suffix}
    if source in ("-", "/", "*.tar", ".", "..", "empty", "classes"):
        ways |= {os.getcwd(), Path(os.getcwd()).name, "no pictures", "classes", "captions"}
    usual = {"pairs", "images", "--", ".png", "unknown paper", "there is no run"}
    return {way for way in ways if way} | {repr(source)[1:-1], source[:40]} | usual


FEW = [
    "empty.csv", "rubbish.csv", "utf16.csv", "zero.csv", "folder.csv", "list.json", "deep.json", "rubbish.tar",
    "rubbish.safetensors", "rubbish.pt", "nowhere.csv", "empty", "pairs.csv/below", "link.csv", "x" * 300, "world:",
    ":", "world:train:-1", "nobody:train", "{", "/dev/null",
]
SMALL = ("--model", "smoke-RN", "--device", "cpu")
READ = {     # command -> words with the source in the place of PAIRS
    "scan": ("scan", "PAIRS", *SMALL, "--out", "out/scan"),
    "attack": ("attack", "PAIRS", "--target", "banana", "--count", "1", "--image-size", "16", "--out", "out/attack"),
    "protect": ("protect", "PAIRS", *SMALL, "--out", "out/protect", "--recipe", "epochs=1", "--set", "noise_steps=1",
                "--set", "candidates=2"),
    "repair": ("repair", "PAIRS", *SMALL, "--method", "finetune", "--recipe", "epochs=1", "--out", "out/repair"),
    "train": ("train", "PAIRS", *SMALL, "--epochs", "1", "--batch-size", "2", "--out", "out/t.safetensors"),
    "measure pairs": ("measure", "--pairs", "PAIRS", *SMALL),
    "measure images": ("measure", "--images", "PAIRS", *SMALL),
    "measure attack": ("measure", "--images", "world:zeroshot_test:4", "--attack", "PAIRS", "--target", "banana",
                       *SMALL),
    "scan truth": ("scan", "world:train:4", "--truth", "PAIRS", *SMALL),
    "scan trusted": ("scan", "world:train:120", "--method", "cfbd", "--trusted", "PAIRS", *SMALL, "--dry-run"),
    "measure model": ("measure", "--pairs", "world:train:4", "--device", "cpu", "--model", "PAIRS"),
    "measure weights": ("measure", "--pairs", "world:train:4", *SMALL, "--pretrained", "PAIRS"),
    "data add": ("data", "add", "mine", "PAIRS"),
    "data show": ("data", "show", "PAIRS"),
    "data verify": ("data", "verify", "PAIRS"),
    "data fetch": ("data", "fetch", "PAIRS"),
    "data links": ("data", "links", "PAIRS"),
    "data faces": ("data", "faces", "PAIRS", "--out", "out/faces"),
    "data cc3m": ("data", "cc3m", "PAIRS", "--out", "out/cc3m", "--print"),
    "data ids": ("data", "ids", "PAIRS", "5"),
    "data croissant": ("data", "croissant", "PAIRS"),
    "report": ("report", "--runs", "PAIRS"),
    "status": ("status", "--runs", "PAIRS"),
    "clean": ("clean", "--runs", "PAIRS"),
    "preconditions": ("preconditions", "--runs", "PAIRS"),
    "claims": ("claims", "--runs", "PAIRS"),
    "publish": ("publish", "--runs", "empty", "--notebooks", "PAIRS"),
    "run": ("run", "ubt", "--profile", "smoke", "--notebooks", "PAIRS", "--runs", "out/runs"),
    "plan": ("plan", "ubt", "--profile", "smoke", "--no-calibration", "--notebooks", "PAIRS", "--runs", "out/runs"),
}
EVERY = ("scan", "measure images", "data add")       # these meet every source, the others a few
DRY = ("scan", "attack", "repair", "train")


def few_or_all(command, dry):
    "The sources that a command meets, each with a number."
    return enumerate(SOURCES if command in EVERY and (dry or command not in DRY) else FEW)


@pytest.mark.parametrize("command, dry", [*((command, "") for command in READ), *((command, "dry") for command in DRY)])
def test_no_source_is_a_traceback(place, command, dry):
    more, wrong = ("--dry-run", "--json") if dry else (), {}
    for number, source in few_or_all(command, dry):
        if command == "data add" and source in (".", "..", "/"):
            continue                                             # real folders, which could be large
        words = [source if word == "PAIRS" else word.replace("out/", f"out{number}/") for word in READ[command]]
        if found := problem([*words, *more], told_as(source)):
            wrong[source[:60]] = found
    assert not wrong, "\n".join(f"{source!r}: {found}" for source, found in wrong.items())


# ---- options: each odd value is refused in a line that names the option

NUMBERS = ("nan", "inf", "-1", "-inf", "1e400", "9" * 40, "x", "1,5", "0x10", "\u00b2", "--", "1 2")
OPTIONS = {       # option -> (words before it, odd values)
    "--tolerance": (("scan", "world:train:4", *SMALL), ("2", "5%")),
    "--seed": (("scan", "world:train:4", *SMALL), ("1.5", str(2**32))),
    "--sizes": (("scan", "world:train:4", *SMALL), ("0",)),
    "--rate": (("attack", "world:train:4", "--target", "banana"), ("0", "1.5")),
    "--count": (("attack", "world:train:4", "--target", "banana"), ("0", "1.5")),
    "--image-size": (("attack", "world:train:4", "--target", "banana", "--count", "1"), ("0", "7", "100000")),
    "--epochs": (("train", "world:train:4", *SMALL, "--out", "n.safetensors"), ("0", "1.5")),
    "--batch-size": (("train", "world:train:4", *SMALL, "--out", "n.safetensors"), ("0", "1", "-3")),
    "--learning-rate": (("train", "world:train:4", *SMALL, "--out", "n.safetensors"), ("0",)),
    "--weight-decay": (("train", "world:train:4", *SMALL, "--out", "n.safetensors"), ()),
    "--warmup-steps": (("train", "world:train:4", *SMALL, "--out", "n.safetensors"), ("1.5",)),
    "--seeds": (("plan", "ubt", "--no-calibration"), ("0", "1001")),
    "--jobs": (("plan", "ubt", "--no-calibration"), ("0", "5000")),
    "--days": (("clean", "--runs", "empty"), ()),
    "--threads": (("data", "cc3m", "a.tsv", "--out", "n"), ("0",)),
    "--processes": (("data", "cc3m", "a.tsv", "--out", "n"), ("0",)),
    "--least": (("data", "faces", "classes", "--out", "n"), ("0",)),
    "--people": (("data", "faces", "classes", "--out", "n"), ("0",)),
}
UNWRITABLE = ("0.png", "0.png/below", "link.csv", "loop.csv/x", "x" * 300, "x" * 240, "a\0b", "caf\udce9", "", " ")


@pytest.mark.parametrize("option", OPTIONS)
def test_no_number_is_a_traceback(place, option):
    words, odd = OPTIONS[option]
    wrong = {value: found for value in (*NUMBERS, *odd)
             if call(*words, option, value)[0] == 0 or (found := problem([*words, option, value], (option,)))}
    assert not wrong, wrong


WRITING = {       # command -> words before --out
    "scan": ("scan", "world:train:240", *SMALL),
    "measure": ("measure", "--pairs", "world:train:8", *SMALL),
    "attack": ("attack", "world:train:8", "--target", "banana", "--count", "1"),
    "protect": ("protect", "world:train:8", *SMALL),
    "repair": ("repair", "world:train:8", *SMALL, "--method", "finetune"),
    "cc3m": ("data", "cc3m", "pairs.csv", "--print"),
    "faces": ("data", "faces", "classes"),
}


@pytest.mark.parametrize("command", WRITING)
def test_no_place_is_a_traceback(place, command):
    wrong = {}
    for out in UNWRITABLE:
        words = (*WRITING[command], "--out", out)
        assert call(*words)[0] in (1, 2), words
        if found := problem(words, ("--out",)):
            wrong[out[:60]] = found
    assert not wrong, wrong


@pytest.mark.parametrize("words", [("data", "ids", "cc3m", "5"), ("data", "croissant", "flickr8k"),
                                   ("train", "world:train:8", *SMALL, "--epochs", "1", "--batch-size", "4")])
def test_no_file_is_a_traceback(place, words):
    for out in ("x.safetensors", "0.png/x.safetensors", "x" * 300 + ".safetensors"):
        assert call(*words, "--out", out)[0] in (1, 2), out
        assert not problem((*words, "--out", out), ("--out",)), out


# ---- words that nobody would put together

WORDS = st.one_of(
    st.sampled_from([*FEW, *(word for words in READ.values() for word in words), "--json", "--dry-run", "--help",
                     "--set", "--recipe", "--sizes", "--seed", "--tolerance", "a=1", "=", "a=[1", "a=" + "[" * 5000,
                     "--out", "--", "-", "0", "-1", "nan"]),
    st.text(max_size=6))


@settings(max_examples=120, deadline=None, database=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["scan", "attack", "protect", "repair", "train", "measure", "status", "report", "claims",
                        "settings", "preconditions"]), st.lists(WORDS, max_size=7))
def test_no_words_are_a_traceback(place, command, words):
    assert not problem([command, *words])
