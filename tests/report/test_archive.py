"""A run folder as an RO-Crate, data sets as Croissant, and what to cite:
read back by others' readers and compared with what is there."""

import configparser
import hashlib
import json
import os
import re
import shutil
import socket
from pathlib import Path
from urllib.parse import unquote

import pytest
from rocrate.rocrate import ROCrate

from mcl_repro.report import archive
from mcl_repro.report.croissant import croissant
from mcl_repro.run import batch, headless
from mcl_repro.cli import main as cli
from mcl_repro.core.errors import DataError, SettingsError
from mcl_repro.core.files import package_yaml
from mcl_repro.data.registry import open_data, read_manifest, resolve
from mcl_repro.run.notebooks import STANDARD

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def sha(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def notebook(folder, name, start, end, exception=None, outputs=(), **ours):
    "As papermill and the batch leave one."
    run = dict(
        start_time=start,
        end_time=end,
        duration=12.5,
        exception=exception,
        version="2.7.0",
        input_path=f"1x_{name.split('.')[0]}.ipynb",
        output_path=f"{name}.ipynb",
        parameters=dict(
            profile="smoke",
            jobs=2,
            seeds=1,
            device="auto",
            roles=dict(own="/data/me/pairs.csv"),
            overrides={},
            runs="/data/me/runs",
        ),
    )
    ours |= dict(outputs={f: sha(folder / f) for f in outputs}) if outputs else {}
    path = folder / "notebooks" / f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(dict(cells=[], metadata=dict(papermill=run, mcl_repro=ours), nbformat=4, nbformat_minor=5))
    )
    path.with_suffix(".html").write_text("<p>page</p>")


@pytest.fixture
def folder(tmp_path):
    "ubt complete, mem failed after a complete run, cfbd killed; and things that are nobody's business."
    run = tmp_path / "a run" / "smoke"
    for kind, id, files, about in (
        ("tables", "ubt.table1", ("csv", "md", "tex"), dict(title="Accuracy and attack success")),
        ("figures", "ubt.fig1", ("png", "svg", "csv"), dict(alt="A picture")),
        ("figures", "mem.fig 2", ("png",), dict(alt="Noise")),
    ):
        (run / kind).mkdir(parents=True, exist_ok=True)
        for k in files:
            (run / kind / f"{id}.{k}").write_bytes(f"{id}.{k}".encode() * 7)
        (run / kind / f"{id}.json").write_text(
            json.dumps(
                dict(
                    about,
                    id=id,
                    notebook=id.split(".")[0],
                    files={f"{id}.{k}": sha(run / kind / f"{id}.{k}") for k in files},
                )
            )
        )
    (run / "claims.csv").write_text("id,paper,audit,verdict,margin,evidence\nubt.c1,ubt,holds,replicated,,\n")
    (run / "index.html").write_text("<p>report</p>")
    wrote = lambda p: sorted(f.relative_to(run).as_posix() for f in run.glob(f"[tf]*/{p}.*"))
    notebook(
        run,
        "ubt",
        "2026-01-02T03:00:00.123456+00:00",
        "2026-01-02T03:00:12.654321+00:00",
        outputs=wrote("ubt"),
        command="mcl_repro run ubt --profile smoke",
        key="k",
    )
    notebook(
        run,
        "mem",
        "2026-01-02T04:00:00+00:00",
        "2026-01-02T04:00:12+00:00",
        outputs=wrote("mem"),
        command="mcl_repro run mem",
    )
    notebook(
        run,
        "mem.failed",
        "2026-01-03T04:00:00+00:00",
        "2026-01-03T04:00:05+00:00",
        exception=True,
        error="FileNotFoundError: '/data/me/secret/x.csv' (traceback in runs/smoke/notebooks/mem.failed.html)",
        command="mcl_repro run mem --role own=/data/me/pairs.csv",
    )
    notebook(run, "cfbd", "2026-01-01T04:00:00+00:00", None)
    section = lambda written, **more: dict(
        written=written,
        device="cpu",
        seeds=[0],
        code=dict(commit=COMMIT, dirty=False),
        packages=dict(python="3.11.7", torch="2.13.0+cpu", papermill="2.7.0"),
        hardware=dict(cpu="A CPU"),
        data=dict(
            train=dict(source="world:train:10", fingerprint="a" * 64),
            scan=dict(source="world:train:10", fingerprint="a" * 64),
            own=dict(source="…/pairs.csv", fingerprint="b" * 64),
            real=dict(source="flickr8k:test", fingerprint="c" * 64),
        ),
        **more,
    )
    (run / "provenance.json").write_text(
        json.dumps(
            dict(
                format=1,
                profile="smoke",
                notebooks=dict(
                    ubt=section("2026-01-02T03:00:11+00:00"),
                    mem=section("2026-01-03T04:00:03+00:00"),
                    interactive=section("2026-01-02T00:00:00+00:00"),
                ),
            )
        )
    )
    for name in (
        ".provenance.lock",
        "notebooks/.ubt.lock",
        "notebooks/.ubt.77.ipynb",
        "x.lock",
        "store/s/k/record.json",
        ".git/config",
        "tables/.ubt.table1.csv.part",
    ):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("not for others")
    (run / "elsewhere").symlink_to(tmp_path)
    (run / "elsewhere.csv").symlink_to(run / "claims.csv")
    return run


def graph(folder):
    return {e["@id"]: e for e in json.loads(archive.write_crate(folder).read_text(encoding="utf-8"))["@graph"]}


def many(value):
    return value if isinstance(value, list) else [] if value is None else [value]


def ids(value):
    return [v["@id"] for v in many(value)]


def references(value):
    if isinstance(value, dict):
        yield value["@id"]
    for v in value if isinstance(value, list) else ():
        yield from references(v)


# ---- the crate


def test_every_file_is_there_with_its_size_and_hash_and_nothing_else_is_described(folder):
    archive.write_crate(folder)
    crate = ROCrate(folder)
    files = {unquote(e.id): e for e in crate.data_entities}
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and not p.is_symlink()}
    assert (
        set(files) == {n for n in there if not re.search(r"(^|/)\.|\.lock$|^store/|^ro-crate-", n)} and len(files) == 21
    )
    for name, e in files.items():
        assert (
            e.type == "File"
            and e["contentSize"] == str((folder / name).stat().st_size)
            and e["sha256"] == sha(folder / name)
            and "/" in e["encodingFormat"]
        ), name
    assert (
        files["tables/ubt.table1.csv"]["description"] == "Accuracy and attack success"
        and files["figures/ubt.fig1.png"]["description"] == "A picture"
    )
    assert [
        files[n]["encodingFormat"] for n in ("tables/ubt.table1.tex", "figures/ubt.fig1.svg", "notebooks/ubt.ipynb")
    ] == ["application/x-tex", "image/svg+xml", "application/x-ipynb+json"]


def test_no_reference_dangles_and_no_term_is_undefined(folder):
    by = graph(folder)
    outside = {e for e in by if re.match("https?:", e)} | {"https://w3id.org/ro/crate/1.1"}
    assert {r for e in by.values() for k, v in e.items() if k[0] != "@" for r in references(v)} - set(
        by
    ) - outside == set()
    context = json.loads((folder / archive.METADATA).read_text())["@context"]
    assert context == [
        "https://w3id.org/ro/crate/1.1/context",
        {"sha256": "https://w3id.org/ro/terms/workflow-run#sha256"},
    ]
    from rocrate import vocabs  # of a later version: a term that is not even there is certainly wrong

    assert {k for e in by.values() for k in e if k[0] != "@"} - set(vocabs.RO_CRATE["@context"]) <= {"sha256"}
    assert {t for e in by.values() for t in many(e["@type"])} <= set(vocabs.RO_CRATE["@context"])
    reached, queue = set(), ["./", archive.METADATA]
    while queue:
        if (i := queue.pop()) in reached or i not in by:
            continue
        reached.add(i)
        queue += [r for k, v in by[i].items() if k[0] != "@" for r in references(v)]
    assert set(by) - reached == {archive.PREVIEW}


def test_what_the_profile_requires_is_there(folder):
    by = graph(folder)
    root = by["./"]
    assert by[archive.METADATA]["conformsTo"] == {"@id": "https://w3id.org/ro/crate/1.1"} and by[archive.METADATA][
        "about"
    ] == {"@id": "./"}
    assert (
        root["conformsTo"] == {"@id": archive.PROFILE}
        and by[archive.PROFILE]["@type"] == "CreativeWork"
        and by[archive.PROFILE]["version"] == "0.5"
    )
    assert (
        root["name"]
        and root["description"]
        and root["datePublished"] == "2026-01-03T04:00:05+00:00"
        and ids(root["license"]) == ["https://spdx.org/licenses/Apache-2.0"]
    )
    assert (
        ids(root["mentions"])
        == ["#run-cfbd", "#run-ubt", "#run-mem", "#run-mem.failed", "#report"]
        == [i for i, e in by.items() if e["@type"] == "CreateAction"]
    )
    for a in (by[i] for i in ids(root["mentions"])):
        assert (
            by[a["instrument"]["@id"]]["@type"] in ("SoftwareSourceCode", "SoftwareApplication")
            and a["name"]
            and a["description"]
            and a["result"]
        )
        assert a["actionStatus"] in (
            "http://schema.org/CompletedActionStatus",
            "http://schema.org/FailedActionStatus",
        ) and ("error" in a) == a["actionStatus"].endswith("FailedActionStatus")
        for k in ("startTime", "endTime"):
            assert k not in a or re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", a[k])
        assert {t for o in (*ids(a.get("object")), *ids(a["result"])) for t in many(by[o]["@type"])} <= {
            "File",
            "Dataset",
            "PropertyValue",
        }
    assert not [v for e in by.values() for k, v in e.items() if k != "hasPart" and isinstance(v, list) and len(v) == 1]


def test_an_action_says_what_ran_on_what_with_what(folder):
    by = graph(folder)
    a = by["#run-ubt"]
    tool = by[a["instrument"]["@id"]]
    assert (
        (a["startTime"], a["endTime"]) == ("2026-01-02T03:00:00+00:00", "2026-01-02T03:00:12+00:00")
        and "papermill 2.7.0" in a["description"]
        and "mcl_repro run ubt --profile smoke" in a["description"]
    )
    assert (tool["name"], tool["version"], by[tool["programmingLanguage"]["@id"]]["name"][:7]) == (
        "1x_ubt.ipynb",
        COMMIT,
        "Jupyter",
    ) and ids(tool["citation"]) == ["https://arxiv.org/abs/2409.19526"]
    assert {
        (by[i]["name"], by[i]["softwareVersion"], by[i]["identifier"]) for i in ids(tool["softwareRequirements"])
    } >= {("torch", "2.13.0+cpu", "pkg:pypi/torch@2.13.0%2Bcpu"), ("python", "3.11.7", "pkg:generic/python@3.11.7")}
    objects = [by[i] for i in ids(a["object"])]
    assert {(o["name"], o["identifier"]) for o in objects if o["@type"] == "Dataset"} == {
        ("world:train:10", "a" * 64),
        ("…/pairs.csv", "b" * 64),
        ("flickr8k:test", "c" * 64),
    }
    (world,) = (o for o in objects if o["name"] == "world:train:10")
    assert (
        world["alternateName"] == ["scan", "train"]
        and by[world["isBasedOn"]["@id"]]["license"] == archive.LICENCES["Apache-2.0"]
    )
    values = {o["name"]: o["value"] for o in objects if o["@type"] == "PropertyValue"}
    assert values == dict(
        profile="smoke", jobs=2, seeds=1, device="auto", roles='{"own": "…/pairs.csv"}', overrides="{}", runs="…/runs"
    )
    assert set(ids(a["result"])) == {
        "notebooks/ubt.ipynb",
        "notebooks/ubt.html",
        "claims.csv",
        "provenance.json",
        *(f"tables/ubt.table1.{k}" for k in ("csv", "md", "tex", "json")),
        *(f"figures/ubt.fig1.{k}" for k in ("png", "svg", "csv", "json")),
    }
    assert (
        "figures/mem.fig%202.png" in ids(by["#run-mem"]["result"])
        and "claims.csv" not in ids(by["#run-mem"]["result"])
        and ids(by["#report"]["result"]) == ["index.html"]
    )


def test_failed_and_killed_notebooks_have_failed(folder):
    by = graph(folder)
    failed = by["#run-mem.failed"]
    assert failed["actionStatus"] == by["#run-cfbd"]["actionStatus"] == "http://schema.org/FailedActionStatus" and by[
        "#run-mem"
    ]["actionStatus"].endswith("CompletedActionStatus")
    assert (
        failed["error"] == "FileNotFoundError: '…/x.csv' (traceback in runs/smoke/notebooks/mem.failed.html)"
        and "ended from outside" in by["#run-cfbd"]["error"]
        and "endTime" not in by["#run-cfbd"]
    )
    assert set(ids(failed["result"])) == {"notebooks/mem.failed.ipynb", "notebooks/mem.failed.html", "provenance.json"}
    # the one section of mem was written by the run that failed: the complete one before it gets neither commit nor data
    assert (
        by[failed["instrument"]["@id"]]["version"] == COMMIT
        and "version" not in by[by["#run-mem"]["instrument"]["@id"]]
        and not [i for i in ids(by["#run-mem"]["object"]) if i.startswith("#data")]
    )


@pytest.mark.parametrize("name", ["tables/ubt.table1.csv", "tables/ubt.table1.json", "figures/ubt.fig1.png"])
def test_an_edited_file_is_described_as_it_is_and_is_no_result(folder, name):
    before = sha(folder / name)
    (folder / name).write_bytes((folder / name).read_bytes() + b" ")
    e = (by := graph(folder))[name]
    assert (
        e["sha256"] == sha(folder / name) != before
        and e["contentSize"] == str((folder / name).stat().st_size)
        and f"Changed after the run: its notebook wrote sha256 {before}" in e["description"]
    )
    assert (
        name not in ids(by["#run-ubt"]["result"])
        and "files it wrote: 1" in by["#run-ubt"]["description"]
        and name in ids(by["./"]["hasPart"])
    )


def test_a_file_that_is_gone_is_not_described(folder):
    (folder / "figures/ubt.fig1.svg").unlink()
    by = graph(folder)
    assert "figures/ubt.fig1.svg" not in by and "files it wrote: 1" in by["#run-ubt"]["description"]


def test_no_absolute_path_and_no_secret_of_the_machine(folder):
    archive.write_crate(folder)
    for name in (archive.METADATA, archive.PREVIEW):
        text = (folder / name).read_text(encoding="utf-8")
        assert (
            "/data/me" not in text
            and str(folder) not in text
            and str(Path.home()) + "/" not in text
            and "not for others" not in text
            and socket.gethostname() not in text
        )
    assert not [i for i in graph(folder) if i.startswith("/") or i.startswith("file:") or ".." in i]


def test_the_same_folder_gives_the_same_bytes_wherever_it_is(folder, tmp_path):
    first = archive.write_crate(folder).read_bytes()
    page = (folder / archive.PREVIEW).read_bytes()
    assert archive.write_crate(folder).read_bytes() == first
    copy = tmp_path / "elsewhere" / "smoke"
    shutil.copytree(folder, copy, symlinks=True)
    for p in (copy / archive.METADATA, copy / archive.PREVIEW):
        p.unlink()
    for p in copy.rglob("*"):
        p.is_symlink() or os.utime(p, (0, 0))
    assert (
        archive.write_crate(copy).read_bytes() == first
        and (copy / archive.PREVIEW).read_bytes() == page
        and not list(copy.glob(".*.part"))
    )


def test_it_asks_no_network(folder, monkeypatch):
    def refuse(*a, **k):
        raise AssertionError("a network was asked")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    archive.write_crate(folder)
    page = (folder / archive.PREVIEW).read_text(encoding="utf-8")
    assert not re.search(r'\bsrc=|@import|url\(|<script|<link rel="stylesheet"', page) and {
        "1x_ubt.ipynb: completed",
        "1x_mem.ipynb: failed",
    } <= set(re.findall(r"<h3>(.*?)</h3>", page))
    links = {unquote(h) for h in re.findall(r'href="([^"#]+)"', page) if not re.match("https?:|data:", h)}
    assert links and all((folder / l).is_file() for l in links)


def test_real_data_are_named_in_the_licence(folder):
    assert (
        "This run also used flickr8k, …/pairs.csv: figures may show pictures of it"
        in graph(folder)["./"]["description"]
    )
    shutil.rmtree(folder / "notebooks")
    assert "also used" not in graph(folder)["./"]["description"]


@pytest.mark.parametrize("harm", ["empty", "broken", "odd"])
def test_a_poor_folder_has_a_poor_description_and_no_error(folder, harm):
    if harm == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    if harm == "broken":
        for p in (
            *folder.glob("*/*.json"),
            *folder.glob("notebooks/*.ipynb"),
            folder / "provenance.json",
            folder / "claims.csv",
        ):
            p.write_bytes(b"\xff{")
    if harm == "odd":
        for p in (*folder.glob("*/*.json"), *folder.glob("notebooks/*.ipynb")):
            p.write_text("[1]")
    by = graph(folder)
    assert by["./"]["datePublished"] and ids(by["./"].get("mentions")) == ([] if harm == "empty" else ["#report"])
    ROCrate(folder)


def test_a_run_never_fails_for_it(folder, monkeypatch):
    told = []
    assert (
        archive.update_crate(folder.parent / "none", told.append) is None
        and len(told) == 1
        and "no run in none" in told[0]
    )
    monkeypatch.setattr(archive, "read_citation", lambda: {})
    assert archive.update_crate(folder, told.append) is None and len(told) == 2 and archive.METADATA in told[1]
    with pytest.raises(SettingsError, match="there is no run in none"):
        archive.write_crate(folder.parent / "none")


def test_batch_and_report_command_write_it(tmp_path, monkeypatch, capsys):
    def one(job, folder, *rest, **more):
        notebook(folder, job.name, "2026-01-02T03:00:00+00:00", "2026-01-02T03:00:12+00:00")
        if job.name == "b":
            return headless.NotebookRun(job.name, "failed", 1.0, folder, SettingsError("b is bad"))
        return headless.NotebookRun(job.name, "complete", 1.0, folder)

    nbs = tmp_path / "nbs"
    nbs.mkdir()
    for n in ("10_a", "11_b"):
        (nbs / f"{n}.ipynb").write_text(
            json.dumps(
                dict(
                    cells=[
                        dict(
                            cell_type="code",
                            metadata=dict(tags=["parameters"]),
                            source="\n".join(f"{k} = {v!r}" for k, v in STANDARD.items()),
                        )
                    ]
                )
            )
        )
    monkeypatch.setattr(batch, "run_one", one)
    with pytest.raises(SettingsError, match="b is bad"):
        batch.run_notebooks(profile="smoke", runs=tmp_path / "runs", notebooks=nbs)
    folder = tmp_path / "runs/smoke"
    made = json.loads((folder / archive.METADATA).read_text())
    assert {"#run-a", "#run-b", "#report"} <= {e["@id"] for e in made["@graph"]}
    (folder / archive.METADATA).unlink()
    capsys.readouterr()
    assert (
        cli.main(["report", "--profile", "smoke", "--runs", str(tmp_path / "runs")]) == 0
        and capsys.readouterr() == (f"{folder / 'index.html'}\n", "")
        and json.loads((folder / archive.METADATA).read_text())["@graph"]
    )


# ---- data sets

MANIFEST = read_manifest()
REQUIRED = ("@context", "@type", "conformsTo", "name", "description", "license", "url", "creator", "datePublished")


@pytest.mark.parametrize("name", MANIFEST)
def test_croissant_of_every_data_set(name):
    "What mlcroissant 1.1 checks in the structure of a description, and what the specification requires of one."
    c, entry = croissant(name), MANIFEST[name]
    json.dumps(c)
    assert (
        c == croissant(name)
        and c["name"] == name
        and c["@type"] == "sc:Dataset"
        and c["conformsTo"] == "http://mlcommons.org/croissant/1.0"
        and entry["title"] in c["description"]
    )
    assert [k for k in REQUIRED if k not in c] == {
        "world": ["url"],
        "flickr_pascal": ["url", "creator", "datePublished"],
    }.get(name, [])
    assert (
        ("citeAs" in c) == ("cite" in entry)
        and c["license"] in (entry["licence"], archive.LICENCES.get(entry["licence"]))
        and re.match("https?://", c.get("url", "http://"))
    )
    files = {f["@id"]: f for f in c.get("distribution", [])}
    assert len(files) == len(c.get("distribution", []))
    for f in files.values():
        assert f["name"] and f["encodingFormat"] and f["@type"] in ("cr:FileObject", "cr:FileSet")
        if f["@type"] == "cr:FileSet":
            assert f["includes"] and set(ids(f.get("containedIn"))) <= set(files)
        else:
            assert (
                f["contentUrl"]
                and len({"md5", "sha256"} & set(f)) == 1
                and re.fullmatch("[0-9a-f]{32}|[0-9a-f]{64}", f.get("md5") or f["sha256"])
            )
    fields = {f["@id"] for r in c.get("recordSet", []) for f in r["field"]}
    for r in c.get("recordSet", []):
        assert (
            r["@type"] == "cr:RecordSet"
            and set(ids(r.get("key"))) <= fields
            and all(f["@id"].startswith(r["@id"] + "/") and f["dataType"] for f in r["field"])
        )
        if "data" in r:
            assert r["data"] and all(set(row) == {f["@id"] for f in r["field"]} for row in r["data"])
        else:
            for f in r["field"]:
                assert (
                    f["source"]["fileSet"]["@id"] in files
                    and f["source"]["extract"]
                    and set(ids(f.get("references", {}).get("field"))) <= fields
                )
    assert {t for o in walk(c) for t in o if t[0] != "@" and "/" not in t} <= set(c["@context"]) | {
        "name",
        "alternateName",
        "description",
        "license",
        "url",
        "creator",
        "datePublished",
        "version",
        "distribution",
        "encodingFormat",
        "contentUrl",
        "contentSize",
        "sha256",
        "containedIn",
    }


RECOMMENDED = {
    "https://schema.org/version",
    "https://schema.org/datePublished",
    "http://mlcommons.org/croissant/citeAs",
}


@pytest.mark.parametrize("name", MANIFEST)
def test_the_standards_own_reader_accepts_every_description(name, monkeypatch):
    "It looks at structure, types and references and opens no file; it recommends what the manifest does not know."
    mlcroissant = pytest.importorskip(
        "mlcroissant", reason="mlcroissant is not installed; it comes with: pip install mcl_repro[dev]"
    )

    def refuse(*a, **k):
        raise AssertionError("a network was asked")

    monkeypatch.setattr(socket, "create_connection", refuse)
    issues = mlcroissant.Dataset(jsonld=croissant(name)).metadata.ctx.issues
    assert not issues.errors
    assert {re.search(r'Property "(.*?)" is recommended', warning)[1] for warning in issues.warnings} <= RECOMMENDED


def test_the_standards_own_reader_refuses_a_wrong_description():
    mlcroissant = pytest.importorskip(
        "mlcroissant", reason="mlcroissant is not installed; it comes with: pip install mcl_repro[dev]"
    )
    wrong = croissant("flickr8k")
    wrong["recordSet"][1]["field"][0]["source"]["fileSet"] = {"@id": "nowhere"}
    with pytest.raises(mlcroissant.ValidationError):
        mlcroissant.Dataset(jsonld=wrong)


def test_the_standards_own_reader_reads_the_rows_of_the_world():
    mlcroissant = pytest.importorskip(
        "mlcroissant", reason="mlcroissant is not installed; it comes with: pip install mcl_repro[dev]"
    )
    found = list(mlcroissant.Dataset(jsonld=croissant("world")).records("pairs"))
    drawn = open_data("world:train:3")
    assert [row["pairs/caption"] for row in found] == list(drawn.captions)


def walk(value):
    "Every object but the context."
    if isinstance(value, dict):
        yield value
        for k, v in value.items():
            if k != "@context":
                yield from walk(v)
    for v in value if isinstance(value, list) else ():
        yield from walk(v)


def test_croissant_gives_the_manifests_addresses_and_checksums_and_says_what_is_by_hand():
    for name, entry in MANIFEST.items():
        c = croissant(name)
        files = {f["@id"]: f for f in c.get("distribution", [])}
        for f in entry.get("files", []):
            if "unknown" in (f.get("sha256"), f.get("md5")):
                assert (
                    f["save"] not in files
                    and f["url"] in c["description"]
                    and "checksum is not published" in c["description"]
                )
            else:
                assert (
                    files[f["save"]]["contentUrl"] == f["url"]
                    and {k: f[k] for k in ("md5", "sha256") if k in f}.items() <= files[f["save"]].items()
                )
        for f in entry.get("archives", []):
            assert (
                files[f["name"]]["contentUrl"] == f["name"] and "Cannot be fetched" in files[f["name"]]["description"]
            )
        if entry.get("obtain") and not entry.get("archives"):
            assert entry["obtain"].strip()[:40] in c["description"] and "by hand" in c["description"].lower()
        splits = {r["@id"]: r for r in c.get("recordSet", [])}.get("splits")
        if entry.get("splits"):
            assert [row["splits/name"] for row in splits["data"]] == list(entry["splits"])
            for row in splits["data"]:
                assert all(
                    entry["splits"][row["splits/name"]][k.split("/")[1]] == v
                    for k, v in row.items()
                    if k != "splits/name"
                )
    fields = lambda n: (
        {f["@id"] for r in croissant(n)["recordSet"] for f in r["field"]}
        - {f"splits/{k}" for k in ("name", "images", "pairs", "classes")}
    )
    assert fields("cc3m") == {"pairs/image", "pairs/caption"} and fields("imagenet") == fields("dtd") == {
        "images/image",
        "images/label",
    }
    assert (
        fields("coco") == {"images/id", "images/image", "captions/caption", "captions/image_id"}
        and fields("cifar10") == set()
    )
    assert (
        "torchvision.datasets.CIFAR10" in croissant("cifar10")["description"]
        and croissant("dtd")["version"] == "1.0.1"
    )


def test_the_embedded_world_is_described_with_its_generator_and_every_split():
    from mcl_repro.data import world

    c = croissant("world")
    (program,) = c["distribution"]
    splits, pairs = c["recordSet"]
    assert (
        program["sha256"] == sha(world.__file__)
        and (ROOT / program["contentUrl"]).samefile(world.__file__)
        and c["version"] == f"{world.VERSION}.0.0"
    )
    assert {r["splits/name"]: r["splits/fingerprint"] for r in splits["data"]} == {
        s: resolve(f"world:{s}").fingerprint for s in world.SPLITS
    }
    drawn = open_data("world:train:3")
    assert [r["pairs/caption"] for r in pairs["data"]] == list(drawn.captions) and [
        r["pairs/label"] for r in pairs["data"]
    ] == [world.classnames("train")[l] for l in world.scenes("train", 3).labels]


def test_paths_of_the_description_lead_into_real_layouts(tmp_path):
    "The expressions for Karpathy's and COCO's JSON and Flickr's token file, against files in the real formats."

    def values(path, value):
        for step in path.removeprefix("$.").split("."):
            value = [v[step.removesuffix("[*]")] for v in many(value)]
            if step.endswith("[*]"):
                value = sum(value, [])
        return value

    karpathy = dict(
        images=[
            dict(
                imgid=i, filename=f"{i}.jpg", split="train", sentences=[dict(raw=f"{i} {j}", imgid=i) for j in range(2)]
            )
            for i in range(3)
        ]
    )
    coco = dict(
        images=[dict(id=i, file_name=f"{i}.jpg") for i in range(3)],
        annotations=[dict(image_id=i, caption=f"{i} {j}") for i in range(3) for j in range(2)],
    )
    for name, content in (("flickr30k", karpathy), ("coco", coco)):
        found = {
            f["@id"]: values(f["source"]["extract"]["jsonPath"], content)
            for r in croissant(name)["recordSet"]
            if "data" not in r
            for f in r["field"]
        }
        assert (
            found["captions/caption"] == [f"{i} {j}" for i in range(3) for j in range(2)]
            and found["captions/image_id"] == [0, 0, 1, 1, 2, 2]
            and found["images/id"] == [0, 1, 2]
        )
    image, caption = croissant("flickr8k")["recordSet"][1]["field"]
    line = "a_b.jpg#3\tA dog #1 runs ."
    assert (
        re.search(image["source"]["transform"]["regex"], line)[1],
        re.search(caption["source"]["transform"]["regex"], line)[1],
    ) == ("a_b.jpg", "A dog #1 runs .")


def test_croissant_command(tmp_path, capsys):
    assert cli.main(["data", "croissant", "coco"]) == 0 and json.loads(capsys.readouterr().out) == croissant(
        "coco"
    )
    assert cli.main(["data", "croissant", "coco", "--out", str(tmp_path / "new/coco.json")]) == 0 and json.loads(
        (tmp_path / "new/coco.json").read_text("utf-8")
    ) == croissant("coco")
    assert (
        capsys.readouterr().out == f"{tmp_path / 'new/coco.json'}\n"
        and cli.main(["data", "croissant", "cocoa"]) == 2
        and "did you mean coco" in capsys.readouterr().err
    )
    with pytest.raises(DataError, match="unknown data set of the manifest 'x'"):
        croissant("x")


# ---- what to cite


def test_citation_is_in_step_with_the_settings_and_the_papers():
    cite = archive.read_citation()
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    settings = parser["DEFAULT"]
    assert (
        {"cff-version", "message", "title", "authors"} <= set(cite)
        and cite["cff-version"] == "1.2.0"
        and cite["type"] == "software"
    )
    assert (
        (str(cite["version"]), cite["authors"], cite["license"])
        == (settings["version"], [{"name": settings["author"]}], "Apache-2.0")
        and settings["license"] == "apache2"
        and cite["keywords"] == settings["keywords"].split()
    )
    papers = package_yaml("report/papers/layouts.yaml")["papers"]
    assert {r["abbreviation"].lower(): r["title"] for r in cite["references"]} == {
        k: v["title"] for k, v in papers.items() if k != "baselines"
    }
    for r in cite["references"]:
        assert (
            r["authors"]
            and r["url"].startswith("https://")
            and r["type"] in ("article", "conference-paper")
            and all("name" in a or {"given-names", "family-names"} <= set(a) for a in r["authors"])
        )
    known = {i["value"] for r in cite["references"] for i in r["identifiers"]}
    assert known == {"arXiv:2409.19526", "arXiv:2407.16307", "arXiv:2303.03323", "OpenReview:CdqQKXGKq3"}
    unnamed = [r for r in cite["references"] if "name" in r["authors"][0]]
    assert [r["abbreviation"] for r in unnamed] == ["UBT", "CFBD"] and all(
        "names no authors" in r["notes"] for r in unnamed
    )


def test_citation_is_found_where_it_was_installed_and_refused_where_it_is_none(tmp_path, monkeypatch):
    package = tmp_path / "site" / "mcl_repro"
    package.mkdir(parents=True)
    monkeypatch.setattr(archive.mcl_repro, "__file__", str(package / "__init__.py"))
    with pytest.raises(DataError, match="CITATION.cff was not installed"):
        archive.read_citation()
    (package / "CITATION.cff").write_text("title: x\nauthors: [{name: y}]\n")
    assert archive.read_citation()["title"] == "x"
    for bad in ("[1", "- 1", "title: x", ""):
        (package / "CITATION.cff").write_text(bad)
        with pytest.raises(DataError, match="not a citation file"):
            archive.read_citation()
    assert "CITATION.cff" in (ROOT / "MANIFEST.in").read_text() and "CITATION.cff" in (ROOT / "setup.py").read_text()
