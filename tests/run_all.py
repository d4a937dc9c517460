"""What `make test` does: every notebook as a test, the tutorials too, then pytest. A tree that has passed already is not run again.

The order matters: pytest comes last, so that its closing line is the last thing one reads.
"""
import argparse, hashlib, os, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("nbs", "mcl_repro", "tests", "settings.ini", "setup.py", "constraints.txt", "Makefile", "data_manifest.yaml", "README.md")


def tree_hash() -> str:
    "Hash of every file that can change a test's result, and of the interpreter."
    digest = hashlib.sha256(sys.version.encode())
    for top in SOURCES:
        for path in sorted([ROOT/top] if (ROOT/top).is_file() else (ROOT/top).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts and ".ipynb_checkpoints" not in path.parts:
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def run(*command) -> str:
    "Run a command of this environment, one thread in each process, show its output as it comes, and return it; a failure ends the tests."
    print("$", *command[1:], flush=True)
    environment = dict(os.environ, OMP_NUM_THREADS="1", PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    process, lines = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True), []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    if process.wait(): sys.exit(process.returncode)
    return "".join(lines)


def notebooks(path, workers, flags=""): return sys.executable, "-c", f"from nbdev.test import nbdev_test; nbdev_test({path!r}, n_workers={workers}, timing=True, do_print=True, flags={flags!r})"


def on_gpu():
    "The cells and tests that need a GPU; where there is none, the reason why they are left out."
    import torch
    if not torch.cuda.is_available(): return print(f"skipped: torch {torch.__version__} sees no GPU here, and cells and tests marked cuda need one")
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    for path in sorted((ROOT/"nbs").glob("*.ipynb")):
        if "#| cuda" in path.read_text(encoding="utf-8"): run(*notebooks(str(path.relative_to(ROOT)), 1, "cuda"))
    run(sys.executable, "-m", "pytest", "tests", "-q", "-m", "cuda", "--color=no", "-p", "no:cacheprovider", "--durations=5")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--force", action="store_true", help="run although this tree has passed already")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cuda: only the cells and tests that need a GPU")
    args = parser.parse_args(); force = args.force
    if args.device == "cuda": return on_gpu()
    stamp = ROOT/".stamps"/tree_hash()
    if stamp.exists() and not force:
        print("nothing changed since this tree passed (make test FORCE=1 runs it again); it ended with")
        return print(stamp.read_text(encoding="utf-8").rstrip())
    for folder in ("nbs", "nbs/tutorials"): run(*notebooks(folder, 2))
    output = run(sys.executable, "-m", "pytest", "tests", "-q", "-n", "2", "--dist", "loadfile", "--color=no", "-p", "no:cacheprovider", "--durations=10")
    print(output.strip().splitlines()[-1])
    stamp.parent.mkdir(exist_ok=True)
    stamp.write_text(output.strip().splitlines()[-1] + "\n", encoding="utf-8")


if __name__ == "__main__": main()
