"The commands for one's own model and data: exit codes, JSON, dry runs, restarts, and errors before any work."
import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mcl_repro.attacks.protection import read_published
from mcl_repro.cli.main import main
from mcl_repro.cli.tools import EXAMPLES, USE
from mcl_repro.model import training
from mcl_repro.model.clip import build_clip, save_clip
from mcl_repro.model.training import save_checkpoint
from mcl_repro.tools import scanning
from mcl_repro.tools.inputs import as_clip, as_pairs, model_fingerprint


def call(*words):
    "Exit code, stdout and stderr."
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(w) for w in words])
    return code, out.getvalue(), err.getvalue()


def said(*words):
    "What a command prints with --json."
    code, out, err = call(*words, "--json")
    assert len(out.strip().splitlines()) == 1, out + err
    return code, json.loads(out)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    "A model file, and a poisoned set that `attack` wrote."
    folder = tmp_path_factory.mktemp("work")
    save_clip(build_clip("smoke-RN"), folder/"clean.safetensors")
    code, told = said("attack", "world:train:240", "--target", "banana", "--rate", "0.05", "--image-size", "32",
                      "--out", folder/"poisoned")
    assert code == 0 and told["poisoned"] == 12
    return folder


def test_every_help_has_an_example_that_can_be_copied(capsys):
    for name in USE:
        with pytest.raises(SystemExit) as e:
            main([name, "--help"])
        text = capsys.readouterr().out
        assert e.value.code == 0 and EXAMPLES[name] in text


def test_what_an_attack_leaves_for_the_defender_tells_nothing(work):
    folder = work/"poisoned"
    assert sorted(p.name for p in folder.iterdir()) == ["CARD.md", "images", "pairs.csv", "truth"]
    assert (folder/"truth"/"attack.html").is_file()
    stats = {(p.suffix, Image.open(p).size, Image.open(p).mode) for p in (folder/"images").iterdir()}
    assert stats == {(".png", (32, 32), "RGB")}


def test_scan_writes_everything_and_its_exit_code_is_the_verdict(work, tmp_path):
    words = ["scan", work/"poisoned/pairs.csv", "--model", work/"clean.safetensors",
             "--truth", work/"poisoned/truth/poisoned.csv", "--out", tmp_path/"scan"]
    code, told = said(*words)
    assert code == (3 if told["attacked"] else 0) and told["pairs"] == 240 and told["unreadable"] == 0
    assert {m["what"] for m in told["measured"]} >= {"precision", "recall"}
    assert all(Path(path).is_file() for path in told["files"].values())
    once = written(tmp_path/"scan")
    said(*words)
    assert written(tmp_path/"scan") == once


def written(folder):
    "Name -> content of the files of a folder."
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.mark.parametrize("stands_out, code", [(True, 3), (False, 0)])
def test_three_is_for_suspicious_and_zero_for_clean(work, tmp_path, monkeypatch, stands_out, code):
    "The verdict itself is tested elsewhere; here it is the way out."
    plain, asked = scanning.find_core, []

    def core(*args, **kwargs):
        "A first group of pairs whose contrast is far over the bar, or under it; no second one."
        found, first = plain(*args, **kwargs), not asked
        asked.append(found)
        bar = found.contrast/2 if stands_out and first else found.contrast*2 + 1
        return replace(found, bar=bar, most=99.0, least=-1.0)

    monkeypatch.setattr(scanning, "find_core", core)
    words = ["scan", "world:train:240", "--model", work/"clean.safetensors", "--sizes", "16", "--out", tmp_path/"scan"]
    assert call(*words)[0] == code


@pytest.mark.parametrize("words, problem", [
    (["scan", "nowhere.csv", "--model", "smoke-RN"], "nowhere.csv"),
    (["scan", "world:train:240", "--model", "smoke-RM"], "unknown model 'smoke-RM'"),
    (["scan", "world:train:240", "--model", "none.safetensors"], "no checkpoint"),
    (["scan", "world:train:60", "--model", "smoke-RN"], "too few to scan"),
    (["scan", "world:zeroshot_test:100", "--model", "smoke-RN"], "has classes and no captions"),
    (["scan", "world:train:240", "--model", "smoke-RN", "--method", "magic"], "unknown method 'magic'"),
    (["scan", "world:train:240", "--model", "smoke-RN", "--trusted", "world:validation:100"], "leave them out"),
    (["scan", "world:train:240", "--model", "smoke-RN", "--tolerance", "2"], "tolerance"),
    (["scan", "world:train:240", "--model", "smoke-RN", "--truth", "missing.csv"], "missing.csv"),
    (["scan", "world:train:240", "--model", "smoke-RN", "--device", "abacus"], "abacus"),
    (["scan", "world:train:240"], "--model"),
    (["attack", "world:train:240", "--target", "banana"], "either count or rate"),
    (["attack", "world:train:240", "--target", "banana", "--rate", "0.1", "--attack", "badnest"], "'badnest'"),
    (["attack", "world:train:240", "--target", "banana", "--rate", "0.1", "--set", "colour=red"],
     "no setting 'colour'"),
    (["measure", "--model", "smoke-RN"], "nothing to measure"),
    (["measure", "--model", "smoke-RN", "--images", "world:zeroshot_test:64", "--reference-pretrained", "x"],
     "--reference-pretrained needs --reference"),
    (["repair", "world:train:240", "--model", "smoke-RN", "--method", "wish"], "'wish'"),
    (["repair", "world:train:240", "--model", "smoke-RN"], "reference"),
    (["repair", "--model", "smoke-RN", "--method", "cleanclip"], "pairs"),
    (["protect", "world:train:64", "--model", "smoke-RN", "--format", "zip"], "'zip'"),
    (["train", "world:train:64", "--model", "smoke-RN", "--out", "x.pt"], ".safetensors"),
    (["train", "world:train:64", "--model", "smoke-RN", "--epochs", "0", "--out", "x.safetensors"],
     "argument --epochs: '0' is not a whole number from 1"),
])
def test_what_cannot_work_is_one_line_and_code_1_before_anything_is_written(tmp_path, monkeypatch, words, problem):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*words)
    assert code == 1 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and problem in err, err
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_writes_nothing_and_says_what_it_costs(work, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clean = work/"clean.safetensors"
    calls = [
        ["scan", "world:train:240", "--model", clean],
        ["attack", "world:train:240", "--target", "banana", "--rate", "0.1", "--image-size", "32"],
        ["measure", "--model", clean, "--images", "world:zeroshot_test:64"],
        ["train", "world:train:240", "--model", "smoke-RN", "--batch-size", "32", "--out", "x.safetensors"],
        ["repair", "world:train:240", "--model", clean, "--method", "finetune"],
        ["protect", "world:train:64", "--model", clean],
    ]
    for words in calls:
        code, told = said(*words, "--dry-run")
        assert code == 0 and told["dry_run"] and told["seconds"] > 0 and told["memory"] >= 0, words
        assert call(*words, "--dry-run")[1].count(" of memory") == 1
    assert list(tmp_path.iterdir()) == []


def test_measure_tells_with_and_without_a_reference(work, tmp_path):
    code, told = said("measure", "--model", work/"clean.safetensors", "--reference", "smoke-RN",
                      "--images", "world:zeroshot_test:64", "--attack", work/"poisoned", "--out", tmp_path/"m")
    rows = {m["what"]: m for m in told["measured"]}
    assert code == 0 and {"CA", "ASR"} <= set(rows) and "before" in rows["CA"]
    assert rows["CA"]["value"] == pytest.approx(rows["CA"]["before"])  # the same weights
    for path in told["files"].values():
        assert Path(path).is_file()


def test_repair_leaves_a_model_that_loads_again(work, tmp_path):
    clean = work/"clean.safetensors"
    code, told = said("repair", "world:validation:160", "--model", clean, "--method", "finetune",
                      "--recipe", "epochs=1", "--out", tmp_path/"r")
    assert code == 0 and not told["refused"]
    files = {what: Path(path) for what, path in told["files"].items()}
    assert model_fingerprint(as_clip(str(files["model"]))) != model_fingerprint(as_clip(str(clean)))
    assert "repaired with finetune" in files["card"].read_text(encoding="utf-8")
    assert files["page"].stat().st_size > 5000


def test_protect_publishes_what_can_be_read_again(work, tmp_path):
    code, told = said("protect", "world:train:40", "--model", work/"clean.safetensors", "--recipe", "epochs=1",
                      "--set", "noise_steps=1", "--set", "candidates=2", "--out", tmp_path/"p")
    assert code == 0 and told["pairs"] == 40 and len(read_published(told["files"]["published"])) == 40
    assert Path(told["files"]["page"]).is_file()


def test_an_interrupted_training_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    words = ["train", "world:train:128", "--model", "smoke-RN", "--epochs", "2", "--batch-size", "32"]
    assert call(*words, "--out", tmp_path/"whole.safetensors")[0] == 0
    save = save_checkpoint

    def once(state, path):
        save(state, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "save_checkpoint", once)
    code, _, err = call(*words, "--out", tmp_path/"parts.safetensors")
    assert code == 130 and "goes on from there" in err and (tmp_path/"parts.safetensors.unfinished").is_dir()
    monkeypatch.undo()
    code, _, err = call("train", "world:train:96", *words[2:], "--out", tmp_path/"parts.safetensors")
    assert code == 1 and "unfinished training of something else" in err
    assert call(*words, "--test", "world:validation:64", "--out", tmp_path/"parts.safetensors")[0] == 0
    assert (tmp_path/"parts.safetensors").read_bytes() == (tmp_path/"whole.safetensors").read_bytes()
    assert not (tmp_path/"parts.safetensors.unfinished").exists()
    assert "trained on world:train:128" in (tmp_path/"parts.CARD.md").read_text(encoding="utf-8")


def test_broken_pictures_are_listed_and_left_out_up_to_the_stated_share(work, tmp_path):
    rng, rows = np.random.default_rng(0), []
    for k in range(120):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3)).astype(np.uint8)).save(tmp_path/f"{k}.png")
        rows.append(f'{k}.png,"picture {k}, {rng.integers(1e6)}"')
    (tmp_path/"7.png").write_bytes(b"")
    (tmp_path/"8.png").write_bytes((tmp_path/"9.png").read_bytes()[:500])
    (tmp_path/"pairs.csv").write_text("image,caption\n" + "\n".join(rows) + "\n", encoding="utf-8")
    scan = ["scan", tmp_path/"pairs.csv", "--model", work/"clean.safetensors", "--out", tmp_path/"scan"]
    code, _, err = call(*scan)
    assert code == 1 and "2 of 120 pairs cannot be read" in err
    code, told = said(*scan, "--tolerance", "0.05")
    assert code in (0, 3) and told["unreadable"] == 2 and any("left out" in n for n in told["notes"])
    assert Path(told["files"]["table"]).read_text(encoding="utf-8").count(",unreadable,") == 2
    assert len(as_pairs(tmp_path/"pairs.csv")) == 120
