"""Lists of captions and labels in the dialects, places and states in which people have them."""
import gzip, json

import pytest

from data_files import encoded, refused
from mcl_repro.core.errors import DataError, SettingsError
from mcl_repro.data.fetching import add_dataset
from mcl_repro.data.finding import find_pictures, picture_folder
from mcl_repro.data.formats import open_path
from mcl_repro.data.labelled import read_csv_labels
from mcl_repro.data.readers import read_captioned_pictures, read_coco_pairs, read_csv_pairs, read_json_pairs
from mcl_repro.data.registry import open_data
from mcl_repro.data.tables import read_table, separator

TWO = ["a red ball, on grass", "a box; of wood | \"here\""]


# ---- dialects

def quoted(sep, blank=""):
    "The two captions as a well-formed list with this separator."
    rows = [("Image Path", "Caption"), *((f"{k}.jpg", text) for k, text in enumerate(TWO))]
    cell = lambda text: '"' + text.replace('"', '""') + '"' if set(text) & {sep, '"'} else text
    return "".join((sep + blank).join(cell(text) for text in row) + "\n" for row in rows)

@pytest.mark.parametrize("ending", [".csv", ".txt", ".tsv"])
@pytest.mark.parametrize("sep", [",", ";", "|", "\t"])
def test_the_separator_is_what_makes_known_names_of_the_header(folder, sep, ending):
    path = folder/f"list{ending}"
    path.write_text(quoted(sep))
    assert open_data(str(path)).captions == TWO

@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_unicode_of_excel(folder, encoding):
    text = "image;caption\r\n0.jpg;ein gr\u00fcner Ball\r\n1.jpg;\u65e5\u672c\r\n"
    (folder/"list.csv").write_bytes(text.encode(encoding))
    assert open_data(str(folder/"list.csv")).captions == ["ein gr\u00fcner Ball", "\u65e5\u672c"]

def test_a_blank_after_each_separator_belongs_to_the_dialect_and_not_to_the_values(folder):
    (folder/"list.csv").write_text(quoted(",", " "))
    assert read_csv_pairs(folder/"list.csv").captions == TWO
    (folder/"one.csv").write_text("image,caption\n 0.jpg, a ball\n")    # here only a caption that begins with a blank
    assert read_csv_pairs(folder/"one.csv").captions == [" a ball"]

@pytest.mark.parametrize("header", [
    "filepath,title", "file_name,text", "Image,Caption", "IMAGE_PATH,TEXT", "img,Sentence", "image_name,comment",
    "filename,description", "path,alt text", "image-path,raw caption",
])
def test_usual_names_of_columns(folder, header):
    (folder/"list.csv").write_text(f"{header}\n0.jpg,one\n1.jpg,two\n")
    assert open_data(str(folder/"list.csv")).captions == ["one", "two"]

def test_columns_are_chosen_by_name_or_place_and_what_is_there_is_said(folder):
    (folder/"list.csv").write_text("a,b,c\n0.jpg,one,uno\n")
    path = folder/"list.csv"
    assert read_csv_pairs(path, image="a", caption="c").captions == ["uno"]
    assert read_csv_pairs(path, image="0", caption="1").captions == ["one"]
    refused("there is no column image; it has a, b, c; choose with image= (--image-key NAME)", read_csv_pairs, path)
    refused("there is no column x; it has a, b, c; choose with caption=", read_csv_pairs, path, image="a", caption="x")

@pytest.mark.parametrize("rows, caption", [
    ('0.jpg\t"Up", he said, "down"\n1.jpg\tx\n', '"Up", he said, "down"'),      # no quoting: quotes are letters
    ('0.jpg\t"quoted"\n1.jpg\tx\n', '"quoted"'),
    ('0.jpg\t"a tab\there"\n1.jpg\tx\n', "a tab\there"),                        # quoting, since a field needs it
    ('0.jpg\t"two\nlines"\n1.jpg\tx\n', "two\nlines"),
    ('0.jpg\t"a ""word"""\n1.jpg\tx\n', 'a "word"'),
    ('0.jpg\t"one"\n1.jpg\t"two"\n', '"one"'),
    ('"0.jpg"\t"one"\n"1.jpg"\t"two"\n', "one"),                                # everything is quoted
    ('0.jpg\t5" nails\n1.jpg\tx\n', '5" nails'),
    ('0.jpg\t"open\n1.jpg\tx\n', '"open'),
])
def test_quotes_in_files_with_tabs(folder, rows, caption):
    (folder/"list.tsv").write_text("image\tcaption\n" + rows)
    assert read_csv_pairs(folder/"list.tsv").captions[0] == caption

def test_lists_without_header(folder):
    for text in ("0.jpg\tone, of two\n1.jpg\ttwo\n", "one, of two\t0.jpg\ntwo\t1.jpg\n", "0\tone, of two\n1\ttwo\n"):
        (folder/"list.txt").write_text(text)
        assert read_csv_pairs(folder/"list.txt").captions == ["one, of two", "two"], text

@pytest.mark.parametrize("typed, sign", [("|", "|"), (r"\t", "\t"), ("tab", "\t"), (" | ", "|"), ('"\\t"', "\t"),
                                         ("*", "*"), (":", ":"), ("\t", "\t"), (";", ";")])
def test_separators_as_typed(typed, sign):
    assert separator(typed) == sign

@pytest.mark.parametrize("typed", ["", "||", "ab", "a", '"', "\n", "\0"])
def test_what_cannot_be_a_separator_is_refused(typed):
    refused("is not one sign", separator, typed, kind=SettingsError)


# ---- the same in JSON, packed and in other places

def test_json_of_all_shapes(folder):
    entries = [dict(image="0.jpg", caption=TWO[0]), dict(image="1.jpg", caption=TWO[1])]
    shapes = {
        "list.json": json.dumps(entries), "data.json": json.dumps(dict(data=entries)),
        "lines.jsonl": "\n".join(json.dumps(dict(file_name=e["image"], text=e["caption"])) for e in entries),
        "dict.json": json.dumps({e["image"]: e["caption"] for e in entries}),
        "lists.json": json.dumps({e["image"]: [e["caption"]] for e in entries}),
        "blip.json": json.dumps([dict(e, caption=[e["caption"]], image_id=k) for k, e in enumerate(entries)]),
    }
    for name, text in shapes.items():
        (folder/name).write_text(text)
        assert open_data(str(folder/name)).captions == TWO, name
    (folder/"packed.csv.gz").write_bytes(gzip.compress(quoted(",").encode()))
    assert open_data(str(folder/"packed.csv.gz")).captions == TWO

def test_a_number_is_named_as_a_number_and_nothing_as_missing(folder):
    for value, told in ((7, "number 7 and not text"), (None, "the caption is missing"), ("", "the caption is empty"),
                        (True, "the truth value True"), (dict(a=1), "a dict")):
        entries = [dict(image="0.jpg", caption="one"), dict(image="1.jpg", caption=value)]
        (folder/"list.json").write_text(json.dumps(entries))
        refused(told, read_json_pairs, folder/"list.json")
        read = read_json_pairs(folder/"list.json", tolerance=.5)
        assert read.captions == ["one"] and len(read.left_out) == 1

def test_captions_that_are_only_nan_or_a_number_are_said(folder):
    (folder/"list.csv").write_text("image,caption\n0.jpg,nan\n1.jpg,None\n2.jpg,12.0\n3.jpg,a ball\n")
    read = read_csv_pairs(folder/"list.csv")
    assert len(read) == 4
    assert [remark.split(";")[0] for remark in read.remarks] == [
        "captions that are only 'nan' or alike, as programs write a missing one: 2",
        "captions that are only a number: 1, the first 12.0."]

def test_pictures_are_found_beside_the_list_under_any_name(tmp_path):
    for place in ("Images", "imgs", "flickr30k_images", "my photos", "pack/photos"):
        root = tmp_path/place.replace("/", "-")
        (root/place).mkdir(parents=True)
        for k in range(3):
            (root/place/f"{k}.jpg").write_bytes(encoded(k, format="JPEG"))
        (root/"captions.txt").write_text("image,caption\n9.jpg,gone\n0.jpg,one\n1.jpg,two\n2.jpg,three\n")
        read = read_csv_pairs(root/"captions.txt", tolerance=.25)     # the first was never downloaded
        assert read.captions == ["one", "two", "three"] and read.remarks == (f"pictures were found in {place}.",)

def test_pictures_of_another_set_next_door_are_not_taken(tmp_path):
    for name in ("ours", "theirs"):
        (tmp_path/name/"images").mkdir(parents=True)
        (tmp_path/name/"pairs.csv").write_text("image,caption\nimages/0.png,one\n")
    (tmp_path/"theirs"/"images"/"0.png").write_bytes(encoded())
    assert picture_folder(tmp_path/"ours", ["images/0.png"]) == tmp_path/"ours"
    refused("image images/0.png is not in", open_data, str(tmp_path/"ours"/"pairs.csv"))

def test_names_that_look_alike_are_found_and_ambiguous_ones_are_not(tmp_path):
    for name in ("cafe\u0301.jpg", "UP.JPG", "id7.png", "two.jpg", "two.png", "A.png", "a.png"):
        (tmp_path/name).write_bytes(b"")
    wanted = {"caf\u00e9.jpg": "cafe\u0301.jpg", "up.jpg": "UP.JPG", "id7": "id7.png", "two": None, "a.png": "a.png",
              "A.PNG": None, "gone": None, "nul\0": None}
    assert dict(zip(wanted, find_pictures(tmp_path, list(wanted)))) == wanted

def test_paths_of_other_computers_and_other_folders(folder):
    (folder/"lists").mkdir()
    here = str(folder/"3.jpg")
    (folder/"w.csv").write_text(f"image,caption\nC:\\data\\0.jpg,a\nD:/x/1.jpg,b\n/home/me/set/2.jpg,c\n{here},d\n")
    read = read_csv_pairs(folder/"w.csv")
    assert read.images.names == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"] and "3 paths are of another" in read.remarks[0]
    (folder/"lists"/"up.csv").write_text("image,caption\n../0.jpg,a\n../1.jpg,b\n")
    assert read_csv_pairs(folder/"lists"/"up.csv", root=folder).images.names == ["0.jpg", "1.jpg"]
    refused("or give the folder of the pictures as root (--root FOLDER)", read_csv_pairs, folder/"lists"/"up.csv")
    (folder.parent/"link").symlink_to(folder)
    (folder/"real.csv").write_text(f"image,caption\n{folder/'4.jpg'},a\n")
    assert read_csv_pairs(folder.parent/"link"/"real.csv").images.names == ["4.jpg"]


# ---- tolerance

def test_all_damage_of_rows_falls_under_the_tolerance_and_is_listed(folder):
    rows = ["0.jpg,fine"]*16 + ["gone.jpg,a", ",b", "1.jpg, ", "2.jpg,c,d"]
    (folder/"list.csv").write_text("image,caption\n" + "\n".join(rows) + "\n")
    read = read_csv_pairs(folder/"list.csv", tolerance=.2)
    assert len(read) == 16
    told = " / ".join(problem for _, problem in read.left_out)
    for part in ("image gone.jpg is not in", "the image path is empty", "the caption is empty", "3 fields where 2"):
        assert part in told
    refused("4 of 20 rows cannot be used, more than the tolerated 19.00%", read_csv_pairs, folder/"list.csv",
            tolerance=.19)
    refused("(--tolerance 0.2)", read_csv_pairs, folder/"list.csv")

def test_a_list_of_which_nothing_can_be_used_is_refused_whatever_is_tolerated(folder):
    (folder/"list.csv").write_text("image,caption\ngone.jpg,a\nlost.jpg,b\n")
    refused("2 of 2 rows cannot be used", read_csv_pairs, folder/"list.csv", tolerance=1)

def test_what_was_left_out_survives_counts_and_copies(folder):
    (folder/"list.csv").write_text("image,caption\ngone.jpg,a\n0.jpg,b\n1.jpg,c\n")
    read = open_data(f"{folder}/list.csv:1", tolerance=.5)
    assert len(read) == 1 and len(read.left_out) == 1
    assert read.replace(name="x").left_out == read.left_out

def test_ids_of_pictures_are_no_ids_of_pairs_but_a_real_clash_is_an_error(folder):
    (folder/"a.csv").write_text("id,image,caption\n1,0.jpg,a\n1,0.jpg,b\n2,1.jpg,c\n")
    assert read_csv_pairs(folder/"a.csv").ids == ["0.jpg#0", "0.jpg#1", "1.jpg#0"]
    (folder/"b.csv").write_text("id,image,caption\n1,0.jpg,a\n1,1.jpg,b\n")
    refused("id 1 comes twice", read_csv_pairs, folder/"b.csv")

def test_coco_with_gaps(folder):
    images = [dict(id=k, file_name=f"{k}.jpg") for k in range(4)]
    notes = [dict(id=7, image_id=0, caption="one"), dict(image_id=1, caption="two"), dict(id=9, image_id=2, caption=3)]
    (folder/"c.json").write_text(json.dumps(dict(images=images, annotations=notes)))
    refused("annotation 9: the caption is the number 3", read_coco_pairs, folder/"c.json")
    read = read_coco_pairs(folder/"c.json", tolerance=.4)
    assert read.ids == ["0.jpg#7", "1.jpg#row1"] and "1 of 4 pictures have no caption" in read.remarks[0]
    images.append(dict(id=0, file_name="other.jpg"))
    (folder/"c.json").write_text(json.dumps(dict(images=images, annotations=notes)))
    refused("the number 0 is that of two pictures, 0.jpg and other.jpg", read_coco_pairs, folder/"c.json", tolerance=1)


# ---- folders

def fill(root, *names):
    "Pictures and texts."
    for k, name in enumerate(names):
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        text = name.endswith((".txt", ".csv", ".jsonl", ".json"))
        (root/name).write_bytes(f"text {k}".encode() if text else encoded(k))
    return root

def labelled(folder, **options):
    "A folder as classes."
    return open_path(str(folder), kind="labelled", **options)

@pytest.mark.parametrize("names, message", [
    (("Images/0.png", "Images/1.png"), "Images is the only folder of pictures in it"),
    (("00000/0.png", "00001/1.png"), "its folders are only numbers"),
    (("train2014/0.png", "val2014/1.png"), "called after a place for pictures"),
    (("imgs/0.png", "masks/1.png"), "imgs is called after a place"),
    (("a/0.png", "a/0.txt", "b/1.png", "b/1.txt"), "has captions (a text beside each picture) and no classes"),
    (("notes.pdf",), "nothing in it that is known"),
])
def test_a_folder_that_is_no_class_is_no_class(tmp_path, names, message):
    refused(message, labelled, fill(tmp_path, *names))

def test_a_set_with_a_list_is_read_by_it_or_refused(tmp_path):
    root = fill(tmp_path, "images/0.png", "images/1.png", "other/2.png")
    (root/"captions.txt").write_text("image,caption\n0.png,one\n1.png,two\n")
    refused("has captions (captions.txt) and no classes", labelled, root)
    assert open_path(str(root)).captions == ["one", "two"]
    refused("images is called after a place", labelled, root, format="class_folders")

@pytest.mark.parametrize("ending", ["jfif", "JPE", "pgm", "avif", "dib", "jp2", "TIFF", "apng"])
def test_classes_have_pictures_of_all_endings_in_all_folders_below(tmp_path, ending):
    root = fill(tmp_path, f"cat/0.{ending}", "cat/inner/deep/1.png", "dog/2.png", "dog/list.pdf", "dog/Thumbs.db")
    read = open_path(str(root), kind="labelled")
    assert len(read) == 3 and list(read.labels) == [0, 0, 1]
    assert any("1 files are no pictures and were left out, by ending: .pdf (1)" in remark for remark in read.remarks)

def test_texts_beside_pictures_are_captions(tmp_path):
    root = fill(tmp_path, "00000/0.png", "00000/0.txt", "00001/1.png", "00001/1.txt", "00001/2.png")
    (root/"00000"/"0.json").write_text('{"caption": "another"}')
    read = read_captioned_pictures(root, tolerance=.4)
    assert read.captions == ["text 1", "text 3"] and read.left_out[0][0] == "00001/2.png"
    assert add_dataset("i2d", root, tolerance=.4)["splits"] == dict(all=dict(images=2, pairs=2))

def test_imagefolder_of_hugging_face(tmp_path):
    root = fill(tmp_path, "train/0.png", "test/1.png")
    for split, name in (("train", "0.png"), ("test", "1.png")):
        (root/split/"metadata.jsonl").write_text(json.dumps(dict(file_name=name, text=f"of {split}")))
    refused("has the splits test, train; choose one with split=", open_path, str(root))
    assert open_path(str(root), split="train").captions == ["of train"]
    assert open_path(str(root/"test")).captions == ["of test"]

def test_tiny_imagenet(tmp_path):
    wnids = ["n01443537", "n02124075"]
    train = [f"train/{w}/images/{w}_0.png" for w in wnids]
    root = fill(tmp_path, *train, "val/images/val_0.png", "val/images/val_1.png")
    rows = "".join(f"val_{k}.png\t{w}\t0\t0\t62\t62\n" for k, w in enumerate(wnids))
    (root/"val"/"val_annotations.txt").write_text(rows)
    (root/"words.txt").write_text("n01443537\tgoldfish, Carassius auratus\nn02124075\tEgyptian cat\n")
    for source in (root/"train", root/"val"):
        read = open_path(str(source), kind="labelled")
        assert read.classnames[0] == "goldfish" and sorted(read.labels) == [0, 1], source

def test_odd_names_of_folders_are_paths_and_no_patterns(tmp_path):
    for name in ("{a}", "[b]", "50%", "c?", "d*", "#1", "a:b", "e{0..3}", "f g", "\u65e5\u672c"):
        root = fill(tmp_path/name, "0.png")
        (root/"pairs.csv").write_text("image,caption\n0.png,one\n")
        for source in (root, root/"pairs.csv", f"{root}/pairs.csv:1"):
            assert open_data(str(source)).captions == ["one"], source
    refused("there is no such file", open_data, str(tmp_path/"gone.csv"))
    refused("'", open_data, str(tmp_path/"pairs.csv "))


# ---- labels

@pytest.mark.parametrize("labels, names", [
    ("0 1 2", ["cat", "dog", "bird"]), ("0.0 1.0 2.0", ["cat", "dog", "bird"]), ("1 2 3", ["cat", "dog", "bird"]),
    ("1.0 2.0 3.0", ["cat", "dog", "bird"]), ("00 01 02", ["cat", "dog", "bird"]),
    ("Dog DOG bird", ["dog", "dog", "bird"]),
])
def test_labels_are_whole_numbers_or_names(folder, labels, names):
    (folder/"classnames.txt").write_bytes(b" cat\r\n\r\ndog \r\nbird\r\n")
    (folder/"l.csv").write_text("Image;Label\n" + "".join(f"{k}.jpg; {x} \n" for k, x in enumerate(labels.split())))
    read = read_csv_labels(folder/"l.csv")
    assert [read.classnames[k] for k in read.labels] == names

@pytest.mark.parametrize("text", ['["cat", "dog"]', '{"0": "cat", "1": "dog"}', "0 cat\n1 dog\n", "0: cat\n1: dog\n",
                                  "1,cat\n2,dog\n", "cat\ndog"])
def test_files_of_class_names(folder, text):
    path = folder/("names.json" if text[0] in "[{" else "names.txt")
    path.write_text(text)
    (folder/"l.csv").write_text("image,label\n0.jpg,1\n1.jpg,0\n")
    assert read_csv_labels(folder/"l.csv", classnames=str(path)).classnames == ["cat", "dog"]

@pytest.mark.parametrize("labels, message", [
    ("0 nan", "line 3: the label is nan"), ("cat None", "line 3: the label is None"),
    ("0 cat", "the label 'cat' is a name where others are numbers"), ("0.5 1", "is no whole number"),
    ("Dog dog", "differ only in capitals"), ("0 1", "classes are numbers without names"),
    ("-1 0", "classes are numbers without names"),
])
def test_labels_that_would_make_wrong_classes_are_refused(folder, labels, message):
    (folder/"l.csv").write_text("image,label\n" + "".join(f"{k}.jpg,{x}\n" for k, x in enumerate(labels.split())))
    refused(message, read_csv_labels, folder/"l.csv")

def test_rows_without_label_fall_under_the_tolerance(folder):
    (folder/"l.csv").write_text("image,label\n0.jpg,cat\n1.jpg,\n2.jpg,dog\ngone.jpg,dog\n")
    read = read_csv_labels(folder/"l.csv", tolerance=.5)
    assert read.ids == ["0.jpg", "2.jpg"] and len(read.left_out) == 2 and list(read.labels) == [0, 1]

def test_read_table_counts_rows_of_another_width(folder):
    (folder/"t.csv").write_text("image,caption\n0.jpg,one\n1.jpg\n2.jpg,a,b\n")
    assert [place for place, _ in read_table(folder/"t.csv").problems] == ["line 3", "line 4"]
    with pytest.raises(DataError):
        read_csv_pairs(folder/"t.csv")
