"""Tar shards in WebDataset form."""
import io, os, tarfile

import numpy as np
import pytest
from PIL import Image

from data_files import encoded, refused, sample, shard
from mcl_repro.data import tars
from mcl_repro.data.pairs import check_images
from mcl_repro.data.registry import open_data
from mcl_repro.data.tars import read_webdataset_pairs


def test_webdataset_reads_members_in_place(tmp_path):
    for s in range(3):
        shard(
            tmp_path / f"{s:05d}.tar",
            {k: v for i in range(7) for k, v in sample(f"{s:05d}{i:04d}", 7 * s + i, f"text {s} {i} é").items()},
        )
    pairs = read_webdataset_pairs(f"{tmp_path}/{{00000..00002}}.tar")
    assert len(pairs) == 21 and pairs.captions[8] == "text 1 1 é" and pairs.ids[8] == "000010001"
    for row in (20, 0, 13):
        assert (np.asarray(pairs[row].image) == np.asarray(Image.open(io.BytesIO(encoded(row, format="JPEG"))))).all()
    assert (
        read_webdataset_pairs(tmp_path).fingerprint == pairs.fingerprint == open_data(f"{tmp_path}/*.tar").fingerprint
    )
    assert check_images(pairs.images)[1] == []
    assert sorted(os.listdir(tmp_path)) == ["00000.tar", "00001.tar", "00002.tar"]

def test_webdataset_caption_from_json_and_pictures_in_folders(tmp_path):
    shard(
        tmp_path / "a.tar",
        {
            "x/1.png": encoded(), "x/1.json": b'{"caption": "json"}', "./.hidden": b"", "x/2.seg.png": encoded(1),
            "x/2.png": encoded(1), "x/2.txt": b"two",
        },
    )
    assert read_webdataset_pairs(tmp_path/"a.tar").captions == ["json", "two"]

def test_webdataset_errors(tmp_path):
    shard(tmp_path/"a.tar", {**sample("ok", 0, "fine"), "lost.txt": b"no picture", "mute.jpg": encoded()})
    refused("sample lost has no picture", read_webdataset_pairs, tmp_path/"a.tar")
    assert read_webdataset_pairs(tmp_path/"a.tar", incomplete="skip").ids == ["ok"]
    refused("incomplete is 'error' or 'skip', not drop", read_webdataset_pairs, tmp_path/"a.tar", incomplete="drop")
    shard(tmp_path/"b.tar", {"x.jpg": encoded(), "x.txt": b"caf\xe9"})
    refused("b.tar, member x.txt: the caption is not UTF-8", read_webdataset_pairs, tmp_path/"b.tar")
    shard(tmp_path/"c.tar", {"x.jpg": encoded()[:60], "x.txt": b"x"})
    refused("c.tar, member x.jpg: the file", lambda: read_webdataset_pairs(tmp_path/"c.tar")[0])
    shard(tmp_path/"e.tar", {"x.jpg": encoded(), "x.txt": b"  "})
    refused("sample x has no caption", read_webdataset_pairs, tmp_path/"e.tar")
    shard(tmp_path/"f.tar", {"x.jpg": encoded(), "x.txt": b"x"})
    refused("id x comes twice", read_webdataset_pairs, [tmp_path/"f.tar", tmp_path/"f.tar"])
    whole = (tmp_path/"f.tar").read_bytes()
    for cut in (700, 1024, 1536): # inside a member, between members, before the end mark
        (tmp_path/"d.tar").write_bytes(whole[:cut])
        refused("d.tar: not a whole, uncompressed tar shard", read_webdataset_pairs, tmp_path/"d.tar")
    with tarfile.open(tmp_path/"g.tar", "w:gz") as tar:
        tar.add(tmp_path/"f.tar", "x.jpg")
    refused("unpack a .tar.gz to .tar", read_webdataset_pairs, tmp_path/"g.tar")
    refused("h.tar: the shard is not there", read_webdataset_pairs, tmp_path/"h.tar")
    refused("no sample in these shards", read_webdataset_pairs, [])
    (tmp_path/"i.tar").mkdir()
    refused("i.tar: cannot be read (Is a directory)", read_webdataset_pairs, [tmp_path/"i.tar"])
    shard(tmp_path/"j.tar", {**sample("x", 0, "a"), "x.png": encoded()})
    refused("sample x has two pictures, x.jpg and x.png", read_webdataset_pairs, tmp_path/"j.tar", incomplete="skip")

def test_a_shard_with_a_damaged_header_does_not_lose_the_samples_behind_it(tmp_path):
    shard(tmp_path/"a.tar", {k: v for i in range(5) for k, v in sample(f"{i}", i, "text").items()})
    whole = (tmp_path/"a.tar").read_bytes()
    with tarfile.open(tmp_path/"a.tar") as tar:
        at = [m.offset for m in tar]
    for name, header in dict(bit=bytes([whole[at[6]] ^ 1]) + whole[at[6] + 1:at[6] + 512], zeros=bytes(512)).items():
        (tmp_path/f"{name}.tar").write_bytes(whole[:at[6]] + header + whole[at[6] + 512:])
        refused(
            f"{name}.tar: not a whole, uncompressed tar shard (what follows byte {at[6]:,} is damaged); fetch it again",
            read_webdataset_pairs,
            tmp_path / f"{name}.tar",
        )

def test_index_of_a_large_shard_is_kept_and_renewed(tmp_path, home, monkeypatch):
    path = tmp_path/"big.tar"
    shard(path, {**sample("a", 0, "first"), "pad.bin": bytes(2**23)})
    first = read_webdataset_pairs(path, incomplete="skip")
    assert len(list((home/"index").glob("*.json"))) == 1
    monkeypatch.setattr(tars, "_scan_shard", lambda p: pytest.fail("scanned again"))
    assert read_webdataset_pairs(path, incomplete="skip").fingerprint == first.fingerprint
    monkeypatch.undo()
    os.environ["MCL_REPRO_DATA"] = str(home)
    shard(path, {**sample("a", 0, "second"), "pad.bin": bytes(2**23)})
    os.utime(path, (1, 1))
    assert read_webdataset_pairs(path, incomplete="skip").captions == ["second"]
