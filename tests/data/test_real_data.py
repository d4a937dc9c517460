"""The real packs, where MCL_REPRO_REAL_DATA points to them."""
import os

import numpy as np

from data_files import REAL, real, refused
from mcl_repro.data.fetching import add_dataset, verify_dataset
from mcl_repro.data.pairs import check_images
from mcl_repro.data.readers import read_csv_pairs, read_flickr_pairs, read_karpathy_pairs, read_table
from mcl_repro.data.registry import open_data


@real
def test_real_flickr8k():
    add_dataset("flickr8k", REAL/"flickr8k")
    splits = {s: open_data(f"flickr8k:{s}") for s in ("train", "validation", "test")}
    assert [len(s.images) for s in splits.values()] == [6000, 1000, 1000]
    assert len(os.listdir(REAL / "flickr8k" / "images")) == 8091
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
    assert len(pairs) == 395
    assert pairs.fingerprint == open_data("coco_mini:val2017").fingerprint
    assert check_images(pairs.images)[1] == []

@real
def test_real_cifar10():
    assert add_dataset("cifar10", REAL / "cifar10")["found"] == dict(
        train=dict(images=5000, classes=10), test=dict(images=1000, classes=10)
    )
    test = open_data("cifar10:test")
    assert test.classnames == "airplane automobile bird cat deer dog frog horse ship truck".split()
    assert set(np.bincount(test.labels)) <= set(range(80, 120))
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
    assert len(sample) == 1000
    assert sample.classnames[0] == "tench"
    assert sample.classnames[954] == "banana"
    assert (sample.labels == np.arange(1000)).all()
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
