"""What users do wrong, through the command as they call it or the API as they use it: one line that names the thing and
the remedy, a non-zero exit, nothing lost.
"""
import hashlib
import http.server
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mcl_repro.cli import main as cli
from mcl_repro.core.errors import DataError, SettingsError, TrainingError
from mcl_repro.data.registry import open_data, record_dataset
from mcl_repro.lab.lab import Lab
from mcl_repro.model.clip import build_clip
from mcl_repro.model.training import epoch_batches, iterate, Recipe, train, training_set
from mcl_repro.papers.stages import clean_clip, weights_checksum
from paper_notebooks import STANDARD, write

ROOT = Path(__file__).resolve().parents[2]

# A paper's notebook in small: a clean CLIP of one role, another one of the role that tests spoil, and a table.
CELL = """
from mcl_repro.lab.lab import Lab
from mcl_repro.papers.stages import clean_clip
from mcl_repro.report.provenance import write_provenance
from mcl_repro.report.tables import tidy, write_table
lab = Lab(profile, device, runs, roles=roles, seeds=seeds, jobs=jobs, settings=overrides)
recipe = dict(epochs=1, batch_size=8, learning_rate=1e-3)
spoilt = dict(recipe, learning_rate=lab.profile.finetune.learning_rate)
pretrained = lab.profile.model.pretrained
good = lab.run(lab.node(
    clean_clip, model='smoke-RN', pretrained=pretrained, pairs=lab.role('pretrain'), recipe=recipe))
bad = lab.run(lab.node(clean_clip, model='smoke-RN', pairs=lab.role('finetune'), recipe=spoilt))
row = dict(attack='BadNet', defense='UBT', metric='CA', value=50 + bad.result['loss'][-1])
write_table(tidy('ubt.table1', [row]), 'ubt.table1', lab.folder, 'A loss, for the test.')
write_provenance(lab, [good, bad])
"""


def photos(folder, count=10):
    "Pictures, and a CSV of pairs of which two captions are longer than a context of 32 tokens."
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(folder/f"{i}.png")
    more = {3: " and more of it" * 12, 4: " and more of it" * 12}
    lines = [f"{i}.png,picture number {i}{more.get(i, '')}\n" for i in range(count)]
    (folder/"pairs.csv").write_text("image,caption\n" + "".join(lines))
    return folder


def state(folder):
    "Content of every file below a folder that is not a lock."
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file() and not p.name.endswith(".lock")
    }


RUN = ("run", "ubt", "--profile", "smoke", "--device", "cpu")
PRETRAIN = ("--role", "pretrain=world:pretrain:16")
PHOTOS = ("--role", "finetune=photos/pairs.csv")

class Desk:
    "A folder with data and notebook, in which the command is called."
    def __init__(self, folder, capture):
        self.folder, self.runs, self.capture = folder, folder/"runs", capture

    def call(self, *words):
        "Exit code, stdout and stderr of the command."
        self.capture.readouterr()
        code = cli.main([str(w) for w in words])
        return code, *self.capture.readouterr()

    def run(self, *words, paper="ubt"):
        return self.call(
            "run", paper, *RUN[2:], "--notebooks", self.folder/"nbs", "--runs", self.runs, *PRETRAIN, *words
        )

    def refused(self, told, says):
        "One line that begins with error: and says so, in the last place, and exit code 2."
        code, out, err = told
        lines = err.splitlines()
        assert code == 2, err
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:], err
        assert re.search(says, lines[-1]), err
        assert "Traceback" not in err + out
        return lines


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A desk with a run that went well, made once; tests work on copies."
    folder = tmp_path_factory.mktemp("bad")/"desk"
    photos(folder/"photos")
    write(folder/"nbs", "ubt.ipynb", STANDARD + "size = 1.0", CELL)
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        m.setattr(warnings, "showwarning", warnings.showwarning)   # the command sets its own
        assert cli.main([*RUN, "--notebooks", "nbs", *PRETRAIN, *PHOTOS]) == 0
    return folder


@pytest.fixture
def desk(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished, tmp_path/"desk")
    monkeypatch.chdir(tmp_path/"desk")
    monkeypatch.setenv("MCL_REPRO_DATA", str(tmp_path/"home"))
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    return Desk(tmp_path/"desk", capsys)


def test_a_role_may_be_given_by_a_path_relative_to_where_one_stands(finished):
    "The notebook runs in another folder than the command is called from."
    assert (finished / "runs/smoke/notebooks/ubt.ipynb").exists()
    assert "," in (finished / "runs/smoke/tables/ubt.table1.csv").read_text()
    assert "--role finetune=photos/pairs.csv" in (finished/"runs/smoke/index.html").read_text()


# ---- wrong words: refused before anything runs, and what there was is untouched

@pytest.mark.parametrize("words, says", [
    (("--profile", "huge"), "unknown profile 'huge'; known: mini, smoke, paper, photos"),
    (("--force", {"paper": "mme"}), "unknown paper 'mme'; known: ubt"),
    (("--param", "sise=2"), r"no parameter 'sise' \(did you mean size\?\)"),
    (("--param", "size=large"), "parameter 'size' of notebook 'ubt' is float .default 1.0., not str .'large'."),
    (("--role", "jury=photos/pairs.csv"), "unknown role 'jury' for profile 'smoke'; known: pretrain, "),
    (("--set", "finetune.epochs=two"), "setting 'finetune.epochs' is int .*, not str .'two'."),
    (("--role", "finetune=flickr8k:train"), "flickr8k is not on this machine.*data add flickr8k"),
    (("--role", "finetune=photos/none.csv"), "photos/none.csv: there is no such file or folder; check the path"),
])
def test_a_wrong_word_loses_nothing(desk, words, says):
    before = state(desk.folder)
    paper = words[-1] if isinstance(words[-1], dict) else {}
    desk.refused(desk.run(*(word for word in words if isinstance(word, str)), **paper), says)
    assert state(desk.folder) == before


def test_cuda_where_there_is_none_is_refused(desk):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    before = state(desk.folder)
    says = "device cuda was asked for, but torch sees no GPU here; give device cpu or install a torch with CUDA"
    assert len(desk.refused(desk.run("--device", "cuda"), says)) == 1
    assert state(desk.folder) == before


CSV = {
    "a missing image": (
        b"image,caption\n0.png,a\nnope.png,b\n",
        r"spoilt.csv, line 3: image nope.png is not in .*photos; put it there or take it out of the list",
    ),
    "an empty caption": (
        b'image,caption\n0.png,a\n1.png,"  "\n',
        "spoilt.csv, line 3: the caption is empty; write one or delete the row",
    ),
    "a caption that is not UTF-8": (
        "image,caption\n0.png,a\n1.png,café\n".encode("latin1"),
        r"spoilt.csv, line 3: not UTF-8 \(byte 0xe9\); convert it, for example with iconv",
    ),
    "ids that come twice": (
        b"image,caption,id\n0.png,a,7\n1.png,b,7\n",
        "spoilt.csv: id 7 comes twice .*; ids must be unique",
    ),
    "no column of that name": (
        b"view,words\n0.png,a\n",
        "spoilt.csv: there is no column image; it has view, words; choose with",
    ),
}
@pytest.mark.parametrize("what", CSV)
def test_a_list_that_is_wrong_is_refused_before_anything_runs(desk, what):
    content, says = CSV[what]
    (desk.folder/"photos/spoilt.csv").write_bytes(content)
    before = state(desk.folder)
    assert len(desk.refused(desk.run("--role", "finetune=photos/spoilt.csv"), says)) == 1
    assert state(desk.folder) == before


def test_a_flickr_line_without_a_tab_is_refused_when_it_is_added_and_when_it_came_later(desk):
    tokens = desk.folder/"photos/Flickr8k.token.txt"
    (desk.folder/"photos/pairs.csv").unlink()
    good = "".join(f"{i}.png#{k}\tcaption {k} of {i}\n" for i in range(3) for k in range(5))
    tokens.write_text(good.replace("1.png#2\t", "1.png#2 "))
    says = (
        r'Flickr8k.token.txt, line 8: expected "<image>#<number><tab><caption>" but there is no tab; fix the '
        r"line or take the original file"
    )
    add = (
        "data", "add", "mine", desk.folder / "photos", "--format", "flickr", "--option", "tokens=Flickr8k.token.txt",
        "--option", "images=.",
    )
    desk.refused(desk.call(*add), says)
    tokens.write_text(good)
    assert desk.call(*add)[0] == 0 and len(open_data("mine:all")) == 15
    tokens.write_text(good.replace("1.png#2\t", "1.png#2 "))
    before = state(desk.folder.parent)
    desk.refused(desk.run("--role", "finetune=mine:all"), says)
    assert state(desk.folder.parent) == before and "registered" in desk.call("data", "show", "mine")[1]


# ---- what shows only while computing: what is done is kept, and the same command goes on once it is mended

def kept(desk, before):
    "Artefacts, tables, figures and executed copies of before are still there, byte for byte."
    after = state(desk.runs)
    return all(
        after.get(n) == h
        for n, h in before.items()
        if n.startswith(("store/objects/", "smoke/tables/", "smoke/notebooks/"))
    )


def test_an_unreadable_image_and_its_repair(desk):
    before, picture = state(desk.runs), desk.folder/"photos/6.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[:200])
    lines = desk.refused(
        desk.run("--role", "finetune=photos/pairs.csv"),
        "photos/6.png: the file is cut off .200 bytes.; fetch it again or take it out of the list",
    )
    assert kept(desk, before)
    assert "failed: " in lines[-2]
    assert "photos/6.png" in (desk.runs / "smoke/index.html").read_text()
    status = desk.call("status", "--profile", "smoke")[1]
    assert " done, 1 failed" in status and "DataError: " in status, status
    picture.write_bytes(whole)
    code, out, err = desk.run("--role", "finetune=photos/pairs.csv")
    assert code == 0
    assert "unchanged" in err
    objects = {n.removeprefix("store/objects/"): h for n, h in before.items() if n.startswith("store/objects/")}
    assert state(desk.runs/"store/objects") == objects


def test_an_unreadable_image_in_a_loader_process_is_one_line_too(tmp_path):
    "Data that do not fit into memory are read by other processes, whose errors come with a traceback in their text."
    folder = photos(tmp_path/"photos")
    (folder/"6.png").write_bytes(b"<html>404</html>")
    clip = build_clip("smoke-RN")
    lazy = training_set(clip, open_data(str(folder/"pairs.csv")), memory_limit=0)
    for workers in (0, 1):
        with pytest.raises(DataError) as e:
            list(iterate(lazy, epoch_batches(10, Recipe(1, 5, 1e-3), 0), "cpu", workers=workers))
        assert str(e.value) == (
            f"{folder}/6.png: the file cannot be read as a picture (16 bytes, a web page); fetch it again or take it "
            "out of the list"
        )


def test_a_loss_that_is_no_number(desk):
    before = state(desk.runs)
    desk.refused(
        desk.run("--role", "finetune=world:train:64", "--set", "finetune.learning_rate=1e30"),
        r"error: the loss is not a number at step 8 \(epoch 1\): lower the learning rate \(1e\+30\) or look "
        r"for damaged images$",
    )
    assert kept(desk, before) and not list((desk.runs/"store/tmp").iterdir())
    failed = next((desk.runs/"store/failed").iterdir())
    assert "the loss is not a number" in failed.read_text()


def test_weights_that_are_no_numbers_are_not_kept(tmp_path):
    "The last update of an epoch has no loss after it that could tell."
    clip = build_clip("smoke-RN")
    data = training_set(clip, open_data("world:train:8"))
    def loss(clip, batch):
        return (clip.model.logit_scale - clip.model.logit_scale).sqrt() + 1.     # finite, with a gradient that is not
    with pytest.raises(
        TrainingError, match=r"^a weight is not a number at step 1 \(epoch 1\): lower the learning rate"
    ):
        train(clip, data, Recipe(1, 8, 1e-3), loss=loss, checkpoint=tmp_path/"c.safetensors")
    assert not (tmp_path/"c.safetensors").exists()


def test_captions_longer_than_the_context_are_cut_counted_and_reported(finished):
    record = next(
        r
        for p in (finished / "runs/store/objects").rglob("record.json")
        if "pairs.csv" in json.dumps(r := json.loads(p.read_text()))
    )
    assert record["result"]["captions_cut"] == 2 and record["result"]["pairs"] == 10
    stages = json.loads((finished/"runs/smoke/provenance.json").read_text())["notebooks"]["ubt"]["stages"]
    assert [(s["captions_cut"], s["pairs"]) for s in stages if s.get("captions_cut")] == [(2, 10)]
    page = (finished/"runs/smoke/index.html").read_text()
    assert re.search(
        r"<dt>Captions</dt><dd>longer than the model's context and cut there, their end mark kept: 2 of 10 ", page
    )


# ---- stores and folders that cannot be used

def test_a_store_of_another_version_is_left_alone(desk):
    (desk.runs/"store/format.json").write_text('{"format": 99}')
    before = state(desk.folder)
    for told in (
        desk.run("--role", "finetune=photos/pairs.csv", "--force"), desk.call("status", "--profile", "smoke"),
        desk.call("clean", "--yes", "1", "--days", "0"),
    ):
        desk.refused(
            told,
            "store .*store has format 99, this program reads 1; use the program that wrote it, or give another folder",
        )
    assert state(desk.folder) == before


@pytest.mark.parametrize("blocked", ["runs", "runs/smoke", "runs/store", "runs/smoke/notebooks"])
def test_a_file_where_a_folder_must_be(desk, blocked):
    desk.runs = desk.folder/"other"
    path = desk.folder/blocked.replace("runs", "other", 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    before = state(desk.folder)
    desk.refused(
        desk.run(), f"other/?{re.escape(blocked.removeprefix('runs'))}.*(give a folder|give another folder|--runs)"
    )
    after = state(desk.folder)
    assert path.read_text() == "mine" and {n: after.get(n) for n in before} == before


NOBODY = """
import contextlib, io, os, sys
import torch
from mcl_repro.cli import main as cli
from mcl_repro.run.batch import run_notebooks
place = sys.argv[1]
run = ['run', 'ubt', '--profile', 'smoke', '--device', 'cpu', '--notebooks', 'nbs',
       '--role', 'pretrain=world:pretrain:16', '--role', 'finetune=photos/pairs.csv']
others = [['report', '--profile', 'smoke'], ['clean', '--yes', '1', '--days', '0'], ['data', 'add', 'mine', 'photos'],
          ['status', '--profile', 'smoke']]

def call(*commands):
    for words in commands:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(words)
        yield code, err.getvalue().splitlines()[-1:]

# first where it is allowed: all is imported that another user may not be able to read
os.environ['MCL_REPRO_DATA'] = place + '/home'
os.chdir(place + '/warm')
for code, said in call(run, *others):
    assert code == 0, said
os.environ['MCL_REPRO_DATA'] = place + '/desk/home'
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    open(cli.__file__).close()
    os.chdir(place + '/desk')
except OSError:
    print('SKIP')
    sys.exit()
for code, said in call(run + ['--force'], run + ['--runs', 'new'], *others):
    print(code, said)
"""


def test_no_permission_to_write(finished):
    "As a user who may read everything and write nothing; root, for whom permissions do not count, becomes nobody."
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)/"desk"
        shutil.copytree(finished, copy)
        shutil.copytree(finished, Path(folder)/"warm")
        before = state(copy)
        Path(folder).chmod(0o755)
        for p in [copy, *copy.rglob("*")]:
            p.chmod(0o555 if p.is_dir() else 0o444)
        done = subprocess.run(
            [sys.executable, "-c", NOBODY, folder],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
            timeout=100,
        )
        after = state(copy)
        for p in [copy, *(p for p in copy.rglob("*") if p.is_dir())]:
            p.chmod(0o755)
    if done.stdout == "SKIP\n":
        pytest.skip("another user may not read this checkout")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    says = [
        r"cannot write .*/runs/smoke/notebooks: Permission denied; mend the permissions or give another "
        r"folder with --runs",
        r"new.*(mend the permissions or give another folder|--runs)",
        r"cannot write runs/smoke/index.html: Permission denied; .*--runs",
        "runs/store: no permission to write while removing what no profile needs; mend the permissions",
        r"/home: cannot be written .Permission denied.; set MCL_REPRO_DATA to a folder you may write to",
    ]
    for line, say in zip(lines, says, strict=False):
        assert line.startswith("2 ['error: ") and re.search(say, line), line
    assert len(lines) == 6 and lines[-1] == "0 []" and after == before


# ---- archives and checkpoints that mean harm

class Files(http.server.BaseHTTPRequestHandler):
    "Serves what is in `there`."
    there = {}
    def do_GET(self):
        content = self.there[self.path]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
    def log_message(self, *args):
        pass

@pytest.fixture
def site():
    "The address of a server of `Files`."
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()

def packed(kind, members):
    "An archive of text files by name."
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            for name, text in members.items():
                archive.writestr(name, text)
    else:
        with tarfile.open(fileobj=file, mode="w") as archive:
            for name, text in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(text)
                archive.addfile(member, io.BytesIO(text.encode()))
    return file.getvalue()

@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_with_a_member_that_escapes(desk, site, kind):
    "Fetched by the command; what an earlier fetch brought stays."
    def offer(members):
        Files.there["/toy"] = packed(kind, {"toy/0.png": "0"} | members)
        file = dict(url=f"{site}/toy", save=f"toy.{kind}", sha256="unknown")
        layout = dict(format="csv", splits=dict(train=dict(path="toy/train.csv")))
        record_dataset("toy", files=[file], fetched={}, layouts=[layout])
    offer({"toy/train.csv": "image,caption\n0.png,first\n"})
    assert desk.call("data", "fetch", "toy")[0] == 0
    assert open_data("toy:train").captions == ["first"]
    offer({"toy/train.csv": "image,caption\n0.png,second\n", "../../escaped": "x"})
    home = desk.folder.parent/"home"
    before = state(home/"toy")
    says = (
        rf"toy.{kind}: member ../../escaped would be written outside its folder; this archive is not safe and "
        r"was not unpacked"
    )
    desk.refused(desk.call("data", "fetch", "toy", "--force"), says)
    assert state(home/"toy") == before
    assert open_data("toy:train").captions == ["first"]
    assert not list(desk.folder.parent.rglob("escaped"))


class Harm:
    "Unpickled, it makes a folder."
    def __init__(self, mark):
        self.mark = mark
    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("name", ["evil.pt", "evil"])
def test_a_checkpoint_that_is_a_pickle(tmp_path, name):
    "Given to the stage that every paper begins with, after another model was made."
    lab = Lab("smoke", device="cpu", runs=tmp_path/"runs", roles=dict(pretrain="world:pretrain:16"), progress=False)
    recipe = dict(epochs=1, batch_size=8, learning_rate=1e-3)
    good = lab.run(lab.node(clean_clip, model="smoke-RN", pairs=lab.role("pretrain"), recipe=recipe))
    before = state(good.path)
    (tmp_path/name).write_bytes(pickle.dumps(Harm(str(tmp_path/"ran")), protocol=2))
    evil = str(tmp_path/name)
    says = (
        f"^{re.escape(evil)} is not a file of plain tensors .*; convert it to .safetensors where you trust it, "
        "pickles are not loaded here"
    )
    with pytest.raises(DataError, match=says):
        lab.run(lab.node(clean_clip, model="smoke-RN", pretrained=evil, checksum=weights_checksum(evil)))
    assert not (tmp_path / "ran").exists()
    assert state(good.path) == before
    assert len(list(lab.store.objects.glob("*/*"))) == 1


def test_weights_that_do_not_exist_are_not_replaced_by_random_ones(tmp_path):
    lab = Lab("smoke", device="cpu", runs=tmp_path/"runs", progress=False)
    with pytest.raises(
        SettingsError,
        match="unknown weights 'openai' for smoke-RN: open_clip has none, or give the path of a .safetensors file",
    ):
        lab.run(lab.node(clean_clip, model="smoke-RN", pretrained="openai"))
    assert not list(lab.store.objects.glob("*/*"))
