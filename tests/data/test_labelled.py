"""Class folders, lists of labels and torchvision's data sets, on small files in the real forms."""
import hashlib, pickle

import numpy as np
import pytest

from data_files import encoded, refused
from mcl_repro.data.labelled import (
    _imagenet, _import_torchvision_datasets, read_class_folders, read_csv_labels, read_torchvision,
)
from mcl_repro.data.pairs import LabelledImages
from mcl_repro.data.registry import open_data


def test_class_folders(tmp_path):
    for name in ("b_dog/2.png", "b_dog/1.PNG", "a/x.webp", "a/notes.txt", ".cache/0.png"):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_bytes(encoded(format="WEBP" if name.endswith("webp") else "PNG"))
    data = read_class_folders(tmp_path)
    assert data.ids == ["a/x.webp", "b_dog/1.PNG", "b_dog/2.png"]
    assert list(data.labels) == [0, 1, 1]
    assert data.classnames == ["a", "b dog"]
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
    refused("n01440764 is the only folder of pictures", read_class_folders, tmp_path/"part")
    (tmp_path/"part"/"n01443537").mkdir()
    (tmp_path/"part"/"n01443537"/"x.JPEG").write_bytes(b"")
    assert read_class_folders(tmp_path/"part").classnames == ["tench", "goldfish"]
    assert read_class_folders(tmp_path/"part", classnames={"n01440764": "a", "n01443537": "b"}).classnames == ["a", "b"]

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

@pytest.mark.parametrize("dataset, names", [
    ("DTD", ["dotted", "knitted"]),
    ("Food101", ["apple pie", "sushi"]),
    ("OxfordIIITPet", ["Abyssinian", "Great Pyrenees"]),
])
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
    assert [len(parts[s]) for s in ("train", "test", "all")] == [60, 3, 63]
    assert parts["all"].classnames == ["Leopards", "brain"]
    assert set(parts["train"].ids).isdisjoint(parts["test"].ids)
    assert parts["train"].image_array([0], 8).shape == (1, 8, 8, 3)

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
    assert (data.image_array([2], 32)[0] == pixels[2].reshape(3, 32, 32).transpose(1, 2, 0)).all()
    assert data.classnames == ["cat", "dog"]
    (base/"test_batch").write_bytes(b"not the original") # torchvision compares the MD5 before it unpickles anything
    refused("CIFAR10 is not complete", read_torchvision, "CIFAR10", tmp_path, "test")
