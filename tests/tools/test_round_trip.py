"""What the tools write their readers read back: the same ids, captions and pictures, whatever stands in a text, and on
every Python that this library knows.
"""
import csv, io, string

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, HealthCheck, settings, strategies as st

from colour_clip import colour_clip, squares
from data_files import refused
from mcl_repro.attacks.protection import PAIR_FORMATS, read_published, write_published
from mcl_repro.cli.tools import _ids
from mcl_repro.core.files import csv_text
from mcl_repro.data.pairs import ArrayImages, Pairs
from mcl_repro.data.readers import check_text, read_coco_pairs, read_csv_pairs, read_flickr_pairs, write_csv_pairs
from mcl_repro.data.registry import open_data
from mcl_repro.data.tars import read_webdataset_pairs
from mcl_repro.tools import measuring
from mcl_repro.tools.scanning import scan

READ = dict(
    csv=lambda folder: read_csv_pairs(folder/"pairs.csv"),
    flickr=lambda folder: read_flickr_pairs(folder/"captions.token", folder/"images"),
    coco=lambda folder: read_coco_pairs(folder/"captions_protected.json", folder/"images"),
    webdataset=read_webdataset_pairs,
)
LINES = ["a\rb", "a\nb", "a\r\nb", "a\n\rb", "\ra", "\na", "a\r", "a\n", "a\r\n", "a\r\n\r\n"]     # no others
ODD = [
    '"', '""', '"a"', 'say "hi"', '"a, b', "a,b", "a;b", "a|b", "a\tb", "\ta", "a\t", "'a'", " a", "a ", "  a  ",
    "$1, $x$", "\\n \\ \\\"", "=1+1", "+1", "-1", "@a", "#a", "# comment", "id", "id,image,caption", "image#0\ta",
    "nan", "NaN", "None", "null", "NA", "0", "1.0", "1e3", "true", "{}", "[1]", '{"text": "b"}', "<b>a</b> &amp;",
    "\ufeffa", "a\ufeff", "\ufeff\ufeffa", "\x00", "a\x00b", "\x01\x02\x7f", "a\x0bb", "a\x0cb", "a\x1cb", "a\x1eb",
    "a\x85b", "\u2028a", "a\u2028b", "a\u2029", "\xa0a\xa0", "\u200b", "\u202ea", "\ufffe", "\uffff", "\ufffd",
    "é", "e\u0301", "日本語", "👩‍🚀", "🇩🇪", "\U0010ffff", "a"*200_000, "a,\""*500, "%s {0}", "../../etc/passwd",
]
IDS = [
    "a", "A", "a#0", "a,b", '"', '"a"', "a\rb", "a\nb", "a\r\nb", "a\tb", " a", "a ", "../../a", "/etc/passwd", "a/b",
    "C:\\a", "=1+1", "nan", "None", "", "0", "00", "0.0", "é", "e\u0301", "猫", "\ufeffa", "a\u2028b", "\x00", "x"*300,
    "images/000000.png", "000000", "000001.png#0", "#", ";", "|", "$x$", "%", "{0..3}", "*",
]

def made(captions, ids=None):
    "Pairs of these captions, which share five pictures."
    pixels = np.random.default_rng(3).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    ids = [f"p{k}" for k in range(len(captions))] if ids is None else ids
    return Pairs(ids, captions, ArrayImages(pixels), np.arange(len(captions)) % 5, None, "odd")

def same(one, other):
    assert one.captions == other.captions
    assert (one.image_array(size=8) == other.image_array(size=8)).all()

def fits(captions, format):
    "Captions that a format can hold: in a Flickr file a caption is a line."
    return [c for c in captions if format != "flickr" or not set(c) & {"\n", "\r"}]

@pytest.mark.parametrize("format", PAIR_FORMATS)
def test_odd_captions_and_ids_come_back(tmp_path, format):
    captions = fits([*LINES, *ODD], format)
    for k, ids in enumerate((None, [*IDS, *(f"p{k}" for k in range(len(captions) - len(IDS)))])):
        pairs = made(captions, ids)
        folder = write_published(pairs, tmp_path/f"{k}", format, 8)
        back = read_published(folder)
        assert back.ids == pairs.ids
        same(back, pairs)
        same(READ[format](folder), pairs)
        # names of files and keys are numbers, so an id leads nowhere
        there = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        assert all(set(name) <= set(string.ascii_lowercase + string.digits + "/._-") for name in there), there

@pytest.mark.parametrize("caption", [*LINES, *ODD])
def test_an_odd_caption_alone_comes_back(tmp_path, caption):
    for format in PAIR_FORMATS:
        if fits([caption], format):
            same(READ[format](write_published(made([caption]), tmp_path/format, format, 8)), made([caption]))

SHORT = [text for text in LINES + ODD if len(text) < 99]
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
nasty = st.text(st.sampled_from('"\',;|\t\r\n \\#=\ufeff\u2028\x85\x00\x0b\x0cab0{}[]'), min_size=1, max_size=8)
some_captions = st.lists((texts | nasty | st.sampled_from(SHORT)).filter(str.strip), min_size=1, max_size=7)
some_ids = st.lists(texts | nasty | st.sampled_from(IDS), min_size=7, max_size=7, unique=True)
often = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

@pytest.mark.parametrize("format", PAIR_FORMATS)
@often
@given(captions=some_captions, ids=some_ids)
def test_any_text_comes_back(format, captions, ids, tmp_path_factory):
    captions = fits(captions, format) or ["a"]
    pairs = made(captions, ids[:len(captions)])
    folder = write_published(pairs, tmp_path_factory.mktemp("out")/"x", format, 8)
    back = read_published(folder)
    assert back.ids == pairs.ids
    same(back, pairs)
    same(READ[format](folder), pairs)

@often
@given(captions=some_captions, ids=some_ids, labelled=st.booleans())
def test_any_csv_of_ours_is_read_exactly(captions, ids, labelled, tmp_path_factory):
    pairs = made(captions, ids[:len(captions)])
    pairs = pairs.replace(labels=np.arange(len(captions))) if labelled else pairs
    path = write_csv_pairs(pairs, tmp_path_factory.mktemp("out"))
    for back in (read_csv_pairs(path), open_data(str(path)), open_data(str(path.parent))):
        assert back.ids == pairs.ids and list(back.image_rows) == list(pairs.image_rows)
        assert (back.labels is None) != labelled
        same(back, pairs)

@often
@given(captions=some_captions, ids=some_ids)
def test_any_table_of_ours_tells_its_ids(captions, ids, tmp_path_factory):
    ids, path = ids[:len(captions)], tmp_path_factory.mktemp("out")/"truth.csv"
    table = pd.DataFrame(dict(id=ids, verdict="clean", score=np.nan, copies=1, flag=True, caption=captions))
    path.write_bytes(csv_text(table).encode())
    assert _ids(path) == ids
    back = pd.read_csv(io.BytesIO(path.read_bytes()), dtype=str, keep_default_na=False, na_values=[])
    assert len(back) == len(ids)

def test_a_carriage_return_is_quoted_and_nothing_else_changes(tmp_path):
    path = write_csv_pairs(made(["a cat", "a, b", "a\rb", "c"]), tmp_path)
    lines = path.read_bytes().decode().split("\n")
    assert lines == ["id,image,caption", "p0,images/000000.png,a cat", 'p1,images/000001.png,"a, b"',
                     '"p2","images/000002.png","a\rb"', "p3,images/000003.png,c", ""]
    table = pd.DataFrame(dict(id=["a"], x=[1.5], caption=['"']))
    assert csv_text(table) == table.to_csv(index=False, lineterminator="\n") == 'id,x,caption\na,1.5,""""\n'
    assert csv_text(table.assign(caption="\r")) == '"id","x","caption"\n"a","1.5","\r"\n'
    assert csv_text(pd.DataFrame(dict(id=[], problem=[]))) == "id,problem\n"

@pytest.mark.parametrize("format", PAIR_FORMATS)
def test_what_is_no_text_is_refused_before_anything_is_written(tmp_path, format):
    bad = made(["fine", "half \ud83d"]), made(["fine", "good"], ["a", "\udce9"])
    for k, (pairs, said) in enumerate(zip(bad, ("the caption of pair 'p1'", r"the id of pair '\udce9'"))):
        refused(said, check_text, pairs)
        refused(said, write_published, pairs, tmp_path/f"{k}", format, 8)
        refused(said, write_csv_pairs, pairs, tmp_path/f"{k}")
        refused("no text", measuring.attack, pairs, "badnets", "good", count=1, image_size=8, folder=tmp_path/f"{k}")
        assert not (tmp_path/f"{k}").exists()

@pytest.mark.parametrize("caption", LINES)
def test_a_flickr_file_refuses_what_it_cannot_hold_with_the_number(tmp_path, caption):
    said = "the caption of p1 has a line break, and 1 more, which a Flickr file cannot hold; publish as csv, coco or"
    refused(said, write_published, made(["a", caption, "b", caption]), tmp_path/"out", "flickr", 8)
    refused("for example with --format csv", write_published, made([caption]), tmp_path/"two", "flickr", 8)

def test_a_caption_too_long_for_a_shard_is_refused(tmp_path):
    long = made(["a", "é"*2**19 + "b"])
    refused("the caption of p1 takes more than 1,048,576 bytes", write_published, long, tmp_path/"a", "webdataset", 8)
    fitting = made(["a", "é"*2**19])
    same(read_published(write_published(fitting, tmp_path/"b", "webdataset", 8)), fitting)

def test_an_attacked_set_and_its_truth_are_read_back(tmp_path):
    captions = [*SHORT, *(f"a dog {k}" for k in range(9))]
    ids = [*IDS, *(f"p{k}" for k in range(len(captions) - len(IDS)))]
    pairs = made(captions, ids)
    done = measuring.attack(pairs, "badnets", "dog", count=len(captions)//2, image_size=8, folder=tmp_path/"out",
                            settings=dict(patch_share=.25), check=False)
    back = open_data(str(tmp_path/"out"/"pairs.csv"))
    assert back.ids == ids
    same(back, done.pairs)
    assert _ids(tmp_path/"out"/"truth"/"poisoned.csv") == [ids[row] for row in done.poisoned.rows]
    with open(tmp_path/"out"/"truth"/"poisoned.csv", encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["caption_before"] for row in read] == [captions[row] for row in done.poisoned.rows]

def test_what_a_scan_writes_can_be_its_truth(tmp_path):
    pairs = squares(300, 1)
    ids = [*IDS, *(f"p{k}" for k in range(len(pairs) - len(IDS)))]
    pairs = pairs.replace(ids=ids, captions={k: f"{pairs.captions[k]}{odd}" for k, odd in enumerate(SHORT)})
    found = scan(colour_clip(), pairs)
    found.write_csv(tmp_path/"scan.csv", step=7)
    found.write_csv(tmp_path/"some.csv", rows=np.arange(0, 300, 3))
    assert _ids(tmp_path/"scan.csv") == ids and _ids(tmp_path/"some.csv") == ids[::3]
    with open(tmp_path/"scan.csv", encoding="utf-8", newline="") as file:
        assert [row["caption"] for row in csv.DictReader(file)] == pairs.captions
