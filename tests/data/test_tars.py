"""Tar shards in WebDataset form."""
import glob, io, json, os, tarfile, time

import numpy as np
import pytest
from PIL import Image

from data_files import encoded, refused, sample, shard
from mcl_repro.core.errors import DataError
from mcl_repro.data import tars
from mcl_repro.data.pairs import check_images
from mcl_repro.data.registry import open_data
from mcl_repro.data.tars import expand_shards, read_webdataset_pairs


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
    refused("incomplete is 'error' or 'skip', not drop", read_webdataset_pairs, tmp_path/"a.tar", incomplete="drop")
    shard(tmp_path/"c.tar", {"x.jpg": encoded()[:60], "x.txt": b"x"})
    refused("c.tar, member x.jpg: the file", lambda: read_webdataset_pairs(tmp_path/"c.tar")[0])
    shard(tmp_path/"f.tar", {"x.jpg": encoded(), "x.txt": b"x"})
    refused("f.tar comes twice; list every shard once", read_webdataset_pairs, [tmp_path/"f.tar", tmp_path/"f.tar"])
    whole = (tmp_path/"f.tar").read_bytes()
    for cut in (700, 1024, 1536): # inside a member, between members, before the end mark
        (tmp_path/"d.tar").write_bytes(whole[:cut])
        refused("d.tar: not a whole, uncompressed tar shard", read_webdataset_pairs, tmp_path/"d.tar")
    refused("h.tar: the shard is not there", read_webdataset_pairs, tmp_path/"h.tar")
    refused("no sample in these shards", read_webdataset_pairs, [])
    (tmp_path/"i.tar").mkdir()
    refused("i.tar: there is no .tar in this folder", read_webdataset_pairs, [tmp_path/"i.tar"])
    (tmp_path/"i.tar"/"k.tar").mkdir()
    refused("k.tar: cannot be read (Is a directory)", read_webdataset_pairs, [tmp_path/"i.tar"])

@pytest.mark.parametrize("pack, command", [("gz", "gzip"), ("bz2", "bzip2"), ("xz", "xz")])
@pytest.mark.parametrize("name, plain", [("g.tar.gz", "g.tar"), ("g.tgz", "g.tar"), ("g.tar", "g-unpacked.tar")])
def test_a_compressed_shard_is_refused_with_the_command_that_unpacks_it(tmp_path, pack, command, name, plain):
    with tarfile.open(tmp_path/name, f"w:{pack}") as tar:
        tar.add(__file__, "x.txt")
    refused(f"unpack it: {command} -dc {tmp_path/name} > {tmp_path/plain}", read_webdataset_pairs, tmp_path/name)

def test_what_lies_there_under_the_name_of_a_shard(tmp_path):
    for content, said in {
        b"PK\3\4 and so on": "a zip and no tar", b"version https://git-lfs.github.com/spec/v1\n": "git lfs pull",
        b"<html>": "not a whole", b"": "not a whole", bytes(10_240): "no sample in these shards",
    }.items():
        (tmp_path/"a.tar").write_bytes(content)
        refused(said, read_webdataset_pairs, tmp_path/"a.tar")


# ---- samples that cannot be used

BAD = [
    ({"x.txt": b"a"}, "sample x has no picture (it has txt)"),
    ({"x.jpg": b"p", "x.txt": b" \n"}, "sample x has no caption"),
    ({"x.jpg": b"p", "x.txt": b"", "x.json": b'{"caption": null}'}, "sample x has no caption"),
    ({"x.jpg": b"p", "x.cls": b"7"}, "sample x has no caption (it has cls, jpg)"),
    ({"x.jpg": b"p", "x.json": b"[1"}, "has a caption x.json that is not JSON"),
    ({"x.jpg": b"p", "x.json": b"["*100_000}, "has a caption x.json that is not JSON"),
    ({"x.jpg": b"p", "x.json": b"[]"}, "sample x has no caption"),
    ({"x.jpg": b"p", "x.json": b'{"caption": 7}'}, "has a caption in x.json that is no text (7)"),
    ({"x.jpg": b"p", "x.json": b'{"caption": NaN}'}, "has a caption in x.json that is no text (nan)"),
    ({"x.jpg": b"p", "x.json": b'{"text": "\\ud800"}'}, "x.json with a character that is no text"),
    ({"x.jpg": b"p", "x.txt": b"caf\xe9"}, "has a caption x.txt that is not UTF-8 (byte 0xe9)"),
    ({"x.jpg": b"p", "x.txt": "café".encode("utf-16")}, "has a caption x.txt that is not UTF-8 (byte 0xff)"),
    ({"x.jpg": b"p", "x.txt": b"a"*(2**20 + 1)}, "has a caption x.txt that takes 1,048,577 bytes"),
    ({"x.jpg": b"p", "x.png": b"p", "x.txt": b"a"}, "has two pictures, x.jpg and x.png; choose one with image_key="),
    ({"x.0.jpg": b"p", "x.1.jpg": b"p", "x.2.jpg": b"p", "x.txt": b"a"}, "has several pictures, x.0.jpg and x.1.jpg"),
]
@pytest.mark.parametrize("members, said", BAD)
def test_a_sample_that_cannot_be_taken_is_named_and_counted(tmp_path, members, said):
    shard(tmp_path/"a.tar", {**sample("ok", 0, "fine"), **members, **sample("too", 1, "fine, too")})
    remedy = "raise the tolerance (--tolerance 0.34)" + (", or leave out" if " has no " in said else "")
    for options in ({}, dict(tolerance=.3)):
        refused(said, read_webdataset_pairs, tmp_path/"a.tar", **options)
        refused(remedy, read_webdataset_pairs, tmp_path/"a.tar", **options)
    refused("a.tar: 1 of 3 rows cannot be used, more than the tolerated 30.00%", read_webdataset_pairs,
            tmp_path/"a.tar", tolerance=.3)
    pairs = read_webdataset_pairs(tmp_path/"a.tar", tolerance=.34)
    assert pairs.ids == ["ok", "too"] and pairs.captions == ["fine", "fine, too"]
    (place, problem), = pairs.left_out
    assert place == "x" and said in problem
    assert pairs.images.members == ["ok.jpg", "too.jpg"]
    shard(tmp_path/"b.tar", members)
    refused("1 of 1 rows cannot be used", read_webdataset_pairs, tmp_path/"b.tar", tolerance=1.)

def test_incomplete_samples_are_skipped_and_counted_whatever_the_tolerance(tmp_path):
    members = {f"{k}.txt": b"no picture" for k in range(8)}
    mute = {"mute.jpg": encoded(), "mute.json": b'{"caption": null}'}
    shard(tmp_path/"a.tar", {**members, **sample("ok", 0, "fine"), **mute})
    pairs = read_webdataset_pairs(tmp_path/"a.tar", incomplete="skip")
    assert pairs.ids == ["ok"] and [i for i, _ in pairs.left_out] == [*"01234567", "mute"]
    refused("9 of 10 rows cannot be used", read_webdataset_pairs, tmp_path/"a.tar", tolerance=.5)
    shard(tmp_path/"b.tar", {**members, **sample("ok", 0, "fine"), "x.jpg": encoded(), "x.txt": b"\xff"})
    refused("is not UTF-8 (byte 0xff)", read_webdataset_pairs, tmp_path/"b.tar", incomplete="skip")
    shard(tmp_path/"c.tar", members)
    refused("8 of 8 rows cannot be used", read_webdataset_pairs, tmp_path/"c.tar", incomplete="skip")
    shard(tmp_path/"d.tar", {**members, **sample("ok", 0, "fine")})
    refused("sample 2 has no picture (it has txt) ...", read_webdataset_pairs, tmp_path/"d.tar")

def test_members_without_bytes_of_their_own(tmp_path):
    with tarfile.open(tmp_path/"a.tar", "w") as tar:
        for name, content in sample("ok", 0, "fine").items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for name, kind in {"s.jpg": tarfile.SYMTYPE, "h.jpg": tarfile.LNKTYPE, "f.jpg": tarfile.FIFOTYPE}.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "../../etc/passwd"
            tar.addfile(info)
        folder = tarfile.TarInfo("folder.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    pairs = read_webdataset_pairs(tmp_path/"a.tar", tolerance=.9)
    assert pairs.ids == ["ok"]
    said = {i: problem.partition(": sample ")[2] for i, problem in pairs.left_out}
    kinds = dict(s="a link", h="a link", f="no file")
    assert said == {i: f"{i} has a picture {i}.jpg that is {kind}" for i, kind in kinds.items()}

def header(name, size, kind=b"0", **fields):
    "A tar header with any size, also a negative one."
    number = lambda n: b"%011o\0" % n if 0 <= n < 8**11 else (n % 2**95 | 2**95).to_bytes(12, "big")
    if size < 0:
        number = lambda n: (n % 2**96).to_bytes(12, "big")
    block = bytearray(512)
    block[:len(name)], block[124:136], block[156:157] = name, number(size), kind
    block[100:108], block[257:265] = b"0000644\0", b"ustar  \0"
    for at, value in fields.items():
        block[int(at[1:]):int(at[1:]) + len(value)] = value
    block[148:156] = b" "*8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)

@pytest.mark.parametrize("size", [3*2**40, -512, -1024, 2**62, 5000])
@pytest.mark.parametrize("kind", [b"0", b"L", b"x", b"g", b"K"])
def test_a_header_that_claims_an_absurd_size_is_refused_at_once(tmp_path, size, kind):
    shard(tmp_path/"a.tar", sample("ok", 0, "fine"))
    whole = (tmp_path/"a.tar").read_bytes()[:-10_240 % 512 or None].rstrip(b"\0")
    body = whole + bytes(-len(whole) % 512)
    (tmp_path/"a.tar").write_bytes(body + header(b"a.txt", size, kind) + b"a caption".ljust(512, b"\0") + bytes(1024))
    refused("not a whole, uncompressed tar shard", read_webdataset_pairs, tmp_path/"a.tar")

def test_a_sparse_member_takes_no_memory(tmp_path):
    number = lambda n: b"%011o\0" % n if n < 8**11 else b"\x80" + n.to_bytes(11, "big")
    for name in (b"x.txt", b"x.jpg"):
        block = header(name, 512, b"S", _386=number(0), _398=number(512), _483=number(3*2**40))
        members = {**sample("ok", 0, "fine"), "x.txt": b"a", "x.jpg": encoded()}
        del members[name.decode()]
        shard(tmp_path/"a.tar", members)
        rest = (tmp_path/"a.tar").read_bytes()
        (tmp_path/"a.tar").write_bytes(block + b"a caption".ljust(512) + rest)
        refused("that is a sparse file", read_webdataset_pairs, tmp_path/"a.tar")
        assert read_webdataset_pairs(tmp_path/"a.tar", tolerance=.5).ids == ["ok"]

def test_damaged_shards_are_one_line(tmp_path):
    shard(tmp_path/"a.tar", {k: v for i in range(3) for k, v in sample(f"{i}"*120, i, "text").items()})   # long names
    whole, draw = (tmp_path/"a.tar").read_bytes(), np.random.default_rng(0)
    read = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for at in draw.integers(0, len(whole), draw.integers(1, 30)):
            damaged[at] = draw.integers(256)
        (tmp_path/"a.tar").write_bytes(bytes(damaged))
        try:
            read += len(read_webdataset_pairs(tmp_path/"a.tar", tolerance=1.))
        except DataError as error:
            assert "\n" not in str(error) and str(tmp_path/"a.tar") in str(error)
    assert 0 < read <= 900


# ---- which members belong together

FORMS = dict(
    endings=[{f"{e}.{e}": b"", f"{e}.txt": b""} for e in "jpg JPEG png webp jfif avif img image".split()],
    captions=[{f"{k}.jpg": b"", f"{k}.{e}": b""} for k, e in enumerate(["txt", "TXT", "caption", "cap", "text"])],
    compound=[{f"{k}.image.jpg": b"", f"{k}.caption.txt": b"", f"{k}.mask.png": b""} for k in "ab"],
    numbered=[{f"{k}.0.jpg": b"", f"{k}.txt": b""} for k in "ab"],
    dots=[{f"v1.{k}.jpg": b"", f"v1.{k}.txt": b""} for k in range(3)],
    dots_and_none=[{"v.jpg": b"", "v.txt": b""}, {"v.1.jpg": b"", "v.1.txt": b""}],
    dotted_words=[{f"{k}.final.jpg": b"", f"{k}.final.txt": b""} for k in ("photo", "other")],
    segments=[{f"{k}.jpg": b"", f"{k}.seg.png": b"", f"{k}.txt": b"", f"{k}.url.txt": b""} for k in "ab"],
    dotted_folder=[{f"./set.1/{k}.jpg": b"", f"set.1/{k}.txt": b""} for k in "ab"],
    unicode=[{f"{k}.jpg": b"", f"{k}.txt": b""} for k in ("é", "猫", "a b", "#1", "😀")],
)
@pytest.mark.parametrize("form", FORMS)
def test_members_of_all_forms_become_samples(tmp_path, form):
    members, wanted = {}, []
    for number, parts in enumerate(FORMS[form]):
        for name in parts:
            is_text = name.rpartition(".")[2].lower() in ("txt", "caption", "cap", "text")
            other = ".mask." in name or ".seg." in name or ".url." in name
            text, picture = (b"other", encoded(99)) if other else (f"caption {number}".encode(), encoded(number))
            members[name] = text if is_text else picture
        wanted.append(f"caption {number}")
    for junk in ("._0.jpg", "./._v1.0.txt", "__MACOSX/0.jpg", "PaxHeaders.7/0.jpg", ".DS_Store", "README"):
        members[junk] = b"junk"
    shard(tmp_path/"a.tar", members)
    pairs = read_webdataset_pairs(tmp_path/"a.tar")
    assert pairs.captions == wanted and pairs.left_out == ()
    for number, pair in enumerate(pairs.images.read(row) for row in range(len(pairs))):
        assert pair == encoded(number)

def test_a_key_may_be_chosen(tmp_path):
    about = json.dumps(dict(caption="usual", alt="other")).encode()
    shard(tmp_path/"a.tar", {"x.0.jpg": encoded(0), "x.1.jpg": encoded(1), "x.url.txt": b"an address", "x.json": about})
    read = lambda **keys: read_webdataset_pairs(tmp_path/"a.tar", **keys)
    pairs = read(image_key="1.jpg")
    assert pairs.images.read(0) == encoded(1) and pairs.captions == ["usual"]
    assert read(image_key=".0.JPG").images.read(0) == encoded(0)
    assert read(image_key="png;0.jpg", caption_key="alt").captions == ["other"]
    assert read(image_key="0.jpg", caption_key="url.txt").captions == ["an address"]
    refused("has no picture (it has 0.jpg, 1.jpg, json, url.txt)", read, image_key="png")
    refused("has no caption", read, image_key="0.jpg", caption_key="text")

def test_json_fields_lists_and_texts(tmp_path):
    captions = {"a": dict(TEXT="one"), "b": dict(captions=["two", "three"]), "c": dict(caption=None, text="four"),
                "d": dict(caption=["five", " "])}
    shard(tmp_path/"a.tar", {k: v for i, c in captions.items() for k, v in
                             {f"{i}.jpg": encoded(ord(i)), f"{i}.json": json.dumps(c).encode()}.items()})
    pairs = read_webdataset_pairs(tmp_path/"a.tar", tolerance=.2)
    assert pairs.ids == ["a", "b#0", "b#1", "c", "d#0"] and pairs.captions == ["one", "two", "three", "four", "five"]
    assert list(pairs.image_rows) == [0, 1, 1, 2, 3] and [i for i, _ in pairs.left_out] == ["d#1"]
    assert [pairs.images.read(int(r)) for r in pairs.image_rows] == [encoded(ord(c)) for c in "abbcd"]
    refused("sample d#1 has no caption", read_webdataset_pairs, tmp_path/"a.tar")

def test_texts_lose_a_byte_order_mark_and_one_line_end(tmp_path):
    texts = {b"\xef\xbb\xbfa": "a", b"a\n": "a", b"a\r\n": "a", b"a\n\n": "a\n", b" a ": " a ", b"a\r": "a",
             "a\u2028".encode(): "a\u2028", b"a\nb": "a\nb", b"\0": "\0"}
    shard(tmp_path/"a.tar", {name: content for k, t in enumerate(texts) for name, content in
                             {f"{k}.jpg": encoded(), f"{k}.txt": t}.items()})
    assert read_webdataset_pairs(tmp_path/"a.tar").captions == list(texts.values())
    shard(tmp_path/"b.tar", {"x.jpg": encoded(), "x.txt": b"one\ntwo\r\n\n three \n"})
    pairs = read_webdataset_pairs(tmp_path/"b.tar", lines=True)
    assert pairs.ids == ["x#0", "x#1", "x#2"] and pairs.captions == ["one", "two", " three "] and len(pairs.images) == 1

def test_a_name_that_is_no_utf8_is_spelt_out(tmp_path):
    shard(tmp_path/"a.tar", {"caf\udce9.jpg": encoded(), "caf\udce9.txt": b"a"})
    pairs = read_webdataset_pairs(tmp_path/"a.tar")
    assert pairs.ids == ["caf\\xe9"] and pairs.images.where(0).encode()

def test_shards_that_have_keys_in_common(tmp_path):
    for name in ("a", "b", "sub/a"):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        shard(tmp_path/f"{name}.tar", {**sample("0", len(name), name), **sample("1", 7, name)})
    pairs = read_webdataset_pairs(tmp_path/"{a,b}.tar")
    assert pairs.ids == ["a/0", "a/1", "b/0", "b/1"] and pairs.captions == ["a", "a", "b", "b"]
    files = [tmp_path/"a.tar", tmp_path/"sub"]
    assert read_webdataset_pairs(files).ids == ["a/0", "a/1", "sub/a/0", "sub/a/1"]
    assert read_webdataset_pairs(tmp_path/"b.tar").ids == ["0", "1"]


# ---- which shards are meant

NAMES = ["plain", "a{1}", "a{1,2}", "a[1]", "why?", "all*", "50%25", "a:b", "# {0..3} [x] *?", "~"]
@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_there_is_no_pattern(tmp_path, name):
    folder = tmp_path/name
    folder.mkdir()
    for file in ("s-0.tar", "s-1.tar", f"{name}.tar"):
        shard(folder/file, sample("x", 0, file))
    read = lambda pattern: read_webdataset_pairs(pattern).captions
    assert read(folder/f"{name}.tar") == read([f"{folder}/{name}.tar"]) == [f"{name}.tar"]
    assert read(folder/"s-*.tar") == read(f"{folder}/s-{{0..1}}.tar") == ["s-0.tar", "s-1.tar"]
    assert read(f"{glob.escape(str(folder))}/s-?.tar") == ["s-0.tar", "s-1.tar"]
    assert sorted(read(folder)) == sorted(["s-0.tar", "s-1.tar", f"{name}.tar"])

def test_spans_are_spelt_out_one_by_one(tmp_path):
    for k in (*range(8, 12), "008", "009", "010"):
        (tmp_path/f"a{k}.tar").touch()
    names = lambda pattern: [p.name for p in expand_shards(tmp_path/pattern)]
    assert names("a{8..11}.tar") == ["a8.tar", "a9.tar", "a10.tar", "a11.tar"]
    assert names("a{008..010}.tar") == names("a{08..010}.tar") == ["a008.tar", "a009.tar", "a010.tar"]
    assert names("a{,00}{8..9}.tar") == ["a8.tar", "a9.tar", "a008.tar", "a009.tar"]
    start = time.perf_counter()
    refused("a12.tar: the shard is not there", expand_shards, tmp_path/"a{8..99999999999}.tar")
    refused("stands for no shard at all", expand_shards, tmp_path/"a{9..8}.tar")
    refused(f"no file in {tmp_path} fits b*.tar; check the pattern", expand_shards, tmp_path/"b*.tar")
    refused("b*.tar; check", expand_shards, tmp_path/"no"/"b*.tar")
    refused("shards are read from this machine", expand_shards, "pipe:curl -s https://x.org/{000..123}.tar")
    assert time.perf_counter() - start < 5

def test_what_lies_beside_the_shards_of_a_folder_is_not_looked_at(tmp_path):
    shard(tmp_path/"00000.tar", sample("x", 0, "a"))
    for name in ("00000.parquet", "00000_stats.json", "._00000.tar", "README.md"):
        (tmp_path/name).write_bytes(b"PAR1")
    assert read_webdataset_pairs(tmp_path).ids == ["x"]
    (tmp_path/"packed").mkdir()
    (tmp_path/"packed"/"0.tar.gz").touch()
    refused("no .tar in this folder (such as 0.tar.gz are to be unpacked first)", expand_shards, tmp_path/"packed")

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
    monkeypatch.setattr(tars, "_scan_shard", lambda *_: pytest.fail("scanned again"))
    assert read_webdataset_pairs(path, incomplete="skip").fingerprint == first.fingerprint
    monkeypatch.undo()
    os.environ["MCL_REPRO_DATA"] = str(home)
    shard(path, {**sample("a", 0, "second"), "pad.bin": bytes(2**23)})
    os.utime(path, (1, 1))
    assert read_webdataset_pairs(path, incomplete="skip").captions == ["second"]
