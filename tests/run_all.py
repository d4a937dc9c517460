"""What `make test` does: ruff and import-linter, every notebook as a test, then pytest.

A tree that has passed already is not run again.

The order matters: what fails fast comes first, and pytest last, so that its closing line is the last thing one reads.
"""
import argparse
import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("nbs", "mcl_repro", "tests", "benchmarks", "settings.ini", "setup.py", "pyproject.toml", "constraints.txt",
           "Makefile", "data_manifest.yaml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md")
MADE = {"__pycache__", ".ipynb_checkpoints"}     # folders that running something leaves behind


def files_below(top: Path) -> list[Path]:
    "A file, or the files of a folder that are not made by running something."
    paths = [top] if top.is_file() else sorted(top.rglob("*"))
    return [p for p in paths if p.is_file() and not MADE & set(p.parts)]


def tree_hash() -> str:
    "Hash of every file that can change a test's result, and of the interpreter."
    digest = hashlib.sha256(sys.version.encode())
    for top in SOURCES:
        for path in files_below(ROOT/top):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def run(*command) -> str:
    "Run a command with one thread in each process, show and return what it prints; a failure ends the tests."
    print("$", *command[1:], flush=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = dict(os.environ, OMP_NUM_THREADS="1", PATH=path)
    process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    if process.wait():
        sys.exit(process.returncode)
    return "".join(lines)


def python(code: str) -> tuple:
    "A command that runs this code."
    return sys.executable, "-c", code


def notebooks(path: str, workers: int, flags: str = "") -> tuple:
    "The command that runs notebooks as tests: those of a folder and of the folders in it, or one."
    options = f"n_workers={workers}, timing=True, do_print=True, flags={flags!r}"
    return python(f"from nbdev.test import nbdev_test; nbdev_test({path!r}, {options})")


def lint():
    "The layout of library, notebooks and tests; then the rooms: who imports whom."
    run(sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise", ".")
    run(*python("from importlinter.cli import lint_imports_command; lint_imports_command(['--no-cache', '--no-logo'])"))


def on_gpu():
    "The cells and tests that need a GPU; where there is none, the reason why they are left out."
    import torch
    if not torch.cuda.is_available():
        print(f"skipped: torch {torch.__version__} sees no GPU here, and cells and tests marked cuda need one")
        return
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    for path in files_below(ROOT/"nbs"):
        if path.suffix == ".ipynb" and "#| cuda" in path.read_text(encoding="utf-8"):
            run(*notebooks(str(path.relative_to(ROOT)), 1, "cuda"))
    run(sys.executable, "-m", "pytest", "tests", "-q", "-m", "cuda", "--color=no", "--durations=5")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--force", action="store_true", help="run although this tree has passed already")
    parser.add_argument("--lint", action="store_true", help="only ruff and import-linter")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cuda: only what needs a GPU")
    args = parser.parse_args()
    if args.lint:
        return lint()
    if args.device == "cuda":
        return on_gpu()
    stamp = ROOT/".stamps"/tree_hash()
    if stamp.exists() and not args.force:
        print("nothing changed since this tree passed (make test FORCE=1 runs it again); it ended with")
        print(stamp.read_text(encoding="utf-8").rstrip())
        return None
    lint()
    run(*notebooks("nbs", 2))
    pytest = ("pytest", "tests", "-q", "-n", "2", "--dist", "loadfile", "--color=no", "--durations=10")
    output = run(sys.executable, "-m", *pytest)
    last = output.strip().splitlines()[-1]
    print(last)
    stamp.parent.mkdir(exist_ok=True)
    stamp.write_text(last + "\n", encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
