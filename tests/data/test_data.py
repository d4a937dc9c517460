"""Pairs, readers, manifest, registry, fetch and verify, on small files in the real formats; on the real packs where
MCL_REPRO_REAL_DATA points to them.
"""
import csv, hashlib, http.server, io, json, multiprocessing, os, pickle, tarfile, threading, zipfile
from pathlib import Path

import numpy as np, pytest, yaml
from PIL import Image


from mcl_repro.core.errors import DataError, UserError
from mcl_repro.data import readers
from mcl_repro.data.fetching import (
    _one_at_a_time, add_dataset, extract, fetch_dataset, list_datasets, show_dataset, verify_dataset,
)
from mcl_repro.data.pairs import (
    ArrayImages, check_images, ConcatImages, FileImages, LabelledImages, OverlayImages, Pairs, square,
)
from mcl_repro.data.readers import (
    _imagenet, _import_torchvision_datasets, read_class_folders, read_coco_pairs, read_csv_labels, read_csv_pairs,
    read_flickr_pairs, read_karpathy_pairs, read_table, read_torchvision, read_webdataset_pairs, write_csv_pairs,
)
from mcl_repro.data.registry import (
    DataRef, open_data, read_manifest, read_registry, reader_options, record_dataset, resolve,
)


def encoded(seed=0, size=(20, 14), format="PNG", **options):
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, format, **options)
    return out.getvalue()

@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    "A data folder of its own for every test."
    monkeypatch.setenv("MCL_REPRO_DATA", str(tmp_path/"home"))
    return tmp_path/"home"

@pytest.fixture
def folder(tmp_path):
    "Ten pictures in a folder whose name has a space."
    path = tmp_path/"my pictures"
    path.mkdir()
    for i in range(10):
        (path/f"{i}.jpg").write_bytes(encoded(i, format="JPEG"))
    return path

def refused(contains, f, *args, **options):
    "f raises DataError in one line that says `contains`."
    with pytest.raises(DataError) as e:
        f(*args, **options)
    assert contains in str(e.value) and "\n" not in str(e.value), str(e.value)


# ---- images

@pytest.mark.parametrize("size", [(20, 14), (14, 20), (33, 32), (32, 32), (7, 100), (224, 225)])
@pytest.mark.parametrize("side", [8, 32, 33])
def test_square_is_torchvisions_resize_and_crop(size, side):
    from mcl_repro.core.libraries import import_torchvision
    import_torchvision()
    from torchvision import transforms as T
    image = Image.open(io.BytesIO(encoded(1, size)))
    theirs = T.Compose([T.Resize(side, T.InterpolationMode.BICUBIC), T.CenterCrop(side)])(image)
    assert (np.asarray(square(image, side)) == np.asarray(theirs)).all()

@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    image = Image.open(io.BytesIO(encoded(2))).convert("RGB")
    image = Image.fromarray(np.arange(280, dtype=np.uint16).reshape(14, 20)) if mode == "I;16" else image.convert(mode)
    name = "x.jpg" if mode == "CMYK" else "x.png"
    image.save(tmp_path/name)
    assert FileImages(tmp_path, [name]).array(size=8).shape == (1, 8, 8, 3)

def test_file_images_keep_order_in_threads(folder):
    images = FileImages(folder, [f"{i}.jpg" for i in range(10)])
    rows = np.random.default_rng(0).integers(0, 10, 200)
    batch = images.array(rows, 12)
    for k in range(0, 200, 17):
        assert (batch[k] == np.asarray(square(images[int(rows[k])], 12))).all()

def test_truncated_and_unreadable_pictures_are_named(folder):
    whole = (folder/"4.jpg").read_bytes()
    images = FileImages(folder, [f"{i}.jpg" for i in range(10)])
    for cut in (len(whole) - 150, len(whole) - 20): # half of it, only the last rows
        (folder/"4.jpg").write_bytes(whole[:cut])
        refused("4.jpg: the file is cut off", images.array, size=8)
    (folder/"4.jpg").write_bytes(b"<html>not found</html>")
    refused("4.jpg: the file cannot be read as a picture", images.array, size=8)
    (folder/"4.jpg").unlink()
    refused("4.jpg is not in", images.array, size=8)
    refused("4.jpg is not in", FileImages, folder, images.names)

def test_truncated_pictures_stay_errors_even_when_pillow_is_told_to_load_them(folder, monkeypatch):
    from PIL import ImageFile
    assert not ImageFile.LOAD_TRUNCATED_IMAGES, "somebody switched on LOAD_TRUNCATED_IMAGES"

def test_overlay_and_concat_agree_with_plain_arrays():
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (n, 9, 9, 3), dtype=np.uint8) for n in (8, 5))
    base, new = ArrayImages(a), ArrayImages(b)
    want = a.copy()
    rows = [6, 0, 3, 2, 7]
    want[rows] = b
    over, chain = OverlayImages(base, rows, new), ConcatImages([base, ArrayImages(b[:0]), new])
    order = rng.integers(0, 8, 40)
    assert (over.array(order, 9) == want[order]).all() and (
        over.take(order[:8]).array(None, 9) == want[order[:8]]
    ).all()
    order = rng.integers(0, 13, 60)
    both = np.concatenate([a, b])
    assert (chain.array(order, 9) == both[order]).all() and (chain.take(order).array(None, 9) == both[order]).all()
    assert over.fingerprint != OverlayImages(base, rows[::-1], new).fingerprint

def test_fingerprint_of_files_sees_names_order_and_sizes(folder):
    names = [f"{i}.jpg" for i in range(10)]
    prints = {
        FileImages(folder, names).fingerprint, FileImages(folder, names[::-1]).fingerprint,
        FileImages(folder, names[:9]).fingerprint,
    }
    (folder/"9.jpg").write_bytes(encoded(99, format="JPEG") + b"x")
    assert len(prints | {FileImages(folder, names).fingerprint}) == 4


# ---- pairs

def make_pairs(n=6):
    pixels = np.random.default_rng(0).integers(0, 256, (n//2, 8, 8, 3), dtype=np.uint8)
    return Pairs(
        [f"p{i}" for i in range(n)], [f"caption {i}" for i in range(n)], ArrayImages(pixels),
        np.repeat(np.arange(n // 2), 2), np.arange(n) % 3,
    )

def test_pairs_survive_pickling(folder, tmp_path):
    shard(tmp_path/"a.tar", {"a.png": encoded(), "a.txt": b"one"})
    for pairs in (make_pairs(), open_data("world:train:4"), read_webdataset_pairs(tmp_path/"a.tar")):
        again = pickle.loads(pickle.dumps(pairs))
        assert (
            again.fingerprint == pairs.fingerprint and (again.image_array(size=32) == pairs.image_array(size=32)).all()
        )

def test_every_change_changes_the_fingerprint_and_nothing_is_changed_in_place():
    pairs = make_pairs()
    before = pairs.fingerprint
    picture = ArrayImages(np.zeros((1, 8, 8, 3), np.uint8))
    others = [
        pairs.select([0, 1]), pairs.select([1, 0, 2, 3, 4, 5]), pairs.replace(captions={2: "other"}),
        pairs.replace(labels=None), pairs.replace(ids=list("abcdef")), pairs.overlay([1], picture),
        pairs.replace(images=OverlayImages(pairs.images, [0], picture)),
    ]
    assert len({before, *(o.fingerprint for o in others)}) == len(others) + 1
    fresh = make_pairs()
    assert (
        fresh.fingerprint == before
        and fresh.captions == pairs.captions
        and (fresh.image_rows == pairs.image_rows).all()
    )

def test_overlay_changes_only_the_named_pairs():
    pairs = make_pairs()
    changed = pairs.overlay([3, 0], ArrayImages(np.zeros((2, 8, 8, 3), np.uint8)))
    before, after = pairs.image_array(size=8), changed.image_array(size=8)
    assert (after[[0, 3]] == 0).all() and (after[[1, 2, 4, 5]] == before[[1, 2, 4, 5]]).all()

@pytest.mark.parametrize("change, message", [
    (dict(ids=["a"]*6), "id a comes twice"), (dict(captions=["x"]*5 + ["\t"]), "pair p5 (row 5) has an empty caption"),
    (dict(captions=["x"]*5), "6 ids but 5 captions"), (dict(image_rows=[0]*5 + [3]), "row 3 does not exist"), (dict(captions=["x"]*5 + [None]), "empty caption")])
def test_pairs_refuse_what_is_wrong(change, message):
    refused(message, make_pairs().replace, **change)


# ---- text formats

def test_csv_round_trip_is_lossless(tmp_path):
    captions = [
        "plain",
        'quotes " and ""',
        "comma, semicolon; tab\t.",
        "two\nlines\r\nand more",
        "Größe café 日本語 \U0001f34c",
        " spaces ",
        "#hashtag 'x'",
    ]
    pixels = np.random.default_rng(0).integers(0, 256, (4, 17, 17, 3), dtype=np.uint8)
    pairs = Pairs([f"id/{i}" for i in range(7)], captions, ArrayImages(pixels), [0, 1, 2, 2, 1, 3, 0], np.arange(7))
    back = read_csv_pairs(write_csv_pairs(pairs, tmp_path/"out"))
    assert back.ids == pairs.ids and back.captions == captions and (back.labels == pairs.labels).all()
    assert (back.image_array(size=17) == pairs.image_array(size=17)).all() and len(back.images) == 4
    assert len(read_csv_pairs(write_csv_pairs(pairs.select([2, 3]), tmp_path/"few", size=8)).images) == 1

def test_world_pairs_leave_the_library_losslessly(tmp_path):
    pairs = open_data("world:train:5")
    back = open_data(str(write_csv_pairs(pairs, tmp_path/"w", size=32).parent))
    assert back.captions == pairs.captions and (back.image_array(size=32) == pairs.image_array(size=32)).all()

CSV = [
    ("image,text\n0.jpg,a\n", "there is no column caption; it has image, text", {}),
    ("image,caption\n", "there is a header but no row", {}), ("", "the file is empty", {}),
    ("image,caption\n0.jpg,a\n\n1.jpg,   \n", "line 4: the caption is empty", {}),
    ("image,caption\n0.jpg,a\nnope.jpg,b\n", "line 3: image nope.jpg is not in", {}),
    ('image,caption\n0.jpg,"two\nlines"\nnope.jpg,b\n', "line 4: image nope.jpg", {}),
    ("image,caption\n0.jpg,a,b\n", "line 2: 3 fields where 2 belong", {}),
    ('image,caption\n0.jpg,"open\n', "line 2: unexpected end of data", {}),
    ("image,caption\n/etc/passwd,a\n", "line 2: /etc/passwd lies outside the data folder", {}),
    ("image,caption\nsub/../../x.jpg,a\n", "lies outside the data folder", {}),
    ("image,caption\n,a\n", "line 2: the image path is empty", {}),
    ("image,caption,id\n0.jpg,a,7\n1.jpg,b,7\n", "id 7 comes twice", {}),
    ("image,caption,label\n0.jpg,a,cat\n", "line 2: the label cat is not an integer", {}),
    ("a,http://x.org/0.jpg\n", "line 1: the image is a web address", dict(image=1, caption=0, header=False)),
    ("0.jpg,a\n", "there is no column 5", dict(image=5, caption=1, header=False)),
]
@pytest.mark.parametrize("text, message, options", CSV)
def test_csv_errors_name_file_line_and_remedy(folder, text, message, options):
    (folder/"pairs.csv").write_text(text)
    refused(message, read_csv_pairs, folder/"pairs.csv", **options)

def test_csv_details(folder):
    (folder/"a.csv").write_bytes("\ufeffimage,caption\r\n0.jpg,café\r\n0.jpg,again\r\n./1.jpg,x\r\n".encode())
    pairs = read_csv_pairs(folder/"a.csv")
    assert (
        pairs.captions == ["café", "again", "x"]
        and pairs.ids == ["0.jpg#0", "0.jpg#1", "1.jpg#0"]
        and list(pairs.image_rows) == [0, 0, 1]
    )
    (folder/"b.tsv").write_text('2.jpg\tsay "hi"\n3.jpg\t"a ""quoted"" field"\n')
    assert read_csv_pairs(folder/"b.tsv", image=0, caption=1, header=False).captions == ['say "hi"', 'a "quoted" field']
    (folder/"c.txt").write_text("p;c\n2.jpg;semi, colon\n")
    assert read_csv_pairs(folder/"c.txt", image="p", caption="c", sep=";").captions == ["semi, colon"]
    (folder/"list").mkdir()
    (folder/"list"/"d.csv").write_text(f"image,caption\n{folder/'5.jpg'},absolute but inside\n")
    assert read_csv_pairs(folder/"list"/"d.csv", root=folder).images.names == ["5.jpg"]

@pytest.mark.parametrize("reader", ["csv", "flickr", "karpathy"])
def test_captions_that_are_not_utf8_are_refused_with_their_line(folder, reader):
    (folder/"captions").write_bytes("image,caption\n0.jpg,a\n1.jpg,café\n".encode("latin1"))
    call = dict(
        csv=lambda: read_csv_pairs(folder / "captions"), flickr=lambda: read_flickr_pairs(folder / "captions", folder),
        karpathy=lambda: read_karpathy_pairs(folder / "captions", folder),
    )[reader]
    refused("captions, line 3: not UTF-8 (byte 0xe9)", call)

def flickr_files(folder):
    (folder / "Flickr8k.token.txt").write_text(
        "".join(f"{i}.jpg#{k}\tcaption {k} of {i} .\n" for i in range(5) for k in range(5))
        + "ghost.jpg.1#0\tno picture\n"
    )
    for part, names in dict(train="3 1", dev="0", test="4").items():
        (folder/f"Flickr_8k.{part}Images.txt").write_text("".join(f"{n}.jpg\n" for n in names.split()))
    return folder/"Flickr8k.token.txt"

def test_flickr_by_split_list(folder):
    tokens = flickr_files(folder)
    pairs = read_flickr_pairs(tokens, folder, folder/"Flickr_8k.trainImages.txt")
    assert (
        pairs.images.names == ["3.jpg", "1.jpg"]
        and pairs.ids[:2] == ["3.jpg#0", "3.jpg#1"]
        and list(pairs.image_rows) == [0] * 5 + [1] * 5
    )
    refused("line 26: image ghost.jpg.1 is not in", read_flickr_pairs, tokens, folder)

@pytest.mark.parametrize("tokens, listed, message", [
    ("0.jpg#0 a caption\n", "0.jpg\n", "line 1: expected \"<image>#<number><tab><caption>\" but there is no tab"), ("0.jpg\tx\n", "0.jpg\n", "but there is no #"),
    ("0.jpg#0\tx\n0.jpg#0\ty\n", "0.jpg\n", "line 2: 0.jpg#0 comes twice"), ("0.jpg#0\t \n", "0.jpg\n", "line 1: the caption is empty"),
    ("0.jpg#0\tx\n", "0.jpg\n1.jpg\n", "list.txt, line 2: 1.jpg has no caption"), ("0.jpg#0\tx\n", "0.jpg\n0.jpg\n", "list.txt, line 2: 0.jpg comes twice"),
    ("77.jpg#0\tx\n", "77.jpg\n", "list.txt, line 1: image 77.jpg is not in"), ("../0.jpg#0\tx\n", "../0.jpg\n", "lies outside the data folder"), ("0.jpg#0\tx\n", "", "list.txt: the file is empty")])
def test_flickr_errors(folder, tokens, listed, message):
    (folder/"tokens.txt").write_text(tokens)
    (folder/"list.txt").write_text(listed)
    refused(message, read_flickr_pairs, folder/"tokens.txt", folder, folder/"list.txt")

def test_karpathy_splits_and_errors(folder):
    images = [
        dict(filename=f"{i}.jpg", split=s, sentences=[dict(raw=f"{k} of {i}") for k in range(5 + i)])
        for i, s in enumerate(["train", "restval", "val", "test"])
    ]
    path = folder/"dataset_coco.json"
    path.write_text(json.dumps(dict(images=images)))
    pairs = read_karpathy_pairs(path, folder, "train+restval", per_image=5)
    assert len(pairs) == 10 and pairs.ids[5] == "1.jpg#0" and len(pairs.images) == 2
    refused("no split dev; it has restval, test, train, val", read_karpathy_pairs, path, folder, "dev")
    refused("5 captions where 6 are wanted", read_karpathy_pairs, path, folder, "train", per_image=6)
    images[0]["sentences"][2]["raw"] = ""
    path.write_text(json.dumps(dict(images=images)))
    refused("image 0.jpg: the caption is empty", read_karpathy_pairs, path, folder)
    path.write_text(json.dumps(dict(images=[dict(file="x")])))
    refused("not one of Karpathy's split files", read_karpathy_pairs, path, folder)
    path.write_text(json.dumps(dict(images=[dict(filename="0.jpg", split="train", sentences=[])])))
    refused("there is no caption in split train", read_karpathy_pairs, path, folder)
    path.write_text('{"images": [')
    refused("dataset_coco.json, line 1: not JSON", read_karpathy_pairs, path, folder)

def test_coco_captions_and_errors(folder):
    content = dict(images=[dict(id=9, file_name="1.jpg"), dict(id=2, file_name="0.jpg"), dict(id=5, file_name="3.jpg")],
                   annotations=[dict(id=70 + k, image_id=[2, 9][k % 2], caption=f"c{k}") for k in range(6)])
    path = folder/"captions_tiny.json"
    path.write_text(json.dumps(content))
    pairs = read_coco_pairs(path, folder, per_image=2)
    assert pairs.ids == ["1.jpg#71", "1.jpg#73", "0.jpg#70", "0.jpg#72"] and len(pairs.images) == 2
    content["annotations"][0]["image_id"] = 1234
    path.write_text(json.dumps(content))
    refused("a caption belongs to image 1234, which the file does not list", read_coco_pairs, path, folder)
    path.write_text(json.dumps(dict(images=content["images"], annotations=[dict(id=1, image_id=2, bbox=[])])))
    refused("not a COCO captions file", read_coco_pairs, path, folder)


# ---- shards

def shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

def sample(key, seed, caption):
    return {
        f"{key}.jpg": encoded(seed, format="JPEG"), f"{key}.txt": caption.encode(),
        f"{key}.json": b'{"caption": "from json", "url": "u"}',
    }

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
    assert check_images(pairs.images)[1] == [] and sorted(os.listdir(tmp_path)) == [
        "00000.tar", "00001.tar", "00002.tar",
    ]

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
    monkeypatch.setattr(readers, "_scan_shard", lambda p: pytest.fail("scanned again"))
    assert read_webdataset_pairs(path, incomplete="skip").fingerprint == first.fingerprint
    monkeypatch.undo()
    os.environ["MCL_REPRO_DATA"] = str(home)
    shard(path, {**sample("a", 0, "second"), "pad.bin": bytes(2**23)})
    os.utime(path, (1, 1))
    assert read_webdataset_pairs(path, incomplete="skip").captions == ["second"]


# ---- labelled images

def test_class_folders(tmp_path):
    for name in ("b_dog/2.png", "b_dog/1.PNG", "a/x.webp", "a/notes.txt", ".cache/0.png"):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_bytes(encoded(format="WEBP" if name.endswith("webp") else "PNG"))
    data = read_class_folders(tmp_path)
    assert (
        data.ids == ["a/x.webp", "b_dog/1.PNG", "b_dog/2.png"]
        and list(data.labels) == [0, 1, 1]
        and data.classnames == ["a", "b dog"]
    )
    assert read_class_folders(tmp_path, classnames={"a": "ape", "b_dog": "dog"}).classnames == ["ape", "dog"]
    refused("class b_dog has no name in classnames", read_class_folders, tmp_path, classnames={"a": "ape"})
    refused("2 classes but 1 class names", read_class_folders, tmp_path, classnames=["ape"])
    (tmp_path/"c").mkdir()
    refused("c: no picture in this class folder", read_class_folders, tmp_path)
    refused("the folder is not there", read_class_folders, tmp_path/"gone")

def test_imagenet_folders_get_readable_names_or_none(tmp_path):
    wnids = list(_imagenet())
    assert len(wnids) == 1000 and wnids == sorted(wnids)
    for w in wnids:
        (tmp_path/"full"/w).mkdir(parents=True)
        (tmp_path/"full"/w/"x.JPEG").write_bytes(b"")
    names = read_class_folders(tmp_path/"full").classnames
    assert len(names) == 1000 and names[0] == "tench" and names[wnids.index("n07753592")] == names[954] == "banana"
    odd = tmp_path/"full"/"misc"
    odd.mkdir()
    (odd/"x.JPEG").write_bytes(b"")       # it would shift all labels
    refused("misc is no class of ImageNet-1K", read_class_folders, tmp_path/"full")
    odd.rename(tmp_path/"full"/"n99999999")
    refused("n99999999 is no class of ImageNet-1K", read_class_folders, tmp_path/"full")
    (tmp_path/"part"/"n01440764").mkdir(parents=True)
    (tmp_path/"part"/"n01440764"/"x.JPEG").write_bytes(b"")
    refused("n01443537 is missing; only all 1000 classes", read_class_folders, tmp_path/"part")
    assert read_class_folders(tmp_path/"part", classnames={"n01440764": "tench"}).classnames == ["tench"]

def test_csv_labels(folder):
    (folder/"labels.csv").write_text("image,label\n0.jpg,1\n1.jpg,0\n")
    refused("classes are numbers without names", read_csv_labels, folder/"labels.csv")
    (folder/"classnames.txt").write_text("cat\ndog\n")
    data = open_data(str(folder/"labels.csv"))
    assert isinstance(data, LabelledImages) and data.classnames == ["cat", "dog"] and list(data.labels) == [1, 0]
    for text, message in {
        "": "the file is empty", "image,label\n": "there is a header but no row",
        "image,label\n0.jpg,-1\n1.jpg,0\n": "labels run from -1",
        "image,label\n0.jpg,cat\n1.jpg,\n": "labels.csv, line 3: the label is empty",
        "image,label\n0.jpg,2\n": "labels run from 2 to 2",
    }.items():
        (folder/"labels.csv").write_text(text)
        refused(message, read_csv_labels, folder/"labels.csv")

def toy_torchvision(root):
    "Three pictures per split in the layouts that torchvision expects."
    for name in (
        "dtd/dtd/images/dotted/a.jpg", "dtd/dtd/images/knitted/b.jpg", "food-101/images/apple_pie/1.jpg",
        "food-101/images/sushi/2.jpg", "oxford-iiit-pet/images/Abyssinian_1.jpg",
        "oxford-iiit-pet/images/great_pyrenees_7.jpg",
    ):
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        (root/name).write_bytes(encoded(format="JPEG"))
    (root/"dtd/dtd/labels").mkdir()
    (root/"dtd/dtd/labels/test1.txt").write_text("dotted/a.jpg\nknitted/b.jpg\n")
    (root/"food-101/meta").mkdir()
    (root/"food-101/meta/test.json").write_text('{"apple_pie": ["apple_pie/1"], "sushi": ["sushi/2"]}')
    (root/"oxford-iiit-pet/annotations").mkdir()
    (root/"oxford-iiit-pet/annotations/test.txt").write_text("Abyssinian_1 1 1 1\ngreat_pyrenees_7 2 2 1\n")
    for c, n in dict(BACKGROUND_Google=2, Leopards=32, brain=31).items():
        for i in range(1, n + 1):
            p = root/f"caltech101/101_ObjectCategories/{c}/image_{i:04d}.jpg"
            p.parent.mkdir(parents=True, exist_ok=True)
            p.write_bytes(encoded(i, format="JPEG"))

@pytest.mark.parametrize("dataset, names", [("DTD", ["dotted", "knitted"]), ("Food101", ["apple pie", "sushi"]), ("OxfordIIITPet", ["Abyssinian", "Great Pyrenees"])])
def test_torchvision_sets(tmp_path, dataset, names):
    toy_torchvision(tmp_path)
    data = read_torchvision(dataset, tmp_path, "test")
    assert data.classnames == names and list(data.labels) == [0, 1] and data.image_array(size=8).shape == (2, 8, 8, 3)
    refused(f"{dataset} has no split dev", read_torchvision, dataset, tmp_path, "dev")
    refused(
        f"mcl_repro data fetch {'pets' if 'Pet' in dataset else dataset.lower()}", read_torchvision, dataset,
        tmp_path / "empty", "test",
    )

def test_caltech_split_is_disjoint_complete_and_stable(tmp_path):
    toy_torchvision(tmp_path)
    parts = {s: read_torchvision("Caltech101", tmp_path, s) for s in ("train", "test", "all")}
    assert [len(parts[s]) for s in ("train", "test", "all")] == [60, 3, 63] and parts["all"].classnames == [
        "Leopards",
        "brain",
    ]
    assert set(parts["train"].ids).isdisjoint(parts["test"].ids) and parts["train"].image_array([0], 8).shape == (
        1, 8, 8, 3,
    )

def test_cifar_through_torchvision(tmp_path, monkeypatch):
    datasets = _import_torchvision_datasets()
    base = tmp_path/"cifar-10-batches-py"
    base.mkdir()
    def put(name, content):
        (base/name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((base/name).read_bytes()).hexdigest()]
    pixels = np.arange(4*3072, dtype=np.int64).reshape(4, 3072).astype(np.uint8)
    test = put("test_batch", {"data": pixels, "labels": [0, 1, 1, 0]})
    meta = put("batches.meta", {"label_names": ["cat", "dog"]})
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [test])
    monkeypatch.setattr(datasets.CIFAR10, "meta", dict(filename=meta[0], key="label_names", md5=meta[1]))
    data = read_torchvision("CIFAR10", tmp_path, "test")
    assert (
        data.image_array([2], 32)[0] == pixels[2].reshape(3, 32, 32).transpose(1, 2, 0)
    ).all() and data.classnames == ["cat", "dog"]
    (base/"test_batch").write_bytes(b"not the original") # torchvision compares the MD5 before it unpickles anything
    refused("CIFAR10 is not complete", read_torchvision, "CIFAR10", tmp_path, "test")


# ---- sources

def test_world_sources_have_the_prefix_property_and_a_cheap_fingerprint():
    few, many = open_data("world:train:3"), open_data("world:train:8")
    assert (
        few.ids == many.ids[:3]
        and few.captions == many.captions[:3]
        and (few.image_array(size=32) == many.image_array([0, 1, 2], 32)).all()
    )
    ref = resolve("world:train:3")
    assert ref.fingerprint == few.fingerprint != many.fingerprint and open_data(ref).ids == few.ids
    assert DataRef(**json.loads(json.dumps(ref.__dict__))) == ref
    assert open_data("world:train:3:0").fingerprint == few.fingerprint
    assert open_data("world:train:3:1").captions != few.captions, "another seed is another draw"

def test_every_split_of_the_world_opens_and_draws():
    from mcl_repro.data.world import SPLITS
    for name, split in SPLITS.items():
        data = open_data(f"world:{name}:3")
        assert isinstance(data, LabelledImages) == (split.kind == "labelled") and data.image_array(
            [0, 1], 32
        ).shape == (2, 32, 32, 3)
        if split.kind == "retrieval":
            assert len(data) == 3*split.captions_per_image and list(data.image_rows) == sorted(data.image_rows)

@pytest.mark.parametrize("source, message", [
    ("nonsense", "unknown data source nonsense"), ("world", "named with its split"), ("world:trane", "no split trane; it has pretrain"),
    ("world:train:ten", "ten is not a number of images"), ("world:train:0", "0 is not a number"), ("world:train:-3", "is not a number"), ("world:train:3:x", "x is not a seed"), ("wrold:train", "did you mean world"),
    ("flickr8k:train", "flickr8k is not on this machine"), ("flickr8k:dev", "it has train, validation, test"), ("openai_clip:all", "not a set of pictures"),
    ("cc3m:train", "fetch the pictures with img2dataset"), ("a:b:c:d", "unknown data source"), ("no/such.csv", "there is no such file"), ("some.csv", "there is no such file"), ("x::3", "unknown data source")])
def test_unknown_sources_say_what_there_is(source, message):
    refused(message, open_data, source)

def test_paths_become_absolute_and_changes_are_noticed(folder, monkeypatch):
    (folder/"p.csv").write_text("image,caption\n0.jpg,a\n0.jpg,b\n1.jpg,c\n")
    monkeypatch.chdir(folder)
    ref, first = resolve("p.csv"), resolve("p.csv:1")
    assert ref.source == str(folder/"p.csv") and len(open_data(first)) == 2 and first.fingerprint != ref.fingerprint
    monkeypatch.chdir("/")
    assert len(open_data(ref)) == 3
    (folder/"1.jpg").write_bytes(encoded(50, format="JPEG") + b"longer")
    refused("has changed since it was recorded", open_data, ref)
    refused("has only 2 images, not 9", open_data, f"{ref.source}:9")
    assert isinstance(resolve("world:train:2"), DataRef) and issubclass(DataError, UserError)


# ---- registry, manifest

def test_add_finds_the_formats(folder, tmp_path):
    flickr_files(folder)
    (folder/"images").mkdir()
    for i in range(5):
        (folder/f"{i}.jpg").rename(folder/"images"/f"{i}.jpg")
    assert add_dataset("flickr8k", folder)["found"] == dict(
        train=dict(images=2, pairs=10), validation=dict(images=1, pairs=5), test=dict(images=1, pairs=5)
    )
    assert open_data("flickr8k:train").images.names == ["3.jpg", "1.jpg"]
    assert set(add_dataset("mine", folder)["splits"]) == {"train", "dev", "test"} and len(open_data("mine:dev")) == 5
    shards = tmp_path/"shards"
    shards.mkdir()
    for s in range(2):
        shard(shards/f"cc-train-{s:03d}.tar", sample(f"k{s}", s, "x"))
    assert add_dataset("web", shards)["splits"] == {"cc-train": dict(images=2, pairs=2)}
    odd = tmp_path/"a [1] {2}"
    shards.rename(odd)
    assert (
        add_dataset("web", odd)["splits"] == {"cc-train": dict(images=2, pairs=2)}
        and len(read_webdataset_pairs(odd)) == 2
    )
    toy = tmp_path/"toy"
    for p in ("train/cat/0.png", "train/dog/1.png", "test/cat/2.png", "test/dog/3.png"):
        (toy/p).parent.mkdir(parents=True, exist_ok=True)
        (toy/p).write_bytes(encoded())
    assert add_dataset("toy", toy)["splits"] == dict(test=dict(images=2, classes=2), train=dict(images=2, classes=2))
    # class folders serve where the archive would
    assert add_dataset("cifar10", toy)["found"]["train"] == dict(images=2, classes=2)
    named = tmp_path/"named"
    named.mkdir()
    (named/"n01440764_tench.JPEG").write_bytes(encoded())
    (named/"n01443537_goldfish.JPEG").write_bytes(encoded())
    add_dataset("sample", named)
    assert open_data("sample:all").classnames == ["tench", "goldfish"]
    (tmp_path/"x.tsv").write_text("c\tp\nhello\tnamed/n01440764_tench.JPEG\n")
    add_dataset("odd", tmp_path, format="csv", options=dict(path="x.tsv", image="p", caption="c"), split="train")
    assert open_data("odd:train").captions == ["hello"]

def test_add_refuses_what_does_not_fit(folder, tmp_path):
    refused("choose another", add_dataset, "My Set", folder)
    refused("world is the embedded data set", add_dataset, "world", folder)
    refused("the folder is not there", add_dataset, "x", tmp_path/"gone")
    refused("no layout that is known", add_dataset, "x", folder)
    refused("unknown format xml; there are csv", add_dataset, "x", folder, format="xml")
    refused(
        "the csv reader has no option captoin; it has path, image, caption", add_dataset, "x", folder, format="csv",
        options=dict(path="0.jpg", captoin="c"),
    )
    refused("does not look like coco: there is no annotations/captions_train2014.json", add_dataset, "coco", folder)
    refused("lies outside the data folder", add_dataset, "x", folder, format="csv", options=dict(path="../x.csv"))
    refused("the csv reader needs the option path", add_dataset, "x", folder, format="csv")
    for text in ("[1]", '{"images": [3]}', '{"images": {"a": 1}}', "{}"):         # somebody else's JSON
        (folder/"dataset_infos.json").write_text(text)
        refused("no layout that is known", add_dataset, "x", folder)
        refused("lists no picture", open_data, str(folder/"dataset_infos.json"))
    assert read_registry() == {}, "nothing is recorded for a folder that was refused"

def test_registry_that_cannot_be_used_is_named(home, folder, monkeypatch):
    home.mkdir()
    (home/"registry.yaml").write_text("- a list\n")
    refused("registry.yaml: not a registry", read_registry)
    (home/"registry.yaml").write_text("a: [unclosed\n")
    refused("registry.yaml: not readable as YAML", read_registry)
    monkeypatch.setenv("MCL_REPRO_DATA", str(folder/"0.jpg"))
    refused("set MCL_REPRO_DATA to a folder you may write to", record_dataset, "x", root="y")

def _record_many(home, k):
    os.environ["MCL_REPRO_DATA"] = str(home)
    for i in range(10):
        record_dataset(f"set{k}-{i}", root="r")

def test_two_processes_do_not_lose_each_others_entries(home):
    processes = [multiprocessing.get_context("spawn").Process(target=_record_many, args=(home, k)) for k in range(2)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(60)
    assert len(read_registry()) == 20

def test_manifest_is_complete_and_consistent():
    manifest = read_manifest()
    assert set(manifest) >= {
        "world", "cc3m", "imagenet", "cifar10", "cifar100", "caltech101", "dtd", "pets", "food101", "flickr8k",
        "flickr30k", "coco", "pubfig", "openai_clip",
    }
    for name, e in manifest.items():
        assert {"title", "kind", "role", "source", "licence", "tables"} <= set(e), name
        assert e["kind"] in ("embedded", "pairs", "labelled", "weights", "resource"), name
        assert e["kind"] == "embedded" or e.get("files") or e.get("obtain"), f"{name} does not say how to obtain it"
        splits = {s for l in e.get("layouts", []) for s in l["splits"]}
        assert splits == set(e.get("splits", {})), name
        for l in e.get("layouts", []):
            for s in l["splits"]:
                reader_options(Path("/nonexistent"), l, s) # every option is one of its reader's
        for f in e.get("files", []):
            assert {"url", "save"} <= set(f) and ("md5" in f or "sha256" in f), name

def test_manifest_names_only_tables_that_exist():
    path = Path(d.__file__).parent/"papers"/"tables.yaml"
    if not path.exists():
        pytest.skip("mcl_repro/papers/tables.yaml is not there")
    ids = {t["id"] for t in yaml.safe_load(path.read_text("utf-8"))["tables"]}
    used = {t for e in read_manifest().values() for t in e["tables"]}
    assert used == ids, used ^ ids

def test_manifest_is_found_inside_an_installed_package(tmp_path, monkeypatch):
    import mcl_repro
    package = tmp_path/"site-packages"/"mcl_repro"
    package.mkdir(parents=True)
    monkeypatch.setattr(mcl_repro, "__file__", str(package/"__init__.py"))
    refused("data_manifest.yaml was not installed", read_manifest)
    (package/"data_manifest.yaml").write_text("datasets: {x: {title: t}}\n")
    assert read_manifest() == {"x": {"title": "t"}}


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
    assert (
        report["fetched"] == ["toy.zip"]
        and Server.log[0] == 0
        and 0 < Server.log[1] <= 100_000 < Server.log[2] <= 150_000
    )
    assert (
        open_data("toy:train").captions == ["a"]
        and not list((home / "downloads").rglob("*.zip"))
        and not list((home / "downloads").rglob("*.part"))
    )
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
    assert not (home / "toy").exists() and not [
        p for p in (home / "downloads").rglob("*") if p.is_file() and p.suffix != ".lock"
    ]

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
    ([("../evil", F, "")], "../evil"), ([("a/../../evil", F, "")], "a/../../evil"), ([("/evil", F, "")], "/evil"), ([("..\\evil", F, "")], "..\\evil"), ([("C:\\evil", F, "")], "C:\\evil"),
    ([("door", S, "/etc")], "door"), ([("door", S, "../.."), ("door/evil", F, "")], "door"), ([("door", H, "../../evil")], "door"), ([("pipe", tarfile.FIFOTYPE, "")], "pipe"), ([("dev", tarfile.CHRTYPE, "")], "dev")])
def test_tar_members_that_escape_are_refused(tmp_path, members, named):
    (tmp_path/"a.tar").write_bytes(tar_with(("good.txt", F, ""), *members))
    refused(f"a.tar: member {named} would be written outside", extract, tmp_path/"a.tar", tmp_path/"in"/"side")
    assert (
        list((tmp_path / "in" / "side").iterdir()) == []
        and sorted(os.listdir(tmp_path / "in")) == ["side"]
        and not (tmp_path / "evil").exists()
    )

@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "..\\evil", "C:/evil"])
def test_zip_members_that_escape_are_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path/"a.zip", "w") as z:
        z.writestr("good", "x")
        z.writestr(name, "x")
    refused(f"a.zip: member {name} would be written outside", extract, tmp_path/"a.zip", tmp_path/"in"/"side")
    assert list((tmp_path/"in"/"side").iterdir()) == [] and not (tmp_path/"evil").exists()

def test_good_archives_join_what_is_there_and_broken_ones_leave_nothing(tmp_path):
    (tmp_path/"a.tar").write_bytes(tar_with(("x/1", F, ""), ("x/link", S, "1")))
    (tmp_path/"b.tar").write_bytes(tar_with(("x/2", F, "")))
    extract(tmp_path/"a.tar", tmp_path/"out")
    extract(tmp_path/"b.tar", tmp_path/"out")
    assert sorted(os.listdir(tmp_path/"out"/"x")) == ["1", "2", "link"]
    for name, content in {"c.tar.gz": b"\x1f\x8b broken", "d.zip": toy_archive()[:-30], "e.tar": b"hello"}.items():
        (tmp_path/name).write_bytes(content)
        refused(f"{name}: not a whole archive", extract, tmp_path/name, tmp_path/"none")
    assert list((tmp_path/"none").iterdir()) == []


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
    assert [c["check"] for c in bad] == ["picture", "unreadable pictures"] and "3.jpg: the file is cut off" in bad[0][
        "found"
    ]
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
    assert (
        rows["world"]["status"] == "embedded"
        and rows["coco"]["status"] == "not here"
        and "ubt.table6" in rows["dtd"]["tables"]
        and "train" in rows["world"]["splits"]
    )
    shown = show_dataset("flickr30k")
    assert (
        shown["status"] == "not here"
        and "data fetch flickr30k" in shown["get"]
        and "form at the source" in shown["get"]
    )
    (folder/"train.csv").write_text("image,caption\n0.jpg,[bold]x[/nope]\n")
    add_dataset("mine", folder)
    assert show_dataset("mine")["status"] == "registered" and "get" not in show_dataset("mine")
    folder.rename(folder.parent/"moved")
    assert show_dataset("mine")["status"] == "folder is gone"

def test_the_world_verifies():
    checks = verify_dataset("world", ["train", "zeroshot_test"])
    assert len(checks) == 2 and all(c["ok"] and len(c["found"]) == 64 for c in checks)


# ---- the real packs

REAL = Path(os.environ.get("MCL_REPRO_REAL_DATA") or "/nonexistent")
real = pytest.mark.skipif(not REAL.is_dir(), reason="set MCL_REPRO_REAL_DATA to the folder with the real data packs")

@real
def test_real_flickr8k():
    add_dataset("flickr8k", REAL/"flickr8k")
    splits = {s: open_data(f"flickr8k:{s}") for s in ("train", "validation", "test")}
    assert [len(s.images) for s in splits.values()] == [6000, 1000, 1000] and len(
        os.listdir(REAL / "flickr8k" / "images")
    ) == 8091
    for s in splits.values():
        assert (np.bincount(s.image_rows) == 5).all() and s.image_array([0, 1, 5], 64).shape == (3, 64, 64, 3)
    names = [n for s in splits.values() for n in s.images.names]
    assert len(set(names)) == 8000 and "2258277193_586949ec62.jpg.1" not in names
    refused(
        "image 2258277193_586949ec62.jpg.1 is not in", read_flickr_pairs, REAL / "flickr8k" / "Flickr8k.token.txt",
        REAL / "flickr8k" / "images",
    )
    for split, theirs in dict(train="train", validation="val", test="test").items():
        karpathy = read_karpathy_pairs(REAL/"flickr8k"/"dataset_flickr8k.json", REAL/"flickr8k"/"images", theirs)
        assert set(karpathy.images.names) == set(splits[split].images.names) and len(karpathy) == len(splits[split])
        assert {(i.split("#")[0], c) for i, c in zip(karpathy.ids, karpathy.captions)} == {
            (i.split("#")[0], c.strip()) for i, c in zip(splits[split].ids, splits[split].captions)
        }
    assert {c["check"]: c["ok"] for c in verify_dataset("flickr8k", ["test"])} == {
        "images": True, "pairs": True, "unreadable pictures": True, "content sha256": True,
    }

@real
def test_real_coco_mini():
    assert add_dataset("coco_mini", REAL / "coco_mini")["splits"] == dict(
        train2017=dict(images=80, pairs=400), val2017=dict(images=79, pairs=395)
    )
    pairs = open_data(str(REAL/"coco_mini"/"annotations"/"captions_val2017.json"))
    assert (
        len(pairs) == 395
        and pairs.fingerprint == open_data("coco_mini:val2017").fingerprint
        and check_images(pairs.images)[1] == []
    )

@real
def test_real_cifar10():
    assert add_dataset("cifar10", REAL / "cifar10")["found"] == dict(
        train=dict(images=5000, classes=10), test=dict(images=1000, classes=10)
    )
    test = open_data("cifar10:test")
    assert test.classnames == "airplane automobile bird cat deer dog frog horse ship truck".split() and set(
        np.bincount(test.labels)
    ) <= set(range(80, 120))
    assert (test.image_array([5], 32)[0] == np.asarray(test.images[5])).all(), (
        "a picture of the right size passes unchanged"
    )
    assert [c for c in verify_dataset("cifar10", ["test"]) if not c["ok"]] == [
        dict(split="test", check="images", expected=10000, found=1000, ok=False)
    ]

@real
def test_real_cc3m_captions_without_pictures():
    path = REAL/"cc3m_val_tsv"/"Validation_GCC-1.1.0-Validation.tsv"
    refused("line 1: the image is a web address", read_csv_pairs, path, image=1, caption=0, header=False)
    refused("there is no column caption; it has author : a life in photography", read_csv_pairs, path)
    _, rows = read_table(path, header=False)
    assert len(rows) > 15_000 and all(len(f) == 2 and f[0].strip() for _, f in rows)

@real
def test_real_imagenet_sample():
    add_dataset("imagenet_sample", REAL/"imagenet1k_sample")
    sample = open_data("imagenet_sample:all")
    assert (
        len(sample) == 1000
        and sample.classnames[0] == "tench"
        and sample.classnames[954] == "banana"
        and (sample.labels == np.arange(1000)).all()
    )
    # the names in the files against open_clip's, which are edited
    words = [set(i[10:-5].lower().replace("'", "").split("_")) for i in sample.ids]
    assert (
        np.mean(
            [
                bool(w & set(c.lower().replace("'", "").replace("-", " ").split()))
                for w, c in zip(words, sample.classnames)
            ]
        )
        > 0.7
    )
