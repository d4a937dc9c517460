"The command as a user calls it: in its own process, judged by exit code, stdout and stderr."
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lab_for_cli import count
from paper_notebooks import STANDARD, TABLE, write
from PIL import Image

import mcl_repro
from mcl_repro.cli import main as cli
from mcl_repro.core.errors import SettingsError
from mcl_repro.core.words import parse_pairs, parse_value
from mcl_repro.lab.lab import Lab
from mcl_repro.report.tables import tidy, write_table

ROOT = Path(mcl_repro.__file__).parent.parent


def call(*words, cwd=None, **env):
    "Run the command in a process of its own."
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    return subprocess.run([sys.executable, "-m", "mcl_repro", *map(str, words)], capture_output=True, text=True,
                          cwd=cwd or ROOT, env=environment, timeout=100)


def fails(done, says, code=2):
    "One line on stderr that begins with error: and says so; nothing on stdout."
    assert done.returncode == code and re.search(says, done.stderr), done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and not done.stdout


LOADED = """
import sys
from mcl_repro.cli import main as cli
try:
    cli.main(["--help"])
except SystemExit:
    pass
heavy = ("torch", "numpy", "pandas", "papermill", "matplotlib", "yaml", "argcomplete")
print([module for module in heavy if module in sys.modules])
"""


def test_help_is_quick_and_loads_nothing_heavy():
    "In seconds of the processor: other tests run beside this one."
    import resource

    def used():
        found = resource.getrusage(resource.RUSAGE_CHILDREN)
        return found.ru_utime + found.ru_stime

    times = []
    for _ in range(3):
        began = used()
        done = call("--help")
        times.append(used() - began)
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("run", "status", "clean", "data", "report"))
    assert min(times) < 0.5, times
    heavy = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, cwd=ROOT)
    assert heavy.stdout.splitlines()[-1] == "[]"


COMMANDS = ["", "run", "plan", "status", "clean", "report", "publish", "claims", "settings",
            "preconditions", "data", "data list",
            "data show", "data fetch", "data verify", "data add", "data cc3m", "data links", "data ids", "data faces",
            "data croissant", "scan", "repair", "protect", "attack", "measure", "train"]


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_explains_itself(words, capsys):
    with pytest.raises(SystemExit) as e:
        cli.main([*words.split(), "--help"])
    assert e.value.code == 0 and "usage: mcl_repro" in capsys.readouterr().out


def test_every_command_is_in_the_help(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    listed = re.findall(r"^    (\w+)(?: |$)", capsys.readouterr().out, re.M)
    assert set(listed) == {words.split()[0] for words in COMMANDS if words}


def test_version():
    assert call("--version").stdout.strip() == f"mcl_repro {mcl_repro.__version__}"


@pytest.mark.parametrize("words, says", [
    ((), "the following arguments are required: COMMAND"),
    (("dance",), "invalid choice: 'dance'"),
    (("run", "nobody"), "unknown paper 'nobody'; known: "),
    (("run", "--jobs", "0"), "not a whole number from 1"),
    (("run", "--set", "x"), "--set wants name=value, not 'x'"),
    (("run", "--role", "=y"), "--role wants name=value"),
    (("run", "--param", "a=[1"), "cannot be read"),
    (("run", "--notebooks", "/nowhere"), "no folder /nowhere"),
    (("report", "--runs", "/nowhere"), "there is no run in /nowhere/mini"),
    (("data", "show", "nobody"), "nobody"),
    (("data", "fetch", "nobody"), "nobody"),
    (("data", "add", "mine", "/nowhere"), "/nowhere"),
])
def test_wrong_calls_are_one_line_and_exit_2(words, says, tmp_path):
    fails(call(*words, cwd=tmp_path, MCL_REPRO_DATA=str(tmp_path)), says)


@pytest.mark.parametrize("option, value, says", [
    ("--profile", "huge", "unknown profile 'huge'"),
    ("--device", "tpu", "'tpu'"),
    ("--role", "jury=x", "unknown role 'jury'"),
    ("--set", "no.such=1", "no.such"),
    ("--param", "no_such=1", "no parameter 'no_such'"),
    ("--seeds", "0", "argument --seeds: '0' is not a whole number from 1 to 1,000"),
])
def test_wrong_settings_are_refused_before_anything_runs(option, value, says, tmp_path):
    write(tmp_path/"nbs", "ubt.ipynb", STANDARD)
    fails(call("run", "--notebooks", tmp_path/"nbs", "--runs", tmp_path/"runs", option, value), re.escape(says))
    assert not (tmp_path/"runs").exists() or not list((tmp_path/"runs").rglob("*.ipynb"))


def test_run_says_where_the_report_is_and_reruns_in_seconds(tmp_path):
    write(tmp_path/"nbs", "ubt.ipynb", STANDARD + "value = 80.0", TABLE)
    runs, page = tmp_path/"my runs", tmp_path/"my runs/smoke/index.html"
    words = ["run", "ubt", "--profile", "smoke", "--device", "cpu", "--notebooks", tmp_path/"nbs", "--runs", runs,
             "--param", "value=81.5"]
    done = call(*words)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"report: {page}\n" and "ubt: complete in" in done.stderr
    assert ",81.5," in (page.parent/"tables/ubt.table1.csv").read_text() and "--param value=81.5" in page.read_text()
    began = time.perf_counter()
    again = call(*words)
    assert again.returncode == 0 and again.stdout == done.stdout and "unchanged" in again.stderr
    assert time.perf_counter() - began < 10
    status = call("status", "--profile", "smoke", "--runs", runs)
    assert status.returncode == 0 and "notebook ubt: complete" in status.stdout


def test_a_notebook_that_stops_is_one_line_with_the_place_of_its_traceback(tmp_path):
    write(tmp_path/"nbs", "ubt.ipynb", STANDARD, "1/0")
    done = call("run", "--profile", "smoke", "--device", "cpu", "--notebooks", tmp_path/"nbs",
                "--runs", tmp_path/"runs")
    error, = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and "ZeroDivisionError" in error and "ubt.failed.html" in error
    assert "Traceback" not in done.stderr
    assert done.stdout.startswith("report: ")


def test_report_is_written_anew_and_its_path_printed(tmp_path):
    made = tidy("ubt.table5", [dict(defense="UBT", metric="CA", value=71.0)])
    write_table(made, "ubt.table5", tmp_path/"mini", "Made-up.")
    done, page = call("report", "--runs", tmp_path), tmp_path/"mini/index.html"
    assert done.stdout == f"{page}\n" and "UBT Table V" in page.read_text()


def test_status_and_clean_of_a_real_store(tmp_path):
    lab = Lab("smoke", device="cpu", runs=tmp_path, progress=False)
    lab.run([lab.node(count, n=n) for n in (1, 2)])
    lab.store.open()
    done = call("status", "--profile", "smoke", "--runs", tmp_path, "--all")
    assert done.returncode == 0, done.stderr
    assert "2 stages: 2 done" in done.stdout and "lab_for_cli.count" in done.stdout
    assert call("clean", "--runs", tmp_path).stdout == "nothing to remove\n"
    spoilt = tmp_path/"store/quarantine/spoilt"
    spoilt.mkdir(parents=True)
    told = call("clean", "--runs", tmp_path).stdout
    assert "it was found damaged and set aside" in told and "would remove 1 things, 0.0 MB; do it with: " in told
    assert call("clean", "--runs", tmp_path, "--yes", "2").stderr.startswith("error: 1 things would go, not 2")
    assert spoilt.exists()
    assert "deleted 1 that had been" in call("clean", "--runs", tmp_path, "--yes", "1").stdout and not spoilt.exists()


def test_data_commands(tmp_path):
    for i in range(3):
        Image.new("RGB", (8, 8), (i * 50, 0, 0)).save(tmp_path/f"{i}.png")
    (tmp_path/"pairs.csv").write_text("image,caption\n" + "".join(f"{i}.png,picture {i}\n" for i in range(3)))
    env = dict(MCL_REPRO_DATA=str(tmp_path/"registry"))
    listed = call("data", "list", **env)
    assert listed.returncode == 0 and "flickr8k" in listed.stdout and "world" in listed.stdout, listed.stderr
    added = call("data", "add", "mine", tmp_path, **env)
    assert added.returncode == 0 and "added mine" in added.stdout, added.stderr
    assert "mine" in call("data", "list", **env).stdout and str(tmp_path) in call("data", "show", "mine", **env).stdout
    assert call("data", "verify", "mine", **env).returncode == 0
    (tmp_path/"1.png").write_bytes(b"no picture")
    spoilt = call("data", "verify", "mine", **env)
    assert spoilt.returncode == 2 and "WRONG" in spoilt.stdout and spoilt.stderr.startswith("error: ")


def test_values_are_read_and_never_built(tmp_path):
    mark = tmp_path/"mark"
    with pytest.raises(SettingsError):
        parse_value(f'!!python/object/apply:os.mkdir ["{mark}"]')
    assert not mark.exists()
    assert [parse_value(text) for text in ("1e-4", "007", "off")] == [1e-4, "007", "off"]
    assert parse_pairs(["a=b=c"], "--param") == {"a": "b=c"}


def completions(line):
    "What a shell is offered after `line`."
    done = call(_ARGCOMPLETE="1", COMP_LINE=line, COMP_POINT=str(len(line)), _ARGCOMPLETE_STDOUT_FILENAME="/dev/stdout")
    return done.stdout.replace("\x0b", " ").split()


@pytest.mark.parametrize("line, offered", [
    ("mcl_repro cl", ["clean", "claims"]),
    ("mcl_repro run --profile ", ["mini", "smoke", "paper", "photos"]),
    ("mcl_repro run --dev", ["--device"]),
    ("mcl_repro plan --device c", ["cpu", "cuda"]),
    ("mcl_repro claims --verdict not", ["not_replicated", "not_testable"]),
    ("mcl_repro preconditions ", ["-h", "--help", "--profile", "--runs", "ubt", "mem", "cleanclip", "cfbd"]),
    ("mcl_repro settings ", ["-h", "--help", "ubt", "mem", "cleanclip", "cfbd"]),
    ("mcl_repro data links here --split ", ["train", "validation"]),
    ("mcl_repro protect a.csv --format w", ["webdataset"]),
    ("mcl_repro scan a.csv --method c", ["contrast", "cfbd"]),
    ("mcl_repro run m", ["mem"]),
    ("mcl_repro claims ubt.c01", ["ubt.c01"]),
    ("mcl_repro data show flickr3", ["flickr30k"]),
])
def test_a_shell_completes_commands_options_and_values(line, offered):
    assert completions(line) == offered


def test_a_shell_completes_what_plug_ins_can_add():
    assert completions("mcl_repro repair --method f") == ["finetune"]
    assert "badnets" in completions("mcl_repro attack a.csv --attack ")


@pytest.mark.parametrize("words, says", [
    (("status", "--profile", "minni"), "unknown profile 'minni'; known: mini, smoke, paper, photos"),
    (("run", "--device", "gpu"), "unknown device 'gpu'; known: auto, cpu, cuda"),
    (("claims", "--verdict", "proved"),
     "unknown verdict 'proved'; known: replicated, in_direction, not_replicated, inconclusive, "
     "depends_on_our_reading, paper_disagrees, contradicted, not_testable"),
    (("preconditions", "uvt"), "unknown paper 'uvt'; known: ubt, mem, cleanclip, cfbd"),
    (("settings", "uvt"), "unknown paper 'uvt'; known: ubt, mem, cleanclip, cfbd"),
])
def test_a_value_that_is_none_of_a_closed_set_is_told_what_there_is(words, says):
    fails(call(*words), re.escape(says))


def test_a_closed_pipe_is_no_traceback():
    line = f'"{sys.executable}" -m mcl_repro data list | head -1'
    done = subprocess.run(line, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("name") and "Traceback" not in done.stderr


def test_a_set_of_the_manifest_can_be_added_from_a_folder(tmp_path):
    folder = tmp_path/"photos"
    (folder/"images").mkdir(parents=True)
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (8, 8), "red").save(folder/"images" / name)
    captions = [f"{name}.jpg#{i}\tcaption {i} of {name}\n" for name in "ab" for i in range(5)]
    (folder/"Flickr8k.token.txt").write_text("".join(captions))
    (folder/"Flickr_8k.trainImages.txt").write_text("a.jpg\n")
    (folder/"Flickr_8k.testImages.txt").write_text("b.jpg\n")
    done = call("data", "add", "flickr8k", str(folder), cwd=tmp_path, MCL_REPRO_DATA=str(tmp_path/"registry"))
    assert done.returncode == 0
    assert done.stderr.splitlines()[:2] == ["flickr8k:train has 1 images, where 6,000 are expected",
                                            "flickr8k:train has 5 pairs, where 30,000 are expected"]
    assert "flickr8k:train (1 images, 5 pairs), flickr8k:test (1 images, 5 pairs)" in done.stdout
