"""Bases: files that many artefacts have in common lie in the store once, and every artefact still counts for itself."""
import json, os, shutil, signal, subprocess, sys
from pathlib import Path

import pytest
from lab_bench import clean_all, clean_once, environment

from mcl_repro.core.errors import StoreError
from mcl_repro.core.files import sha256_of
from mcl_repro.lab.cleaning import clean_store
from mcl_repro.lab.lab import Lab
from mcl_repro.lab.nodes import stage
from mcl_repro.lab.status import read_plan, write_plan


def names(base):
    "A safetensors file with no tensors, which names a base."
    header = json.dumps({"__metadata__": {"base": json.dumps({"name": base})}}).encode()
    return len(header).to_bytes(8, "little") + header


@stage
def learn(work, *, table, seed):
    "A model that began with a table."
    with open(os.environ["LAB_STARTS"], "a") as log:
        log.write(f"learn{seed} {os.getpid()}\n")
    base = work.share(lambda path: path.write_text(f"table {table}"*1000))
    if os.environ.get("KILL_AFTER_SHARING"):
        os.kill(os.getpid(), signal.SIGKILL)
    (work.out/"clip.safetensors").write_bytes(names(base))
    return {"base": base}


def a_lab(folder):
    return Lab("smoke", device="cpu", runs=folder/"runs")


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_STARTS", str(tmp_path/"starts"))
    (tmp_path/"starts").touch()
    return a_lab(tmp_path)


def bases(lab):
    return sorted((lab.store.folder/"bases").iterdir())


def test_models_with_the_same_beginning_share_it(lab):
    one, two, other = lab.run([lab.node(learn, table=t, seed=s) for t, s in ((0, 0), (0, 1), (1, 0))])
    assert one.result == two.result != other.result and one.record["bases"] == [one.result["base"]]
    assert len(bases(lab)) == 2 and all(sha256_of(p) == p.stem for p in bases(lab))
    assert not list((lab.store.folder/"tmp").iterdir())
    assert {p.name for p in one.path.iterdir()} == {"clip.safetensors", "record.json"}


def test_what_names_no_base_has_none_in_its_record(lab):
    from lab_stages import make
    assert "bases" not in lab.run(lab.node(make, seed=0)).record


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data)//2] ^= 1
    path.write_bytes(data)


def to_link(path):
    aside = path.rename(path.parent.parent/"aside")
    path.symlink_to(aside)


HARMS = {"changed": (flip, "has changed"), "missing": (Path.unlink, "is missing"),
         "a link": (to_link, "is not a file of the store"), "empty": (lambda p: p.write_bytes(b""), "has changed")}


@pytest.mark.parametrize("harm,says", HARMS.values(), ids=HARMS)
def test_without_its_base_an_artefact_is_damaged_and_made_anew(lab, harm, says):
    nodes = [lab.node(learn, table=t, seed=0) for t in (0, 1)]
    lab.run(nodes)
    base = lab.store.base(lab.run(nodes[0]).result["base"])
    content = base.read_bytes()
    harm(base)
    with pytest.warns(UserWarning, match=rf"learn \w+ was damaged \(its base {base.name[:8]} {says}\)"):
        again, kept = lab.run(nodes)
    assert base.read_bytes() == content and not base.is_symlink()
    assert again.result["base"] == base.name and len(list((lab.store.folder/"quarantine").iterdir())) == 1
    assert lab.store.read(kept.record["stage"], kept.record["key"])


@pytest.mark.parametrize("name", ["../../precious", "0"*64, "x", "/etc/passwd"])
def test_a_name_that_is_no_checksum_is_never_followed(lab, name):
    attempt = lab.store.folder/"tmp"/"a-1"
    lab.store.open()
    attempt.mkdir()
    (attempt/"clip.safetensors").write_bytes(names(name))
    done = lab.store.commit(attempt, dict(stage="notebook.x", key="a"*40, result={}))
    with pytest.warns(UserWarning, match="is not a file of the store"):
        assert lab.store.read("notebook.x", "a"*40) is None
    assert done.record["bases"] == [name]


KILLED = "import sys, test_store as t\nfrom pathlib import Path\nlab = t.a_lab(Path(sys.argv[1]))\n" \
         "lab.run(lab.node(t.learn, table=0, seed=0))"


def run(folder, **more):
    found = environment(**more)
    found["PYTHONPATH"] += os.pathsep + str(Path(__file__).parent)
    command = [sys.executable, "-c", KILLED, str(folder)]
    return subprocess.run(command, env=found, capture_output=True, text=True, timeout=120)


def test_killed_between_base_and_artefact(tmp_path, lab):
    done = run(tmp_path, KILL_AFTER_SHARING="1")
    assert done.returncode == -signal.SIGKILL, done.stderr
    base, = bases(lab)
    assert sha256_of(base) == base.stem and not list(lab.store.objects.glob("*/*"))
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert bases(lab) == [base] and (tmp_path/"starts").read_text().count("learn0") == 2
    assert lab.run(lab.node(learn, table=0, seed=0)).result["base"] == base.name


def test_a_base_is_on_the_disk_before_it_has_its_name(lab, tmp_path, monkeypatch):
    from mcl_repro.lab import store
    order, flush, replace = [], store._flush, os.replace
    monkeypatch.setattr(store, "_flush", lambda path: (order.append(f"flush {path.name}"), flush(path)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(f"name {Path(b).suffix}"), replace(a, b)))
    lab.store.open()
    order.clear()
    part, write = lab.store.folder/"tmp"/"part.safetensors", lambda path: path.write_text("a table")
    name = lab.store.share(write, part)
    assert order == ["flush part.safetensors", "name .safetensors"] and lab.store.base(name).read_text() == "a table"
    # where it is known there is nothing to write
    assert lab.store.share(lambda path: pytest.fail("written again"), part, name) == name
    flip(lab.store.base(name))
    lab.store.share(write, part, name)
    assert lab.store.base(name).read_text() == "a table"


AT_ONCE = """
import sys, time
from pathlib import Path
from mcl_repro.lab.store import Store
store, own = Store(sys.argv[1]), sys.argv[2]
(store.folder/"tmp"/own).touch()
while len(list((store.folder/"tmp").glob("ready-*"))) < 3:
    time.sleep(.005)
for i in range(10):
    def write(path):
        path.write_text(f"table {i}"*10000)
    print(store.share(write, store.folder/"tmp"/f"{own}.safetensors"))
"""


def test_three_processes_bring_the_same_bases_at_once(lab):
    lab.store.open()
    command = [sys.executable, "-c", AT_ONCE, str(lab.store.folder)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes = [subprocess.Popen([*command, f"ready-{i}"], env=environment(), **pipes) for i in range(3)]
    said = [p.communicate(timeout=120) for p in processes]
    assert all(p.returncode == 0 for p in processes), said
    assert len({out for out, _ in said}) == 1 and len(bases(lab)) == 10
    assert all(sha256_of(p) == p.stem for p in bases(lab))


# ---- cleaning up

def planned(lab, keep):
    "Only these nodes are in the plan."
    path = lab.folder/"plan.json"
    plan = read_plan(path)
    only = {n.key for n in keep}
    write_plan(path, {**plan, "entries": {s: e for s, e in plan["entries"].items() if e["key"] in only}})


def test_cleaning_keeps_the_bases_of_what_is_kept(lab):
    keep, sibling, drop = (lab.node(learn, table=t, seed=s) for t, s in ((0, 0), (0, 1), (1, 0)))
    kept, _, dropped = lab.run([keep, sibling, drop])
    planned(lab, [keep])
    rows = clean_store(lab.store.folder, lab.runs)
    assert sorted(r["kind"] for r in rows) == ["artefact", "artefact", "base"] and len(bases(lab)) == 2
    size, = (r["bytes"] for r in rows if r["kind"] == "base")
    assert size == lab.store.base(dropped.result["base"]).stat().st_size
    clean_all(lab.store, lab.runs)
    assert [p.name for p in bases(lab)] == [kept.result["base"]]
    assert lab.store.read(kept.record["stage"], keep.key) and clean_store(lab.store.folder, lab.runs) == []


def test_cleaning_leaves_bases_alone_while_something_is_computed(lab):
    drop = lab.node(learn, table=1, seed=0)
    lab.run(drop)
    planned(lab, [])
    (lab.store.folder/"tmp"/f"{'e'*40}-1").mkdir()
    clean = lambda: sorted(r["kind"] for r in clean_all(lab.store, lab.runs, keep=["none"]))
    with lab.store.lock("e"*40):     # whose attempt may have found the base a moment ago
        assert clean() == ["artefact"]
        assert len(bases(lab)) == 1
    assert clean() == ["attempt", "base"] and bases(lab) == []


def test_a_base_that_somebody_came_to_need_is_not_removed(lab, monkeypatch):
    "Between saying what would go and removing it."
    from mcl_repro.lab import cleaning
    drop, late = (lab.node(learn, table=1, seed=s) for s in (0, 1))
    lab.run(drop)
    planned(lab, [])
    real = cleaning._remove
    def after_another_run(store, rows):
        assert "base" in {r["kind"] for r in rows}
        lab.run(late)
        real(store, rows)
    monkeypatch.setattr(cleaning, "_remove", after_another_run)
    clean_once(lab.store, lab.runs, keep=["none"])
    assert len(bases(lab)) == 1 and lab.store.read(late.stage.name, late.key)


def test_a_store_from_before_there_were_bases_is_read_and_gets_them(lab):
    from lab_stages import make
    old = lab.run(lab.node(make, seed=0))
    shutil.rmtree(lab.store.folder/"bases")
    again = a_lab(lab.runs.parent)
    assert again.run(again.node(make, seed=0)).record == old.record
    again.run(again.node(learn, table=0, seed=0))
    assert len(bases(again)) == 1


def test_no_room_for_a_base_is_said_in_one_line(lab, monkeypatch):
    import errno
    from mcl_repro.lab import store
    real = store._flush
    def full(path):
        if path.name == "base.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path)
    monkeypatch.setattr(store, "_flush", full)
    with pytest.raises(StoreError, match="disk full while running stage test_store.learn"):
        lab.run(lab.node(learn, table=0, seed=0))
    assert bases(lab) == [] and not list((lab.store.folder/"tmp").iterdir())
