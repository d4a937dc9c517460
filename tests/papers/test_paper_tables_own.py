"""Attacks and defences of plug-ins in the papers' tables: picked up by name alone, in every process, and nothing else
changes.
"""
import json
import linecache
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from mcl_repro.run import batch, headless
from mcl_repro.tools import plugins as P
from mcl_repro.attacks.base import Attack, ATTACKS, make_attack
from mcl_repro.core.errors import SettingsError
from mcl_repro.papers.plan import Experiments
from mcl_repro.lab.lab import Lab
from mcl_repro.tools.repairing import Method, METHODS
from mcl_repro.report.tables import read_table
from mcl_repro.run.notebooks import STANDARD

ROOT = Path(batch.__file__).parents[2]
CODE = """
from dataclasses import dataclass
from mcl_repro.attacks.base import Attack
import torch

@dataclass(frozen=True)
class Dots(Attack):
    name, uses_rng = "dots", False

    def paint(self, images, rng):
        images[:, ::3, ::3] = 0
        return images

def soften(clip, pairs, *, trusted, images=None, by=.01):
    assert len(pairs) and len(trusted) and len(images)
    with torch.no_grad():
        clip.model.logit_scale -= by
"""

def install(
    folder, module="dotted", code=CODE,
    points="[mcl_repro.attacks]\ndots = dotted:Dots\n[mcl_repro.repairs]\nsoften = dotted:soften\n",
):
    "A package as pip leaves it: a module and its dist-info."
    folder.mkdir(exist_ok=True)
    (folder/f"{module}.py").write_text(code)
    info = folder/f"{module}-1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info/"METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info/"entry_points.txt").write_text(points)
    return folder

@pytest.fixture(autouse=True)
def tables_as_before():
    "What a test registers is gone after it."
    before = dict(ATTACKS), dict(METHODS), list(P._loaded)
    P._loaded.clear()
    yield
    for table, was in zip((ATTACKS, METHODS), before):
        table.clear()
        table.update(was)
    P._loaded[:] = before[2]
    for module in ("dotted", "named", "packed", "packed.helpers"):
        sys.modules.pop(module, None)

@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")     # what several tests compute they compute once

@pytest.fixture
def lab(tmp_path, store):
    return Lab("smoke", "cpu", tmp_path/"runs", store)

@pytest.fixture
def installed(tmp_path, monkeypatch):
    "A package that brings an attack and a defence, here and in processes that are started."
    folder = install(tmp_path/"site")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(folder)]))
    return folder

def planned(lab, names=(), table="ubt.table1", more=(), cls=Experiments):
    "Two defences on every attack, as a paper's notebook plans them."
    e = cls(lab, [table], attacks={"BadNet": "BadNet", "Blended": "Blended"}, attack_names=names)
    e.defences = {"No defense": lambda c: c.victim, "UBT": lambda c: c.victim}
    for a in e.attacks:
        e.line(table, ["No defense", "UBT"], dict(attack=a), attack=a)
    for which in more:
        e.line(table, **which)
    return e

def named(e):
    return [(l.labels.get("attack"), l.defence) for l in e.lines]


# without a plug-in

def test_without_plug_ins_the_plan_is_what_it_was(lab):
    e = planned(lab)
    assert type(e.attacks) is dict
    assert named(e) == [(a, d) for a in ("BadNet", "Blended") for d in ("No defense", "UBT")]
    for l in e.lines:
        from mcl_repro.papers.stages import classification
        alone = lab.node(
            classification, clip=e.chain(l.labels["attack"]).victim, test=lab.role("zeroshot"),
            attack=dict(lab.profile.attacks[l.labels["attack"]]), target="banana", seed=0,
        )
        assert [n.key for n in l.found] == [alone.key]
    assert e.added("ubt.table1") == "" and P.plugins_key() == headless._plugins() == ""

def test_the_other_lines_keep_their_keys(installed, lab):
    keys = lambda e: {n: [m.key for m in l.found] for n, l in zip(named(e), e.lines)}
    with_it = keys(planned(lab))
    assert set(with_it) == {(a, d) for a in ("BadNet", "Blended", "dots") for d in ("No defense", "UBT", "soften")}
    for n in [n for n in ATTACKS if n.startswith("dots")]:
        del ATTACKS[n]
    del METHODS["soften"]
    without = keys(planned(lab))
    assert without.items() < with_it.items() and len(without) == 4


# what is planned

def test_only_lists_of_defences_and_lines_of_attacks_get_more(installed, lab):
    more = [
        dict(defences=["No defense"], labels=dict(attack="BadNet"), attack="none"),
        dict(defences=["UBT"], labels=dict(backdoor_number=750), attack="BadNet", count=6),
        dict(defences=["No defense", "UBT"], labels={}, attack="none"),
    ]
    e = planned(lab, ["BadNet", "dots"], more=more)
    assert named(e)[6:] == [
        ("BadNet", "No defense"), ("dots", "No defense"), (None, "UBT"), (None, "No defense"), (None, "UBT"),
        (None, "soften"),
    ]
    # the clean line beside an attack is of no attack
    assert e.lines[7].chains[0].attack == "none"
    assert list(e.attacks) == ["BadNet"]
    assert len(e.attacks) == 1
    assert "dots" not in e.attacks
    assert e.attacks["dots"] == e.attacks.get("dots") == P.own_attacks()["dots"]
    with pytest.raises(KeyError):
        e.attacks["dashes"]
    assert e.attacks.get("dashes") is None

def test_attacks_that_are_named_are_all_there_are(installed, lab):
    assert {a for a, _ in named(planned(lab, ["BadNet"]))} == {"BadNet"}
    with pytest.raises(SettingsError, match="name one of the paper's, BadNet, Blended"):
        planned(lab, ["dots"])
    with pytest.raises(SettingsError, match="unknown attack 'dashes' .* has BadNet, Blended, dots"):
        planned(lab, ["BadNet", "dashes"])

def test_an_attack_with_a_setting_to_guess_stays_out(tmp_path):
    P.register_attack(dataclass(frozen=True)(type(
        "Open",
        (Attack,),
        dict(
            name="open", uses_rng=False, paint=lambda self, images, rng: images, __annotations__=dict(size=int),
            __module__=__name__,
        ),
    )))
    assert "open" in ATTACKS and P.own_attacks() == {}

def test_a_table_that_no_paper_prints_keeps_the_papers_attacks(installed, lab):
    e = planned(lab, ["BadNet", "dots"], "cleanclip.main")
    e.run()
    e.table(
        "cleanclip.main",
        "A note.",
        extra=dict(
            title="All", factors=["attack", "defense", "metric"], columns=["attack", "metric"], unknown="not known"
        ),
    )
    ours, own = (read_table(lab.folder/"tables"/f"cleanclip.main{end}.csv") for end in ("", "_own"))
    assert set(ours.attack) == {"BadNet"}
    assert set(own.attack) == {"dots"}
    assert set(ours.defense) == set(own.defense) == {"No defense", "UBT", "soften"}
    assert "dots" in json.loads((lab.folder/"tables"/"cleanclip.main_own.json").read_text())["note"]


# the code counts

def test_another_code_is_another_node_and_is_refused_elsewhere(installed, lab):
    first = planned(lab)
    known = P.own_attacks()["dots"]["name"]
    for n in [n for n in ATTACKS if n.startswith("dots")]:
        del ATTACKS[n]
    del METHODS["soften"], sys.modules["dotted"]
    P._loaded.clear()
    (installed/"dotted.py").write_text(CODE.replace("= 0", "= 9"))
    shutil.rmtree(installed/"__pycache__", ignore_errors=True)
    # as old as it could be: the key is of what stands there
    os.utime(installed/"dotted.py", (1, 1))
    second = planned(lab)
    keys = lambda e, a, d: {n.key for l in e.lines if (l.labels["attack"], l.defence) == (a, d) for n in l.found}
    assert keys(first, "BadNet", "UBT") == keys(second, "BadNet", "UBT")
    assert not keys(first, "dots", "UBT") & keys(second, "dots", "UBT")
    assert not keys(first, "BadNet", "soften") & keys(second, "BadNet", "soften")
    with pytest.raises(SettingsError, match=f"'{known}' is none of"):
        make_attack(known)
    stale, = {l.models[0] for l in first.lines if (l.labels["attack"], l.defence) == ("BadNet", "soften")}
    with pytest.raises(SettingsError, match="defence soften is not here with the code"):
        P.repaired_clip(None, **stale.settings)

def test_the_hash_is_of_all_files_of_a_package_and_of_no_other(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path/"packed").mkdir()
    (tmp_path/"packed/__init__.py").write_text("from packed.helpers import soften")
    (tmp_path/"packed/table.json").write_text("1")
    (tmp_path/"packed/helpers.py").write_text("def soften(clip, pairs, *, by=.1): pass")
    from packed import soften
    way = P.as_method(soften)
    first = P.code_hash(way)
    (tmp_path/"other.py").write_text("x = 1")
    (tmp_path/"packed/__pycache__").mkdir(exist_ok=True)
    (tmp_path/"packed/__pycache__/x.pyc").write_bytes(b"1")
    assert P.code_hash(way) == first
    (tmp_path/"packed/table.json").write_text("2")
    second = P.code_hash(way)
    (tmp_path/"packed/helpers.py").write_text("def soften(clip, pairs, *, by=.1): return None\n")
    assert second != first
    (tmp_path/"packed/helpers.py").write_text("def soften(clip, pairs, *, by=.2): clip.x")
    with pytest.raises(SettingsError, match="packed.helpers was edited after it was imported"):
        P.code_hash(way)

def test_what_stands_in_a_notebook_is_known_by_its_functions():
    def made(code):
        name, space = f"<cell {len(linecache.cache)}>", dict(__name__="__main__", Attack=Attack, dataclass=dataclass)
        # as a notebook's kernel keeps its cells
        linecache.cache[name] = len(code), None, code.splitlines(True), name
        exec(compile(code, name, "exec"), space)
        return space
    code = (
        "def value(): return {}\n@dataclass(frozen=True)\nclass A(Attack):\n    width: int = {}\n    name, "
        "uses_rng = 'a', False\n    def paint(self, images, rng): images[:] = value(); return images\ndef "
        "f(clip, pairs, *, by=.1): value()"
    )
    hashes = [
        (P.code_hash(s["A"]), P.code_hash(P.as_method(s["f"])))
        for s in map(made, (code.format(1, 2), code.format(1, 2), code.format(3, 2), code.format(1, 4)))
    ]
    assert hashes[0] == hashes[1] and len({h[0] for h in hashes}) == 3 and len({h[1] for h in hashes}) == 2


# the stage

def work_in(folder):
    (folder/"out").mkdir(parents=True)
    return SimpleNamespace(out=folder/"out", scratch=folder/"scratch", device="cpu", progress=None)

def test_a_repair_that_was_stopped_before_its_commit_is_made_again(tmp_path, installed, lab):
    e = planned(lab, ["BadNet"])
    c = e.chain("BadNet")
    node = next(l.models[0] for l in e.lines if l.defence == "soften")
    inputs = dict(node.settings, clip=lab.run(c.victim), poisoned=lab.run(c.poisoned))
    work = work_in(tmp_path/"a")
    (work.scratch/"repair").mkdir(parents=True)
    (work.scratch/"repair"/"CARD.md").write_text("done")
    told = P.repaired_clip(work, **inputs)
    assert told == dict(model="smoke-RN", method="soften", refused=False, why="")
    assert (work.out / "clip.safetensors").is_file()
    again = work_in(tmp_path/"b")
    P.repaired_clip(again, **inputs)
    assert (work.out/"clip.safetensors").read_bytes() == (again.out/"clip.safetensors").read_bytes()

def test_a_method_that_trains_on_trusted_pairs_gets_these(lab):
    got = []
    def fit(clip, pairs, *, trusted, **other):
        got.append((pairs.name, trusted))
        clip.model.visual.conv1.weight.data += 1e-3
    P.register_repair("fit")(Method(fit, ("pairs",), "Fit.", holds_out="pairs"))
    e = planned(lab, ["BadNet"])
    assert P.takes(METHODS["fit"]) == {"pairs", "trusted"}
    lab.run(next(l.models[0] for l in e.lines if l.defence == "fit"))
    assert got == [("world:validation:200", None)]

def test_a_defence_that_fails_is_named_and_loses_nothing(lab):
    @P.register_repair("fails")
    def fails(clip, pairs):
        raise SettingsError("no such thing")
    e = planned(lab, ["BadNet"])
    with pytest.raises(SettingsError, match="no such thing"):
        e.run()
    assert all(lab.store.read(n.stage.name, n.key) for l in e.lines if l.defence != "fails" for n in l.found)


# other processes

def test_what_is_registered_here_alone_is_refused_before_workers_start(tmp_path, installed, store):
    lab = Lab("smoke", "cpu", tmp_path/"runs", store, engine="dask", jobs=1)
    planned(lab)
    P.register_repair("here_only")(Method(lambda clip, pairs, **other: None))
    with pytest.raises(SettingsError, match="here_only is registered in this process only"):
        planned(lab)
    import dask
    dask.config.set({"distributed.worker.preload": []})

def test_a_module_that_a_variable_names_is_loaded(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("MCL_REPRO_PLUGINS", "named, missing_module")
    (tmp_path / "named.py").write_text(
        "from mcl_repro.tools.plugins import register_attack, register_repair\n"
        + CODE.replace("@dataclass", "@register_attack\n@dataclass").replace(
            "def soften", "@register_repair('soften')\ndef soften"
        )
    )
    with pytest.warns(UserWarning, match="plugin missing_module .* ModuleNotFoundError"):
        told = P.load_plugins()
    assert told[told.kind == "module"].name.tolist() == ["named", "missing_module"]
    assert {"dots"} == set(P.own_attacks())
    assert {"soften"} == set(P.own_repairs())
    P.workers_load_plugins("dask")                                       # they load it, too
    import dask
    assert dask.config.get("distributed.worker.preload") == ["mcl_repro.tools.plugins"]
    dask.config.set({"distributed.worker.preload": []})


# when a notebook need not run again

def test_a_run_key_knows_the_plug_ins_and_their_code(installed, lab):
    key = lambda: headless.run_key(ROOT/"nbs/papers/ubt.ipynb", {"seeds": 1}, lab)
    with_it = key()
    assert key() == with_it
    P._loaded.clear()
    METHODS.pop("soften")
    [ATTACKS.pop(n) for n in list(ATTACKS) if n.startswith("dots")]
    del sys.modules["dotted"]
    (installed/"dotted.py").write_text(CODE + "# and more\n")
    shutil.rmtree(installed/"__pycache__", ignore_errors=True)
    changed = key()
    assert changed != with_it
    shutil.rmtree(installed/"dotted-1.0.dist-info")
    P._loaded.clear()
    assert headless._plugins() == "" and key() not in (with_it, changed)


# the whole way

PARAMETERS = "\n".join(f"{k} = {v!r}" for k, v in {**STANDARD, "tables": [], "attack_names": []}.items())
NOTEBOOK = """from mcl_repro.papers.plan import Experiments
from mcl_repro.lab.lab import Lab
lab = Lab(profile, device, runs, roles=roles, seeds=seeds, settings=overrides, jobs=jobs)
experiments = Experiments(lab, ["ubt.table1"], tables, lab.profile.ubt.attacks, attack_names)
experiments.defences = {"No defense": lambda c: c.victim, "Public CLIP": lambda c: experiments.clean}
for a in experiments.attacks:
    experiments.line("ubt.table1", list(experiments.defences)[:2], dict(attack=a), attack=a)
experiments.run()
experiments.table("ubt.table1", experiments.note("CC3M"))
lab.close()"""

def test_a_papers_notebook_shows_them_with_nothing_edited(tmp_path, installed):
    def cell(source, **about):
        return dict(cell_type="code", id=f"c{len(source)}", metadata=about, source=source, outputs=[],
                    execution_count=None)

    kernel = dict(display_name="python3", language="python", name="python3")
    notebook = dict(cells=[cell(PARAMETERS, tags=["parameters"]), cell(NOTEBOOK)], nbformat=4, nbformat_minor=5,
                    metadata=dict(kernelspec=kernel))
    (tmp_path/"nbs").mkdir()
    (tmp_path/"nbs/ubt.ipynb").write_text(json.dumps(notebook))
    command = [
        sys.executable, "-m", "mcl_repro", "run", "ubt", "--profile", "smoke", "--device", "cpu", "--jobs", "2",
        "--param", "attack_names=[BadNet, dots]", "--runs", str(tmp_path/"runs"), "--notebooks", str(tmp_path/"nbs"),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    table = read_table(tmp_path/"runs/smoke/tables/ubt.table1.csv").dropna(subset="value")
    assert set(zip(table.attack, table.defense)) == {
        (a, d) for a in ("BadNet", "dots") for d in ("No defense", "Public CLIP", "soften")
    }
    assert table[(table.attack == "dots") | (table.defense == "soften")].paper_value.isna().all()
    note = json.loads((tmp_path/"runs/smoke/tables/ubt.table1.json").read_text())["note"]
    assert "Plug-in attacks, not in the paper: dots" in note
    assert "Plug-in defences, not in the paper: soften (code " in note
    again = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert "unchanged, nothing to do" in again.stderr + again.stdout
