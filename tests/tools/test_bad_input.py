"""What users do wrong, through the command as they call it or the API as they use it: one line that names the thing and
the remedy, a non-zero exit, nothing lost.
"""
import hashlib, io, json, os, pickle, re, shutil, subprocess, sys, tempfile, textwrap, warnings, zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mcl_repro.cli import main as cli
from mcl_repro.model.clip import build_clip
from mcl_repro.data.registry import open_data
from mcl_repro.core.errors import DataError, SettingsError, TrainingError
from mcl_repro.lab.lab import Lab
from mcl_repro.papers.stages import clean_clip, weights_checksum
from mcl_repro.model.training import epoch_batches, iterate, Recipe, train, training_set
from test_batch import STANDARD, write
from test_data import Server, site, tar_with, toy_archive  # noqa: F401 (fixture)
from mcl_repro.data.registry import record_dataset

ROOT = Path(__file__).resolve().parent.parent

# A paper's notebook in small: a clean CLIP of one role, another one of the role that tests spoil, and a table.
CELL = """
from mcl_repro.lab.lab import Lab
from mcl_repro.report.tables import tidy, write_table; from mcl_repro.report.provenance import write_provenance
from mcl_repro.papers.stages import clean_clip
lab = Lab(profile, device, runs, roles=roles, seeds=seeds, jobs=jobs, settings=overrides)
recipe = dict(epochs=1, batch_size=8, learning_rate=1e-3)
good = lab.run(lab.node(clean_clip, model='smoke-RN', pretrained=lab.profile.model.pretrained, pairs=lab.role('pretrain'), recipe=recipe))
made = lab.run(lab.node(clean_clip, model='smoke-RN', pairs=lab.role('finetune'), recipe=dict(recipe, learning_rate=lab.profile.finetune.learning_rate)))
write_table(tidy('ubt.table1', [dict(attack='BadNet', defense='UBT', metric='CA', value=50 + made.result['loss'][-1])]), 'ubt.table1', lab.folder, 'A loss, for the test.')
write_provenance(lab, [good, made])
"""


def photos(folder, count=10):
    "Pictures, and a CSV of pairs of which two captions are longer than a context of 32 tokens."
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(folder/f"{i}.png")
    (folder / "pairs.csv").write_text(
        "image,caption\n"
        + "".join(f"{i}.png,picture number {i}{' and more of it' * 12 * (i in (3, 4))}\n" for i in range(count))
    )
    return folder


def state(folder):
    "Content of every file below a folder that is not a lock."
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file() and not p.name.endswith(".lock")
    }


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
            "run", paper, "--profile", "smoke", "--device", "cpu", "--notebooks", self.folder / "nbs", "--runs",
            self.runs, "--role", "pretrain=world:pretrain:16", *words,
        )

    def refused(self, told, says):
        "One line that begins with error: and says so, in the last place, and exit code 2."
        code, out, err = told
        lines = err.splitlines()
        assert (
            code == 2 and [l for l in lines if l.startswith("error: ")] == lines[-1:] and re.search(says, lines[-1])
        ), err
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
        assert (
            cli.main(
                [
                    "run", "ubt", "--profile", "smoke", "--device", "cpu", "--notebooks", "nbs", "--role",
                    "pretrain=world:pretrain:16", "--role", "finetune=photos/pairs.csv",
                ]
            )
            == 0
        )
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
    assert (finished / "runs/smoke/notebooks/ubt.ipynb").exists() and "," in (
        finished / "runs/smoke/tables/ubt.table1.csv"
    ).read_text()
    assert "--role finetune=photos/pairs.csv" in (finished/"runs/smoke/index.html").read_text()


# ---- wrong words: refused before anything runs, and what there was is untouched

@pytest.mark.parametrize("words, says", [
    (("--profile", "huge"), "unknown profile 'huge'; known: mini, smoke, paper"), (("--force", {"paper": "mme"}), "unknown paper 'mme'; known: ubt"), (("--param", "sise=2"), r"no parameter 'sise' \(did you mean size\?\)"),
    (("--param", "size=large"), "parameter 'size' of notebook 'ubt' is float .default 1.0., not str .'large'."), (("--role", "jury=photos/pairs.csv"), "unknown role 'jury' for profile 'smoke'; known: pretrain, "),
    (("--set", "finetune.epochs=two"), "setting 'finetune.epochs' is int .*, not str .'two'."), (("--role", "finetune=flickr8k:train"), "flickr8k is not on this machine.*data add flickr8k"),
    (("--role", "finetune=photos/none.csv"), "photos/none.csv: there is no such file or folder; check the path")])
def test_a_wrong_word_loses_nothing(desk, words, says):
    before = state(desk.folder)
    desk.refused(
        desk.run(*(w for w in words if isinstance(w, str)), **(words[-1] if isinstance(words[-1], dict) else {})), says
    )
    assert state(desk.folder) == before


def test_cuda_where_there_is_none_is_refused(desk):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    before = state(desk.folder)
    assert (
        len(
            desk.refused(
                desk.run("--device", "cuda"),
                "device cuda was asked for, but torch sees no GPU here; give device cpu or install a torch with CUDA",
            )
        )
        == 1
    )
    assert state(desk.folder) == before


CSV = {
    "a missing image": (
        b"image,caption\n0.png,a\nnope.png,b\n",
        r"spoilt.csv, line 3: image nope.png is not in \S*photos; put it there or take it out of the list",
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
        b"picture,text\n0.png,a\n",
        "spoilt.csv: there is no column caption; it has picture, text; choose with",
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
    assert (
        kept(desk, before)
        and "failed: " in lines[-2]
        and "photos/6.png" in (desk.runs / "smoke/index.html").read_text()
    )
    status = desk.call("status", "--profile", "smoke")[1]
    assert " done, 1 failed" in status and "DataError: " in status, status
    picture.write_bytes(whole)
    code, out, err = desk.run("--role", "finetune=photos/pairs.csv")
    assert (
        code == 0
        and "unchanged" in err
        and state(desk.runs / "store/objects")
        == {n.removeprefix("store/objects/"): h for n, h in before.items() if n.startswith("store/objects/")}
    )


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
            f"{folder}/6.png: the file cannot be read as a picture (16 bytes); fetch it again or take it out "
            "of the list"
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
        desk.call("clean", "--yes", "--days", "0"),
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
    import contextlib, io, os, sys, torch
    from mcl_repro import cli
    from mcl_repro.run.batch import run_notebooks
    run = ['run', 'ubt', '--profile', 'smoke', '--device', 'cpu', '--notebooks', 'nbs', '--role', 'pretrain=world:pretrain:16', '--role', 'finetune=photos/pairs.csv']
    def call(*commands):
        for words in commands:
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): code = cli.main(words)
            yield code, err.getvalue().splitlines()[-1:]
    others = [['report', '--profile', 'smoke'], ['clean', '--yes', '--days', '0'], ['data', 'add', 'mine', 'photos'], ['status', '--profile', 'smoke']]
    os.chdir(sys.argv[1] + '/warm'); os.environ['MCL_REPRO_DATA'] = sys.argv[1] + '/home'
    for code, said in call(run, *others): assert code == 0, said       # allowed, and all is imported that another user may not be able to read
    os.environ['MCL_REPRO_DATA'] = sys.argv[1] + '/desk/home'
    if os.getuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)
    try: open(cli.__file__).close(); os.chdir(sys.argv[1] + '/desk')
    except OSError: print('SKIP'); sys.exit()
    for code, said in call(run + ['--force'], run + ['--runs', 'new'], *others): print(code, said)
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
            [sys.executable, "-c", textwrap.dedent(NOBODY), folder],
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
        r"cannot write \S*/runs/smoke/notebooks: Permission denied; mend the permissions or give another "
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

@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_with_a_member_that_escapes(desk, site, kind):
    "Fetched by the command; what an earlier fetch brought stays."

    home = desk.folder.parent/"home"
    entry = lambda url: record_dataset(
        "toy", files=[dict(url=url, save=f"toy.{kind}", sha256="unknown")], fetched={},
        layouts=[dict(format="csv", splits=dict(train=dict(path="toy/train.csv")))],
    )
    Server.files["/good"] = toy_archive("first", 1000)
    entry(f"{site}/good")
    assert desk.call("data", "fetch", "toy")[0] == 0 and open_data("toy:train").captions == ["first"]
    if kind == "zip":
        evil = io.BytesIO()
        with zipfile.ZipFile(evil, "w") as z:
            z.writestr("toy/train.csv", "image,caption\n0.png,second\n")
            z.writestr("../../escaped", "x")
        evil = evil.getvalue()
    else:
        evil = tar_with(("toy/train.csv", b"0", ""), ("../../escaped", b"0", ""))
    Server.files["/evil"] = evil
    entry(f"{site}/evil")
    before = state(home/"toy")
    desk.refused(
        desk.call("data", "fetch", "toy", "--force"),
        rf"toy.{kind}: member ../../escaped would be written outside its folder; this archive is not safe and "
        r"was not unpacked",
    )
    assert (
        state(home / "toy") == before
        and open_data("toy:train").captions == ["first"]
        and not list(desk.folder.parent.rglob("escaped"))
    )


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
    with pytest.raises(
        DataError,
        match=f"^{tmp_path}/{name} is not a file of plain tensors .*; convert it to .safetensors where you trust it, "
        "pickles are not loaded here",
    ):
        lab.run(
            lab.node(
                clean_clip, model="smoke-RN", pretrained=str(tmp_path / name),
                checksum=weights_checksum(str(tmp_path / name)),
            )
        )
    assert (
        not (tmp_path / "ran").exists() and state(good.path) == before and len(list(lab.store.objects.glob("*/*"))) == 1
    )


def test_weights_that_do_not_exist_are_not_replaced_by_random_ones(tmp_path):
    lab = Lab("smoke", device="cpu", runs=tmp_path/"runs", progress=False)
    with pytest.raises(
        SettingsError,
        match="unknown weights 'openai' for smoke-RN: open_clip has none, or give the path of a .safetensors file",
    ):
        lab.run(lab.node(clean_clip, model="smoke-RN", pretrained="openai"))
    assert not list(lab.store.objects.glob("*/*"))
