"""Registering, fetching with resume, unpacking what strangers packed, and verifying."""
import hashlib, http.server, io, os, tarfile, threading, zipfile
from types import SimpleNamespace

import numpy as np
import pytest

from data_files import encoded, refused
from mcl_repro.data import fetching
from mcl_repro.data.fetching import (
    _one_at_a_time, add_dataset, extract, fetch_dataset, list_datasets, show_dataset, verify_dataset,
)
from mcl_repro.data.registry import open_data, read_registry, record_dataset


# ---- fetch

class Server(http.server.BaseHTTPRequestHandler):
    "Serves bytes with ranges and ETags; can hang up early and change its file."
    files, cut, etag, log = {}, [], '"1"', []
    def log_message(self, *args):
        pass
    def do_GET(self):
        cls = type(self)
        content = cls.files.get(self.path)
        start = 0
        if content is None:
            self.send_error(404)
            return
        if self.headers.get("Range") and self.headers.get("If-Range", cls.etag) == cls.etag:
            start = int(self.headers["Range"][6:-1])
        cls.log.append(start)
        if start and start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", cls.etag)
        self.end_headers()
        stop = cls.cut.pop(0) if cls.cut else len(content)
        self.wfile.write(content[start:stop])

@pytest.fixture
def site():
    Server.files, Server.cut, Server.etag, Server.log = {}, [], '"1"', []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()

def toy_archive(text="a", size=200_000):
    out = io.BytesIO()
    members = {
        "toy/train.csv": f"image,caption\n0.png,{text}\n", "toy/0.png": encoded(),
        "toy/padding": np.random.default_rng(0).bytes(size),
    }
    with zipfile.ZipFile(out, "w") as z:
        for name, content in members.items():
            z.writestr(zipfile.ZipInfo(name), content)     # without the time of day
    return out.getvalue()

def toy_entry(site, content, **hashes):
    Server.files["/toy.zip"] = content
    record_dataset(
        "toy", files=[dict(url=f"{site}/toy.zip", save="toy.zip", **hashes)],
        layouts=[dict(format="csv", splits=dict(train=dict(path="toy/train.csv")))],
    )

def test_fetch_resumes_checks_unpacks_and_remembers(site, home):
    content = toy_archive()
    toy_entry(site, content, sha256=hashlib.sha256(content).hexdigest())
    Server.cut = [100_000, 150_000]
    report = fetch_dataset("toy", progress=False)
    assert report["fetched"] == ["toy.zip"]
    assert Server.log[0] == 0
    assert 0 < Server.log[1] <= 100_000 < Server.log[2] <= 150_000
    assert open_data("toy:train").captions == ["a"]
    assert not list((home / "downloads").rglob("*.zip"))
    assert not list((home / "downloads").rglob("*.part"))
    assert fetch_dataset("toy", progress=False)["there"] == ["toy.zip"] and len(Server.log) == 3
    assert [r["status"] for r in list_datasets() if r["name"] == "toy"] == ["here"]

def test_fetch_goes_on_in_a_later_call(site):
    content = toy_archive()
    toy_entry(site, content, md5=hashlib.md5(content).hexdigest())
    Server.cut = [70_000, 70_000, 140_000]
    refused("run the command again to go on from 131,072 bytes", fetch_dataset, "toy", progress=False)
    fetch_dataset("toy", progress=False)
    assert Server.log[-1] == 131072 and open_data("toy:train").captions == ["a"]

def test_fetch_starts_over_when_the_file_there_has_changed(site):
    old, new = toy_archive("old"), toy_archive("new", 180_000)
    toy_entry(site, old, sha256=hashlib.sha256(new).hexdigest())
    Server.cut = [70_000]*3
    refused("go on from", fetch_dataset, "toy", progress=False)
    Server.files["/toy.zip"], Server.etag, Server.cut = new, '"2"', []
    fetch_dataset("toy", progress=False)
    assert Server.log[-1] == 0 and open_data("toy:train").captions == ["new"]

def test_fetch_throws_away_what_does_not_match(site, home):
    toy_entry(site, toy_archive("tampered"), sha256="0"*64)
    refused("the checksum is not sha256:000", fetch_dataset, "toy", progress=False)
    assert not (home / "toy").exists()
    assert not [p for p in (home / "downloads").rglob("*") if p.is_file() and p.suffix != ".lock"]

def test_unknown_checksum_is_recorded_and_compared_later(site):
    toy_entry(site, toy_archive("first"), sha256="unknown")
    fetch_dataset("toy", progress=False)
    assert read_registry()["toy"]["fetched"]["toy.zip"]["sha256"] == hashlib.sha256(toy_archive("first")).hexdigest()
    Server.files["/toy.zip"], Server.etag = toy_archive("second"), '"2"'
    refused("the checksum is not", fetch_dataset, "toy", progress=False, force=True)

def test_fetch_errors_are_one_line(site):
    record_dataset("toy", files=[dict(url=f"{site}/gone.zip", save="gone.zip", md5="0"*32)])
    refused("404", fetch_dataset, "toy", progress=False)
    record_dataset("toy", files=[dict(url="http://127.0.0.1:9/x.zip", save="x.zip", md5="0"*32)])
    refused("download failed", fetch_dataset, "toy", progress=False)
    refused("imagenet cannot be downloaded automatically: create an account", fetch_dataset, "imagenet")
    refused("world is embedded", fetch_dataset, "world")
    refused("unknown data set flicker; did you mean flickr8k", fetch_dataset, "flicker")

def test_two_fetches_at_once_are_refused(site, home):
    toy_entry(site, toy_archive(), md5="0"*32)
    with _one_at_a_time("other", f"{site}/toy.zip"):
        refused("toy is being fetched by another process", fetch_dataset, "toy", progress=False)

def test_nested_archives_and_plain_files(site, home):
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as t:
        info = tarfile.TarInfo("deep/a.txt")
        info.size = 2
        t.addfile(info, io.BytesIO(b"ok"))
    outer = io.BytesIO()
    with zipfile.ZipFile(outer, "w") as z:
        z.writestr("box/inner.tar.gz", inner.getvalue())
    Server.files = {"/o.zip": outer.getvalue(), "/w.bin": b"weights"}
    record_dataset(
        "toy",
        files=[
            dict(url=f"{site}/o.zip", save="o.zip", to="sub", then=["box/inner.tar.gz"], md5="unknown"),
            dict(url=f"{site}/w.bin", save="w.bin", unpack=False, sha256=hashlib.sha256(b"weights").hexdigest()),
        ],
    )
    fetch_dataset("toy", progress=False)
    assert (home/"toy/sub/deep/a.txt").read_text() == "ok" and (home/"toy/w.bin").read_bytes() == b"weights"


# ---- archives

def tar_with(*members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as t:
        for name, kind, link in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, link
            if kind == tarfile.REGTYPE:
                info.size = 1
            t.addfile(info, io.BytesIO(b"x"))
    return out.getvalue()

F, S, H = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE
@pytest.mark.parametrize("members, named", [
    ([("../evil", F, "")], "../evil"),
    ([("a/../../evil", F, "")], "a/../../evil"),
    ([("/evil", F, "")], "/evil"),
    ([("..\\evil", F, "")], "..\\evil"),
    ([("C:\\evil", F, "")], "C:\\evil"),
])
def test_tar_members_that_escape_are_refused(tmp_path, members, named):
    stays_inside(tmp_path, members, f"a.tar: member {named} would be written outside")

@pytest.mark.parametrize("members, named", [
    ([("door", S, "/etc")], "door"),
    ([("door", S, "../.."), ("door/evil", F, "")], "door"),
    ([("inside", S, "good.txt")], "inside"),
    ([("door", H, "../../evil")], "door"),
    ([("pipe", tarfile.FIFOTYPE, "")], "pipe"),
    ([("dev", tarfile.CHRTYPE, "")], "dev"),
    ([("holes", tarfile.GNUTYPE_SPARSE, "")], "holes"),
])
def test_tar_members_that_are_no_plain_files_are_refused(tmp_path, members, named):
    stays_inside(tmp_path, members, f"a.tar: member {named} is a link, a device or a sparse file")

def test_links_that_lead_outside_step_by_step_are_refused(tmp_path):
    "CVE-2025-4517: Python's own filter let a chain of links with a path too long to be resolved lead outside."
    steps, folder = "abcdefghijklmnop", "d"*247
    members, path = [], ""
    for step in steps:
        members += [(f"{path}{folder}", tarfile.DIRTYPE, ""), (f"{path}{step}", S, folder)]
        path += f"{folder}/"
    far = "/".join(steps) + "/" + "l"*254
    members += [(far, S, "../"*len(steps)), ("door", S, far + "/../../../evil"), ("door", F, "")]
    stays_inside(tmp_path, members, "a.tar: member a is a link")

def stays_inside(tmp_path, members, message):
    "The archive is refused, and nothing of it is anywhere."
    (tmp_path/"a.tar").write_bytes(tar_with(("good.txt", F, ""), *members))
    refused(message, extract, tmp_path/"a.tar", tmp_path/"in"/"side")
    assert list((tmp_path / "in" / "side").iterdir()) == []
    assert sorted(os.listdir(tmp_path / "in")) == ["side"]
    assert not (tmp_path / "evil").exists()

@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "..\\evil", "C:/evil"])
def test_zip_members_that_escape_are_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path/"a.zip", "w") as z:
        z.writestr("good", "x")
        z.writestr(name, "x")
    refused(f"a.zip: member {name} would be written outside", extract, tmp_path/"a.zip", tmp_path/"in"/"side")
    assert list((tmp_path/"in"/"side").iterdir()) == [] and not (tmp_path/"evil").exists()

def test_good_archives_join_what_is_there_and_broken_ones_leave_nothing(tmp_path):
    (tmp_path/"a.tar").write_bytes(tar_with(("x/1", F, "")))
    (tmp_path/"b.tar").write_bytes(tar_with(("x/2", F, "")))
    extract(tmp_path/"a.tar", tmp_path/"out")
    extract(tmp_path/"b.tar", tmp_path/"out")
    assert sorted(os.listdir(tmp_path/"out"/"x")) == ["1", "2"]
    for name, content in {"c.tar.gz": b"\x1f\x8b broken", "d.zip": toy_archive()[:-30], "e.tar": b"hello"}.items():
        (tmp_path/name).write_bytes(content)
        refused(f"{name}: not a whole archive", extract, tmp_path/name, tmp_path/"none")
    assert list((tmp_path/"none").iterdir()) == []


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_archives_that_grow_without_measure_are_refused(tmp_path, method):
    with zipfile.ZipFile(tmp_path/"a.zip", "w", method) as z:
        for k in range(12):
            z.writestr(f"{k}.bin", bytes(20_000_000))
    refused("files; this archive is not safe and was not unpacked", extract, tmp_path/"a.zip", tmp_path/"out")
    with tarfile.open(tmp_path/"a.tar.gz", "w:gz") as t:
        info = tarfile.TarInfo("zeros.bin")
        info.size = 200_000_000
        t.addfile(info, io.BytesIO(bytes(info.size)))
    refused("bytes unpack to more than 200,000,000 in 1 files", extract, tmp_path/"a.tar.gz", tmp_path/"out")
    assert list((tmp_path/"out").iterdir()) == []

def test_what_there_is_no_room_for_is_not_begun(tmp_path, monkeypatch):
    with tarfile.open(tmp_path/"a.tar", "w") as t:
        t.addfile(tarfile.TarInfo("first"))
        info = tarfile.TarInfo("second")
        info.size = 5000
        t.addfile(info, io.BytesIO(bytes(5000)))
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda place: SimpleNamespace(free=4999))
    message = "a.tar: 5,000 bytes more are needed where 4,999 are free; make room"
    refused(message, extract, tmp_path/"a.tar", tmp_path/"out")
    assert list((tmp_path/"out").iterdir()) == []

def test_locked_and_foreign_zips_are_damage(tmp_path):
    with zipfile.ZipFile(tmp_path/"a.zip", "w") as z:
        z.writestr("x", "y")
    whole = (tmp_path/"a.zip").read_bytes()
    central = whole.index(b"PK\x01\x02")
    for place, value in ((8, 1), (10, 99)):          # the flag of a password; a method that nobody knows
        odd = bytearray(whole)
        odd[central + place] = value
        odd[place - 2] = value
        (tmp_path/"odd.zip").write_bytes(odd)
        refused("odd.zip: not a whole archive", extract, tmp_path/"odd.zip", tmp_path/"out")


# ---- verify, list, show

def test_verify_finds_wrong_counts_bad_pictures_and_silent_changes(folder):
    (folder/"train.csv").write_text("image,caption\n" + "".join(f"{i}.jpg,c{i}\n" for i in range(10)))
    add_dataset("mine", folder)
    assert all(c["ok"] for c in verify_dataset("mine"))
    whole = (folder/"3.jpg").read_bytes()
    # one bit of the header: same size, still opens
    (folder/"3.jpg").write_bytes(whole[:15] + bytes([whole[15] ^ 1]) + whole[16:])
    assert [c["check"] for c in verify_dataset("mine") if not c["ok"]] == ["content sha256"]
    (folder/"3.jpg").write_bytes(whole[:len(whole)//2])
    bad = [c for c in verify_dataset("mine") if not c["ok"]]
    assert [c["check"] for c in bad] == ["picture", "unreadable pictures"]
    assert "3.jpg: the file is cut off" in bad[0]["found"]
    (folder/"3.jpg").write_bytes(whole)
    (folder/"train.csv").write_text("image,caption\n0.jpg,c0\n")
    assert {c["check"]: c["found"] for c in verify_dataset("mine", decode=False) if not c["ok"]} == dict(
        images=1, pairs=1
    )
    (folder/"train.csv").write_text("image,caption\n0.jpg,\n")
    assert "the caption is empty" in verify_dataset("mine")[0]["found"]
    refused("flickr30k is not on this machine", verify_dataset, "flickr30k")

def test_list_and_show(folder):
    rows = {r["name"]: r for r in list_datasets()}
    assert rows["world"]["status"] == "embedded"
    assert rows["coco"]["status"] == "not here"
    assert "ubt.table6" in rows["dtd"]["tables"]
    assert "train" in rows["world"]["splits"]
    shown = show_dataset("flickr30k")
    assert shown["status"] == "not here"
    assert "data fetch flickr30k" in shown["get"]
    assert "form at the source" in shown["get"]
    (folder/"train.csv").write_text("image,caption\n0.jpg,[bold]x[/nope]\n")
    add_dataset("mine", folder)
    assert show_dataset("mine")["status"] == "registered" and "get" not in show_dataset("mine")
    folder.rename(folder.parent/"moved")
    assert show_dataset("mine")["status"] == "folder is gone"

def test_the_world_verifies():
    checks = verify_dataset("world", ["train", "zeroshot_test"])
    assert len(checks) == 2 and all(c["ok"] and len(c["found"]) == 64 for c in checks)
