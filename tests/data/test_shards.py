"""CC3M's way from its table to shards and subsets, streaming, faces under invented names, and the papers' formats end
to end; on the real packs where MCL_REPRO_REAL_DATA points to them.
"""
import csv, gzip, hashlib, importlib.util, inspect, io, json, pickle, shlex, struct, sys, tarfile, time, warnings, zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from data_files import REAL, real, refused
from mcl_repro.attacks.base import load_poisoned, make_attack, poison, save_poisoned
from mcl_repro.cli import main as cli
from mcl_repro.core.errors import SettingsError
from mcl_repro.data.fetching import add_dataset
from mcl_repro.data.labelled import _imagenet, _import_torchvision_datasets
from mcl_repro.data.order import row_hash, seeded_order
from mcl_repro.data.pairs import ArrayImages, check_images, ConcatImages, FileImages, OverlayImages
from mcl_repro.data.pictures import decode, square
from mcl_repro.data.registry import first_images, open_data, read_manifest, resolve
from mcl_repro.data.shards import (
    count_links, invented_names, rename_faces, stream_batches, table_form, tsv_rows, write_link_list,
)
from mcl_repro.data.tars import read_webdataset_pairs
from mcl_repro.model.clip import build_clip


def encoded(seed=0, size=(40, 30), format="JPEG", **options):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(
        out, format, **options
    )
    return out.getvalue()

def write_shard(folder, number, rows, per_shard=10, failures=None, digits=9):
    """What img2dataset 1.47 leaves of one shard (but the parquet): members in the order of arrival, keys with leading
    zeros, statistics at the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder/f"{number:05d}.tar", "w") as tar:
        for r in np.random.default_rng(number).permutation(rows).tolist():
            about = dict(
                caption=f"caption {r}", url=f"http://example.org/{r}.jpg", key=f"{r:0{digits}d}", status="success",
                error_message=None, width=40, height=30, original_width=40, original_height=30, exif="{}",
                sha256=hashlib.sha256(encoded(r)).hexdigest(),
            )
            for ending, content in dict(
                jpg=encoded(r), txt=f"caption {r}".encode(), json=json.dumps(about, indent=4).encode()
            ).items():
                info = tarfile.TarInfo(f"{r:0{digits}d}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    stats = dict(
        count=per_shard, successes=len(rows), failed_to_download=per_shard - len(rows), failed_to_resize=0,
        duration=1.5, start_time=1795750860.8, end_time=1795750862.3,
        status_dict={"success": len(rows), **(failures or {"HTTP Error 404: Not Found": per_shard - len(rows)})},
    )
    (folder/f"{number:05d}_stats.json").write_text(json.dumps(stats, indent=4))

def table(path, count, caption="caption {}"):
    path.write_text("".join(f"{caption.format(r)}\thttp://example.org/{r}.jpg\n" for r in range(count)))
    return path


# ---- the order

def plainly(row, seed=0, mask=2**64 - 1):
    "The formula of the notebook in whole numbers."
    z = (seed + (row + 1)*0x9E3779B97F4A7C15) & mask
    z = ((z ^ z >> 30)*0xBF58476D1CE4E5B9) & mask
    z = ((z ^ z >> 27)*0x94D049BB133111EB) & mask
    return z ^ z >> 31

@pytest.mark.parametrize("seed", [0, 1, 1234567, 2**64 - 1])
def test_the_order_is_the_formula(seed):
    rows = [0, 1, 2, 9_999, 3_318_332, 2**32, 2**40]
    assert row_hash(rows, seed).tolist() == [plainly(r, seed) for r in rows]
    assert seeded_order(500, seed).tolist() == sorted(range(500), key=lambda r: plainly(r, seed))

def test_the_manifest_has_the_hash_of_the_published_list(tmp_path, capsys):
    began = time.perf_counter()
    entry = read_manifest()["cc3m"]
    told = entry["subset"]
    assert cli.main(["data", "ids", "cc3m", str(told["count"]), "--out", str(tmp_path / "ids.txt")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'ids.txt'}\n"
    ids = np.loadtxt(tmp_path/"ids.txt", dtype=np.int64)
    assert len(np.unique(ids)) == told["count"] == 500_000
    assert ids.max() < entry["rows"]["train"] == 3_318_333
    assert (np.diff(row_hash(ids).astype(float)) >= 0).all()
    assert hashlib.sha256((tmp_path / "ids.txt").read_bytes()).hexdigest() == told["sha256"]
    assert time.perf_counter() - began < 20
    assert cli.main(["data", "ids", "cc3m", "3"]) == 0 and capsys.readouterr().out == "".join(f"{i}\n" for i in ids[:3])
    assert cli.main(["data", "ids", "coco", "3"]) == 2
    assert "coco:train has no published order" in capsys.readouterr().err

def test_a_count_takes_the_published_order_where_the_manifest_says_so_and_the_first_elsewhere(tmp_path):
    there = [r for r in range(30) if r % 4]
    for k in range(3):
        write_shard(tmp_path/"cc/train", k, [r for r in there if r // 10 == k])
    add_dataset("cc3m", tmp_path/"cc")
    add_dataset("mine", tmp_path/"cc/train")
    order = [r for r in sorted(range(30), key=plainly) if r in there]
    for n in (1, 5, len(there)):
        pairs = open_data(f"cc3m:train:{n}")
        assert [int(i) for i in pairs.ids] == order[:n]
        assert pairs.captions == [f"caption {r}" for r in order[:n]]
        assert len(pairs.images) == n
        assert (
            pairs.image_array(size=16) == np.stack([np.asarray(square(decode(encoded(r), ""), 16)) for r in order[:n]])
        ).all()
    assert open_data("mine:all:5").ids == open_data("mine:all").ids[:5] and len(open_data("cc3m:train")) == len(there)
    assert open_data(resolve("cc3m:train:5")).ids == open_data("cc3m:train:5").ids
    refused("has only 22 images, not 23", open_data, "cc3m:train:23")

def test_the_published_order_needs_row_numbers(tmp_path):
    (tmp_path/"cc").mkdir()
    (tmp_path/"cc/0.jpg").write_bytes(encoded())
    write = lambda text: ((tmp_path/"cc/train.csv").write_text(text), add_dataset("cc3m", tmp_path/"cc"))
    write("image,caption\n0.jpg,a\n0.jpg,b\n")
    refused("needs row numbers as ids, and 0.jpg#0 is none; write the row numbers", open_data, "cc3m:train:1")
    write("id,image,caption\n7,0.jpg,a\n3318333,0.jpg,b\n")
    refused("id 3318333 is no row of a table of 3,318,333", open_data, "cc3m:train:1")
    write("id,image,caption\n7,0.jpg,a\n3318332,0.jpg,b\n")
    assert open_data("cc3m:train:1").ids == [min("7", "3318332", key=lambda i: plainly(int(i)))]


# ---- from the table to shards

@pytest.mark.parametrize("text, message", [
    (b"", "the file is empty"),
    (b"only a caption\n", "line 1: 1 fields"),
    (b"a\thttp://x.org/1\tmore\n", "line 1: 3 fields"),
    (b"a\thttp://x.org/1\n\nb\thttp://x.org/2\n", "line 2: 1 fields"),
    (
        b"words\turl\na\thttp://x.org/1\n",
        "line 1: url is not a web address; delete this line if it names the columns",
    ),
    (b"a\thttp://x.org/1\n \thttp://x.org/2\n", "line 2: the caption is empty"),
    (b"a\thttp://x.org/1\nb\tx.jpg\n", "line 2: x.jpg is not a web address; take the original file"),
    (b"a\thttp://x.org/1\nb\tfile:///etc/hostname\n", "line 2: file:///etc/hostname is not a web address"),
    ("café\thttp://x.org/1\n".encode("latin1"), "line 1: not UTF-8 (byte 0xe9)"),
    (b"a,http://x.org/1\n", "line 1: 1 fields where caption<tab>address belong; put a tab and no comma between them"),
    (b"a\thttp://x.org/1\tx\n", "3 fields where caption<tab>address belong; name the columns in a first line"),
    (b"http://x.org/1\ta\nb\thttp://x.org/2\n", "line 2: b is not a web address; take the original file"),
    (b"id\turl\tcaption\n1\thttp://x.org/1\n", "line 2: 2 fields where 3 belong"),
    (b"caption\turl\n", "the file is empty"),
    (b"a"*2**20 + b"\thttp://x.org/1\n", "line 1: longer than 1,048,576 bytes"),
    (b"\x1f\x8b\x08 no gzip", "the compressed file is damaged or cut off"),
    (b"a\thttp://x.org/1\n\thttp://x.org/2\nb\n\thttp://x.org/4\n",
     "line 2: the caption is empty; write one, or delete the line and know that the later rows are renumbered "
     "(3 of 4 lines are no pairs, the last is "),
])
def test_a_table_with_a_wrong_line_is_refused_and_leaves_nothing(tmp_path, text, message):
    (tmp_path/"t.tsv").write_bytes(text)
    refused(message, write_link_list, tmp_path/"t.tsv", tmp_path/"out")
    assert list((tmp_path/"out").iterdir()) == []
    refused("gone.tsv: cannot be read", write_link_list, tmp_path/"gone.tsv", tmp_path/"out")
    refused("t.tsv: cannot be a folder for the list", write_link_list, tmp_path/"t.tsv", tmp_path/"t.tsv")

PAIR_LINES = [("a red bus .", "http://x.org/1"), ("HTTP is a word", "HTTPS://x.org/2?a=b"), ("café", "http://x.org/3")]
FORMS = {
    "{0}\t{1}": "",
    "{1}\t{0}": "the address comes first there, as in CC12M",
    "caption\turl\n{0}\t{1}": "its first line names the columns and is no row",
    "URL\tTEXT\n{1}\t{0}": "its first line names the columns and is no row",
    "key\t\"caption\"\timage_url\tmore\n7\t{0}\t{1}\t8": "its first line names the columns and is no row",
}
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_every_form_of_the_table_gives_the_same_list(tmp_path, form, mark, end, pack):
    head, _, line = form.rpartition("\n")
    text = mark + "".join(l + end for l in [*filter(None, [head]), *(line.format(*pair) for pair in PAIR_LINES)])
    (tmp_path/"t.tsv").write_bytes(pack(text.encode()))
    path, rows = write_link_list(tmp_path/"t.tsv", tmp_path/"out")
    assert rows == 3 and list(tsv_rows(tmp_path/"t.tsv")) == PAIR_LINES
    assert path.read_text("utf-8") == "caption\turl\n" + "".join(f"{c}\t{u}\n" for c, u in PAIR_LINES)
    assert table_form(tmp_path/"t.tsv") == FORMS[form]

def test_captions_reach_img2datasets_parser_as_they_are(tmp_path):
    captions = [
        "plain", '"quoted" start', '5" wide', '"', 'ends with "', "NA", "comma, semicolon; 'x'", " spaces ",
        "café 日本語 \u2028 \x85", "a\rcarriage return",
    ]
    (tmp_path / "t.tsv").write_bytes(
        "".join(f'{c}\thttp://x.org/{i}?a="b"\r\n' for i, c in enumerate(captions)).encode()
    )
    path, rows = write_link_list(tmp_path/"t.tsv", tmp_path/"out", "validation")
    # RFC 4180, which pyarrow follows too
    read = list(csv.reader(io.StringIO(path.read_bytes().decode(), newline=""), delimiter="\t", strict=True))
    assert rows == len(captions) and path.name == "validation-list.tsv" and read[0] == ["caption", "url"]
    assert [c for c, _ in read[1:]] == [c.replace("\r", " ") for c in captions]
    assert read[3][1] == 'http://x.org/2?a="b"'
    assert path.read_bytes().count(b"\n") == rows + 1

FAKE = f"""
import hashlib, io, json, pathlib, sys, tarfile
import numpy as np
from PIL import Image
{inspect.getsource(encoded)}
{inspect.getsource(write_shard)}
options = dict(word[2:].split("=", 1) for word in sys.argv[1:])
lines = pathlib.Path(options["url_list"]).read_text().splitlines()[1:]
out = pathlib.Path(options["output_folder"])
done = {{int(p.name.split("_")[0]) for p in out.glob("*.json")}}     # as img2dataset itself finds what is finished
per = int(options["number_sample_per_shard"])
shards = [k for k in range(-(-len(lines)//per)) if k not in done]
with open(out.parent/"calls.txt", "a") as f:
    print(len(shards), *(options[name] for name in ("resize_mode", "image_size", "incremental_mode")), file=f)
for k in shards:
    size = min(per, len(lines) - k*per)
    write_shard(out, k, [r for r in range(k*per, k*per + size) if r % 5], size)
"""

def fake_img2dataset(folder):
    "A program that writes shards as img2dataset does. Python is called by a shell: its path may have a space."
    (folder/"fake.py").write_text(FAKE)
    program = folder/"img2dataset"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(folder/"fake.py"))} "$@"\n')
    program.chmod(0o755)
    return program

def test_the_command_fetches_goes_on_and_counts(tmp_path, capsys):
    program = fake_img2dataset(tmp_path)
    tsv = table(tmp_path/"t.tsv", 25)
    words = ["data", "cc3m", str(tsv), "--out", str(tmp_path/"cc 3m"), "--program", str(program)]
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    assert "20.0% of 25 links are dead" in out
    assert "5      20.0%  HTTP 404" in out
    assert "25 rows; CC3M itself has 3,318,333" in err
    assert cli.main(words) == 0
    assert (tmp_path / "cc 3m/calls.txt").read_text() == "1 keep_ratio 256 incremental\n0 keep_ratio 256 incremental\n"
    links = json.loads((tmp_path/"cc 3m/train-links.json").read_text())
    assert (
        (links["rows"], links["asked"], links["fetched"], links["dead"], links["unfinished"]) == (25, 25, 20, 0.2, [])
    )
    assert links["list"]["missing"] == 5
    assert sorted(map(int, (tmp_path/"cc 3m/train-missing.txt").read_text().split())) == [0, 5, 10, 15, 20]
    shard = tmp_path/"cc 3m/train/00000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:len(whole)//2])     # its statistics say that it is finished
    assert cli.main(["data", "links", str(tmp_path/"cc 3m")]) == 2 and "no shard is finished" in capsys.readouterr().err
    assert cli.main(words) == 0
    assert shard.read_bytes() == whole
    assert (tmp_path / "cc 3m/calls.txt").read_text().endswith("1 keep_ratio 256 incremental\n")
    (tmp_path/"cc 3m/calls.txt").write_text("\n\n")
    assert cli.main(["data", "add", "cc3m", str(tmp_path / "cc 3m")]) == 0
    assert "cc3m:train (20 images, 20 pairs of 3,318,333 rows)" in capsys.readouterr().out
    assert cli.main(words + ["--split", "../out"]) == 2 and "invalid choice: '../out'" in capsys.readouterr().err
    capsys.readouterr()
    assert cli.main(words[:-1] + ["no-such-program"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("no-such-program '--url_list=")
    assert "--number_sample_per_shard=10000 " in out
    assert "is not installed here" in err
    assert cli.main(words + ["--print"]) == 0
    assert capsys.readouterr().out.startswith(shlex.quote(str(program)))
    assert (tmp_path / "cc 3m/calls.txt").read_text().count("\n") == 2
    assert cli.main(["data", "links", str(tmp_path)]) == 2
    assert "make it with: mcl_repro data cc3m TSV" in capsys.readouterr().err

def test_unfinished_and_unexplained_shards_are_told_apart(tmp_path):
    write_link_list(table(tmp_path/"t.tsv", 35), tmp_path/"cc")
    count = lambda **more: count_links(tmp_path/"cc", count=10, per_shard=10, **more)
    assert count()["dead"] is None and count()["unfinished"] == [0, 1, 2, 3]
    for k in range(4):
        write_shard(tmp_path/"cc/train", k, list(range(10*k, 10*k + 4)), 10 if k < 3 else 5)
    whole = (tmp_path/"cc/train/00001.tar").read_bytes()
    (tmp_path/"cc/train/00001.tar").write_bytes(whole[:len(whole)//2])   # being written
    # keys only
    (tmp_path/"cc/train/00002_stats.json").unlink()
    links = count()
    assert (links["unfinished"], links["asked"], links["fetched"]) == ([1], 25, 12)
    assert links["reasons"] == {"HTTP 404": 7, "unknown": 6}
    order, there = sorted(range(35), key=plainly), {*range(4), *range(20, 24), *range(30, 34)}
    assert links["list"]["missing"] == sum(r not in there for r in order[:10])
    assert order[: links["list"]["reaches"]][-1] in there
    assert sum(r in there for r in order[: links["list"]["reaches"]]) == 10
    assert count_links(tmp_path / "cc", count=20, per_shard=10)["list"]["reaches"] is None
    (tmp_path/"cc/train/00000_stats.json").write_text("{")
    assert count()["reasons"] == {"unknown": 12, "HTTP 404": 1}
    write_shard(tmp_path/"cc/train", 2, [3, 4])
    refused("00002.tar: has row", count)
    write_shard(tmp_path/"cc/train", 2, [40])
    refused("00002.tar: has row 40, where rows 20 to 29 belong", count)
    with tarfile.open(tmp_path/"cc/train/00000.tar", "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    refused("00000.tar: its keys are not numbers", count)


@pytest.mark.parametrize("word", ["cc3m", "links", "ids", "faces"])
def test_every_command_explains_itself(word, capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(["data", word, "--help"])
    assert e.value.code == 0 and f"usage: mcl_repro data {word}" in capsys.readouterr().out


# ---- streaming

streams = pytest.mark.skipif(
    not importlib.util.find_spec("webdataset"), reason="needs the webdataset package: pip install 'mcl_repro[shards]'"
)

@pytest.fixture(scope="module")
def web(tmp_path_factory):
    "57 pairs in five shards of unequal length."
    folder = tmp_path_factory.mktemp("web")
    ends = [0, 20, 23, 24, 45, 57]
    for k in range(5):
        write_shard(folder, k, list(range(ends[k], ends[k + 1])))
    return read_webdataset_pairs(folder)

def epoch(images, batch_size=8, size=16, workers=0, **options):
    return list(stream_batches(images, batch_size, size, workers=workers, **options))
def order(batches):
    return torch.cat([rows for _, rows in batches]).tolist()

@streams
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1, 2, 9])
@pytest.mark.parametrize("batch_size", [1, 8, 57])
def test_every_row_once_in_whole_batches_with_the_pictures_of_random_access(web, workers, batch_size):
    batches = epoch(web.images, batch_size, workers=workers, seed=3)
    assert [len(r) for _, r in batches] == [batch_size] * (57 // batch_size)
    assert len(set(order(batches))) == 57 // batch_size * batch_size
    want = web.images.array(size=16)
    for pixels, rows in batches:
        assert pixels.dtype == torch.uint8 and pixels.shape == (len(rows), 3, 16, 16) and rows.dtype == torch.int64
        assert (pixels.permute(0, 2, 3, 1).numpy() == want[rows]).all()
    if batch_size != 8:
        assert sorted(order(batches)) == list(range(57))

@streams
def test_the_same_seed_epoch_and_workers_give_the_same_batches_and_others_another_order(web):
    first = order(epoch(web.images, workers=2))
    state = torch.get_rng_state()
    again = order(epoch(web.images, workers=2))
    assert again == first and torch.equal(torch.get_rng_state(), state), "the training's own draws are not touched"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        usual = order(epoch(web.images, workers=None))
    assert usual == order(epoch(web.images, workers=5)), "one for each of the five shards, however many cores there are"
    others = [
        order(epoch(web.images, workers=2, epoch=1)), order(epoch(web.images, workers=2, seed=1)),
        order(epoch(web.images, workers=2, window=2)),
    ]
    assert all(o != first for o in others)
    assert len({frozenset(order(epoch(web.images, epoch=e))) for e in range(6)}) > 1, "what an epoch leaves out changes"

@streams
def test_a_wide_window_separates_neighbours(web):
    distance = lambda window: np.abs(np.diff(order(epoch(web.images, 1, window=window)))).mean()
    assert distance(1) < 15 < distance(1000), "57 rows in random order are 19 apart on average"

@streams
def test_a_poisoned_copy_is_an_overlay_and_shards_are_only_read(web, tmp_path):
    folder = web.images.shards[0].parent
    before = {
        p.name: (p.stat().st_size, p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).hexdigest())
        for p in folder.iterdir()
    }
    done = poison(web, make_attack("badnets"), "banana", count=6, image_size=32, eligible=np.ones(57, bool))
    save_poisoned(done, tmp_path/"poison", web)
    pairs = load_poisoned(tmp_path/"poison", web).pairs
    batches = epoch(pairs.images, 8, 32, workers=2)
    want = pairs.images.array(np.arange(57), 32)
    assert sorted(order(epoch(pairs.images, 1, 32))) == list(range(57)) and len(set(order(batches))) == 56
    for pixels, rows in batches:
        assert (pixels.permute(0, 2, 3, 1).numpy() == want[rows]).all()
    clean = web.images.array(size=32)
    assert [r for r in range(57) if (want[r] != clean[r]).any()] == sorted(pairs.image_rows[done.rows].tolist())
    assert np.load(tmp_path / "poison/images.npy").shape == (6, 32, 32, 3)
    assert sum(p.stat().st_size for p in (tmp_path / "poison").iterdir()) < 6 * 32 * 32 * 3 + 8_000
    assert before == {
        p.name: (p.stat().st_size, p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).hexdigest())
        for p in folder.iterdir()
    }

@streams
def test_training_reads_a_poisoned_set_from_its_shards(web, tmp_path):
    "Every pair meets its own caption, poison included; the same twice; another order than the shuffled one."
    from mcl_repro.model.training import Recipe, stream, train, training_set
    pairs = poison(web, make_attack("badnets"), "banana", count=6, image_size=32, eligible=np.ones(57, bool)).pairs
    clip = build_clip("smoke-RN")
    lazy, resident = (training_set(clip, pairs, memory_limit=m) for m in (0, .5))
    recipe = Recipe(epochs=2, batch_size=8, learning_rate=1e-3, order="streamed")
    for batch in stream(lazy, recipe, 0, "cpu", workers=0):
        assert torch.equal(batch.images, resident.images[resident.image_rows[batch.rows]])
        assert torch.equal(batch.tokens, resident.tokens[batch.rows])
    def weights():
        clip = build_clip("smoke-RN", seed=1)
        history = train(clip, lazy, recipe)
        return history, torch.cat([v.flatten().double() for v in clip.model.state_dict().values()])
    (first, a), (second, b) = weights(), weights()
    assert first[-1]["step"] == second[-1]["step"] == 2 * (57 // 8) and torch.equal(a, b)
    from mcl_repro.papers.stages import train_and_save
    work, clip = SimpleNamespace(scratch=tmp_path, out=tmp_path, progress=None), build_clip("smoke-RN", seed=1)
    train_and_save(work, clip, pairs, dict(epochs=2, batch_size=8, learning_rate=1e-3, order="streamed"))
    assert torch.equal(torch.cat([v.flatten().double() for v in clip.model.state_dict().values()]), a), (
        "a stage streams also where all pictures would fit into memory"
    )
    refused(
        "unknown order 'sorted'", Recipe, epochs=1, batch_size=8, learning_rate=1e-3, order="sorted", kind=SettingsError
    )

@streams
def test_a_streamed_training_that_was_stopped_goes_on_to_the_same_weights(web, tmp_path):
    from mcl_repro.model.training import Recipe, train, training_set
    class Stop:
        def after_step(self, state, value):
            if state.step == 10:
                raise KeyboardInterrupt     # in the second epoch of seven steps
        def __getattr__(self, name):
            return lambda *args, **options: None
    clip = lambda: build_clip("smoke-RN", seed=1)
    lazy = training_set(clip(), web, memory_limit=0)
    recipe = Recipe(epochs=2, batch_size=8, learning_rate=1e-3, order="streamed")
    weights = lambda c: torch.cat([v.flatten().double() for v in c.model.state_dict().values()])
    whole = clip()
    train(whole, lazy, recipe)
    with pytest.raises(KeyboardInterrupt):
        train(clip(), lazy, recipe, callbacks=[Stop()], checkpoint=tmp_path/"c.safetensors")
    resumed = clip()
    history = train(resumed, lazy, recipe, checkpoint=tmp_path/"c.safetensors")
    assert [h["step"] for h in history] == [7, 14] and torch.equal(weights(whole), weights(resumed))

@streams
def test_subsets_overlays_and_chains_are_looked_through(web):
    made = ArrayImages(np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8))
    over = OverlayImages(web.images, [50, 0, 20, 3], made)
    sources = [
        web.images.take([30, 2, 2, 56, 9]), over, over.take([3, 4, 50, 1, 20]),
        OverlayImages(web.images.take(range(10, 30)), [0, 19], made.take([1, 2])),
        ConcatImages([web.images, made, over.take(range(5))]), OverlayImages(over, [1, 50], made.take([3, 2])),
    ]
    for images in sources:
        want = images.array(size=16)
        batches = epoch(images, 3, workers=2)
        assert len(batches) == len(images)//3 and sorted(order(epoch(images, 1))) == list(range(len(images)))
        for pixels, rows in batches:
            assert (pixels.permute(0, 2, 3, 1).numpy() == want[rows]).all()
    pairs = web.overlay([5, 1], made.take([0, 1]))
    used = np.unique(pairs.image_rows)     # two rows of the source belong to no pair now
    assert sorted(order(epoch(pairs.images, 1, rows=used))) == used.tolist() and len(used) == 57 < len(pairs.images)

@streams
@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_read_is_named(tmp_path, workers, monkeypatch):
    write = lambda: [write_shard(tmp_path/"w", k, list(range(10*k, 10*k + 10))) for k in range(2)]
    write()
    images = read_webdataset_pairs(tmp_path/"w").images
    row = images.members.index("000000013.jpg")
    path = tmp_path/"w/00001.tar"
    content = bytearray(path.read_bytes())
    content[images.offset[row]:images.offset[row] + 4] = b"none"
    path.write_bytes(content)
    refused("00001.tar, member 000000013.jpg: the file cannot be read as a picture", epoch, images, workers=workers)
    last = int(np.argmax(images.offset*(images.shard == 1)))
    path.write_bytes(content[:images.offset[last] + 5])
    if not workers:
        refused("00001.tar, member", epoch, images.take([last]), batch_size=1)
    path.unlink()
    refused("00001.tar: cannot be read (No such file or directory); put the shard back", epoch, images, workers=workers)
    refused("nothing to stream", epoch, ArrayImages(np.zeros((2, 4, 4, 3), np.uint8)), kind=SettingsError)
    refused("at least 1, not 0", epoch, images, batch_size=0, kind=SettingsError)
    monkeypatch.setitem(sys.modules, "webdataset", None)
    refused("pip install 'mcl_repro[shards]'", epoch, images, kind=SettingsError)


# ---- faces

def people(folder, **counts):
    for k, (person, n) in enumerate(counts.items()):
        (folder/person).mkdir(parents=True)
        for i in range(n):
            (folder/person/f"{person}_{i:04d}.jpg").write_bytes(encoded(100*k + i))
    return folder

def test_faces_get_invented_names_and_no_real_one_is_written(tmp_path, capsys):
    namesake = invented_names(4)[2].replace(" ", "_")      # a real person whose name would have been invented
    real = {"Grace_Hopper": 5, "Alan_Turing": 3, "Ada_Lovelace": 2, "Only_Once": 1, namesake: 4}
    folder = people(tmp_path/"lfw", **real)
    exif = Image.Exif()
    exif[0x010E] = "Grace Hopper at work"
    (folder/"Grace_Hopper/exif.jpg").write_bytes(encoded(7, exif=exif))
    note = PngImagePlugin.PngInfo()
    note.add_text("Title", "Alan Turing")
    (folder/"Alan_Turing/note.png").write_bytes(encoded(8, format="PNG", pnginfo=note))
    hidden = {
        "segment.jpg": lambda x: x[:2] + b"\xff\xec" + struct.pack(">H", 13) + b"Alan Turing" + x[2:],
        "behind.jpg": lambda x: x + b"Alan Turing",
    }
    for name, hide in hidden.items():
        (folder/"Alan_Turing"/name).write_bytes(hide(encoded(9)))
    png, late = encoded(10, format="PNG"), b"tEXtTitle\0Ada Lovelace"
    late = struct.pack(">I", len(late) - 4) + late + struct.pack(">I", zlib.crc32(late))
    # Pillow meets this text only when it decodes
    (folder/"Ada_Lovelace/late.png").write_bytes(png[:-12] + late + png[-12:])
    assert cli.main(["data", "faces", str(folder), "--out", str(tmp_path / "faces")]) == 0
    assert "4 persons with invented names, 15 pictures to train on and 4 for the test" in capsys.readouterr().out
    words = [w.encode() for name in real for w in name.lower().split("_")]
    for path in (tmp_path/"faces").rglob("*"):
        said = str(path.relative_to(tmp_path / "faces")).lower().encode() + (
            path.read_bytes().lower() if path.is_file() else b""
        )
        assert not [w for w in words if w in said], path
    add_dataset("pubfig", tmp_path/"faces")
    train, test = open_data("pubfig:train"), open_data("pubfig:test")
    assert sorted(test.labels) == [0, 1, 2, 3]
    assert sorted(np.bincount(train.labels)) == [2, 3, 5, 5]
    assert train.image_array(size=16).shape == (15, 16, 16, 3)
    name = lambda pairs, i: {
        n
        for n in (Path(pairs.images.names[pairs.image_rows[i]]).parent.name.replace("_", " ").title(),)
        if n in pairs.captions[i]
    }
    assert all(name(pairs, i) for pairs in (train, test) for i in range(len(pairs))) and len({*test.captions}) == 4
    sources = {encoded(100*k + i) for k, n in enumerate(real.values()) for i in range(n)}
    kept = [p for p in (tmp_path/"faces/images").rglob("*.jpg")]
    assert len(kept) == 14 and all(p.read_bytes() in sources for p in kept), "plain files are copied byte for byte"
    pixels = {np.asarray(decode(p.read_bytes(), "")).tobytes() for p in (tmp_path/"faces/images").rglob("*.png")}
    assert pixels == {
        np.asarray(decode((folder / n).read_bytes(), "")).tobytes()
        for n in ("Grace_Hopper/exif.jpg", "Alan_Turing/note.png", "Alan_Turing/segment.jpg", "Ada_Lovelace/late.png")
    }

def test_faces_are_seeded_and_errors_come_before_anything_is_written(tmp_path):
    folder = people(tmp_path/"p", a_x=3, b_y=4, c_z=2)
    content = lambda seed, **more: (
        rename_faces(folder, tmp_path / f"o{len(list(tmp_path.iterdir()))}", seed=seed, **more),
        *(
            (max(tmp_path.glob("o*"), key=lambda p: int(p.name[1:])) / f"{n}.csv").read_text()
            for n in ("train", "test")
        ),
    )
    assert content(0) == content(0) != content(1) and content(0, people=1)[0] == dict(people=1, train=3, test=1)
    assert content(0, least=3)[0] == dict(people=2, train=5, test=2)
    refused("3 folders have 2 pictures or more, 4 are wanted", rename_faces, folder, tmp_path/"new", people=4)
    refused("people is 1 or more, not 0", rename_faces, folder, tmp_path/"new", people=0, kind=SettingsError)
    refused("least is 2 or more", rename_faces, folder, tmp_path/"new", least=1, kind=SettingsError)
    refused("the folder is not there", rename_faces, tmp_path/"gone", tmp_path/"new")
    assert not (tmp_path/"new").exists()
    refused("choose an empty or a new one", rename_faces, folder, folder)
    (folder/"b_y/b_y_0001.jpg").write_bytes(b"<html>")
    refused("b_y_0001.jpg: the file cannot be read as a picture", rename_faces, folder, tmp_path/"new")
    assert not (tmp_path/"new/train.csv").exists()


# ---- the papers' formats, through to a score

def accuracy(data, count=None):
    "Zero-shot accuracy of an untrained tiny CLIP at 32 px."
    from mcl_repro.model.clip import build_clip, embed_images, zero_shot_weights
    from mcl_repro.measures.metrics import clean_accuracy
    clip = build_clip("smoke-RN")
    data = data if count is None else first_images(data, count)
    return clean_accuracy(
        embed_images(clip, data.images) @ zero_shot_weights(clip, data.classnames, ["a photo of a {}"]), data.labels
    )

def test_imagenet_folders_and_cleanclips_list_open_alike_and_are_scored(tmp_path):
    from mcl_repro.core.libraries import import_open_clip
    wnids, pictures = list(_imagenet()), [encoded(i) for i in range(7)]
    for k, w in enumerate(wnids):
        (tmp_path/"a/val"/w).mkdir(parents=True)
        (tmp_path/"a/val"/w/f"ILSVRC2012_val_{k+1:08d}.JPEG").write_bytes(pictures[k % 7])
    (tmp_path/"b/validation/val").mkdir(parents=True)
    lines = ["image,label"]
    for k in range(1000):
        (tmp_path/f"b/validation/val/{k}.JPEG").write_bytes(pictures[k % 7])
        lines.append(f"val/{k}.JPEG,{k}")
    (tmp_path/"b/validation/labels.csv").write_text("\n".join(lines) + "\n")
    opened = []
    for folder in ("a", "b"):
        assert add_dataset("imagenet", tmp_path/folder)["found"] == dict(validation=dict(images=1000, classes=1000))
        opened.append(open_data("imagenet:validation"))
    one, other = opened
    assert one.classnames == other.classnames == list(import_open_clip().IMAGENET_CLASSNAMES)
    assert (one.labels == other.labels).all()
    assert (one.labels == np.arange(1000)).all()
    assert (one.image_array([5, 999], 32) == other.image_array([5, 999], 32)).all()
    assert accuracy(one) == accuracy(other) <= 0.02

def test_cifar100_through_torchvision(tmp_path, monkeypatch):
    base = tmp_path/"cifar-100-python"
    base.mkdir()
    def put(name, content):
        (base/name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((base/name).read_bytes()).hexdigest()]
    names = ["apple", "aquarium_fish", "oak_tree"]
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)
    kind = _import_torchvision_datasets().CIFAR100
    for part in ("train", "test"):
        monkeypatch.setattr(
            kind, f"{part}_list",
            [put(part, {"data": pixels, "fine_labels": [0, 1, 2, 2, 1, 0], "coarse_labels": [0] * 6})],
        )
    meta = put("meta", {"fine_label_names": names, "coarse_label_names": ["x"]})
    monkeypatch.setattr(kind, "meta", dict(filename=meta[0], key="fine_label_names", md5=meta[1]))
    add_dataset("cifar100", tmp_path)
    data = open_data("cifar100:test")
    assert data.classnames == ["apple", "aquarium fish", "oak tree"]
    assert list(data.labels) == [0, 1, 2, 2, 1, 0]
    assert 0 <= accuracy(data) <= 1
    assert (data.image_array(size=32) == pixels.reshape(6, 3, 32, 32).transpose(0, 2, 3, 1)).all()


@real
def test_real_cifar10_and_imagenet_are_scored(tmp_path):
    add_dataset("cifar10", REAL/"cifar10")
    add_dataset("imagenet_sample", REAL/"imagenet1k_sample")
    assert 0.02 < accuracy(open_data("cifar10:test")) < 0.25 and accuracy(open_data("imagenet_sample:all")) < 0.02, (
        "an untrained model guesses"
    )

@real
def test_real_coco_captions_are_ranked():
    from mcl_repro.model.clip import build_clip, embed_images, embed_texts
    from mcl_repro.measures.metrics import hit_rate, median_rank, retrieval_ranks
    pairs = open_data(str(REAL/"coco_mini/annotations/captions_train2017.json"))
    assert len(pairs) == 400
    assert len(pairs.images) == 80
    assert set(np.bincount(pairs.image_rows)) == {5}
    assert check_images(pairs.images)[1] == []
    clip = build_clip("smoke-RN")
    ranks = retrieval_ranks(embed_images(clip, pairs.images), embed_texts(clip, pairs.captions), pairs.image_rows)
    assert (
        len(ranks.text_to_image) == 400
        and 0.02 < hit_rate(ranks.text_to_image, 10) < 0.35
        and 20 < median_rank(ranks.text_to_image) < 60
    ), "an untrained model guesses: 10 of 80"

@real
def test_real_cc3m_table_becomes_a_list_and_its_captions_are_tokenised(tmp_path):
    from mcl_repro.model.clip import build_clip, tokenize
    tsv = REAL/"cc3m_val_tsv/Validation_GCC-1.1.0-Validation.tsv"
    path, rows = write_link_list(tsv, tmp_path/"cc", "validation")
    captions = [c for c, _ in tsv_rows(tsv)]
    assert rows == len(captions) == 15_833 and path.read_text("utf-8").splitlines()[1:] == [
        l for l in tsv.read_text("utf-8").split("\n") if l
    ], "no caption has a quote"
    clip = build_clip("smoke-RN")
    tokens, cut = tokenize(clip, captions)
    long = sum(len(clip.tokenizer.encode(c)) + 2 > clip.context_length for c in captions)
    assert cut == long > 0 and (tokens.max(1).values == tokens.max()).all(), (
        "every caption keeps its end mark, cut or not"
    )

@real
@streams
def test_real_pictures_stream_as_they_are(tmp_path):
    files = sorted((REAL/"imagenet1k_sample").glob("*.JPEG"))[:40]
    for k in range(2):
        with tarfile.open(tmp_path/f"{k:05d}.tar", "w") as tar:
            for i, f in enumerate(files[20*k:20*k + 20]):
                for ending, content in dict(jpg=f.read_bytes(), txt=f.stem.encode()).items():
                    info = tarfile.TarInfo(f"{20*k + i:09d}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    images = read_webdataset_pairs(tmp_path).images
    want = FileImages(REAL/"imagenet1k_sample", [f.name for f in files]).array(size=64)
    for pixels, rows in epoch(images, 10, 64, workers=2):
        assert (pixels.permute(0, 2, 3, 1).numpy() == want[rows]).all()
