"""Readers of lists of captions, on small files in the real forms."""
import json

import numpy as np
import pytest

from data_files import flickr_files, refused
from mcl_repro.data.pairs import ArrayImages, Pairs
from mcl_repro.data.readers import (
    read_coco_pairs, read_csv_pairs, read_flickr_pairs, read_karpathy_pairs, write_csv_pairs,
)
from mcl_repro.data.registry import open_data


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
    ("image,words\n0.jpg,a\n", "there is no column caption; it has image, words", {}),
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
    assert pairs.captions == ["café", "again", "x"]
    assert pairs.ids == ["0.jpg#0", "0.jpg#1", "1.jpg#0"]
    assert list(pairs.image_rows) == [0, 0, 1]
    (folder/"b.tsv").write_text('2.jpg\tsay "hi"\n3.jpg\t"a ""quoted"" field"\n')
    assert read_csv_pairs(folder/"b.tsv", image=0, caption=1, header=False).captions == ['say "hi"', 'a "quoted" field']
    (folder/"c.txt").write_text("p;c\n2.jpg;semi, colon\n")
    assert read_csv_pairs(folder/"c.txt", image="p", caption="c", sep=";").captions == ["semi, colon"]
    (folder/"named.csv").write_text("image,caption,label\n0.jpg,a,dog\n1.jpg,b,cat\n2.jpg,c,dog\n")
    named = read_csv_pairs(folder/"named.csv")
    assert list(named.labels) == [1, 0, 1] and "numbered in the order of the alphabet" in named.remarks[0]
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

def test_flickr_by_split_list(folder):
    tokens = flickr_files(folder)
    pairs = read_flickr_pairs(tokens, folder, folder/"Flickr_8k.trainImages.txt")
    assert pairs.images.names == ["3.jpg", "1.jpg"]
    assert pairs.ids[:2] == ["3.jpg#0", "3.jpg#1"]
    assert list(pairs.image_rows) == [0] * 5 + [1] * 5
    every = read_flickr_pairs(tokens, folder)
    assert len(every) == 25 and "ghost.jpg.1 is no picture but an entry" in every.remarks[0]
    tokens.write_text(tokens.read_text() + "gone.jpg#0\tno picture\n")
    refused("line 27: image gone.jpg is not in", read_flickr_pairs, tokens, folder)

@pytest.mark.parametrize("tokens, listed, message", [
    ("0.jpg#0 a caption\n", "0.jpg\n", "line 1: expected \"<image>#<number><tab><caption>\" but there is no tab"),
    ("0.jpg\tx\n", "0.jpg\n", "but there is no #"),
    ("0.jpg#0\tx\n0.jpg#0\ty\n", "0.jpg\n", "line 2: 0.jpg#0 comes twice"),
    ("0.jpg#0\t \n", "0.jpg\n", "line 1: the caption is empty"),
    ("0.jpg#0\tx\n", "0.jpg\n1.jpg\n", "list.txt, line 2: 1.jpg has no caption"),
    ("0.jpg#0\tx\n", "0.jpg\n0.jpg\n", "list.txt, line 2: 0.jpg comes twice"),
    ("77.jpg#0\tx\n", "77.jpg\n", "list.txt, line 1: image 77.jpg is not in"),
    ("../0.jpg#0\tx\n", "../0.jpg\n", "lies outside the data folder"),
    ("0.jpg#0\tx\n", "", "list.txt: the file is empty"),
])
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
    refused("image 0.jpg: the caption is empty", read_karpathy_pairs, path, folder, "train")
    refused("has the splits restval (1 pictures), test (1 pictures), train (1", read_karpathy_pairs, path, folder)
    assert len(read_karpathy_pairs(path, folder, "all", tolerance=.1)) == 25
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
