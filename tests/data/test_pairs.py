"""Pairs, labelled images and the sources of their pictures."""
import io, pickle

import numpy as np
import pytest
from PIL import Image

from data_files import encoded, refused, shard
from mcl_repro.data.pairs import ArrayImages, ConcatImages, FileImages, OverlayImages, Pairs
from mcl_repro.data.pictures import square
from mcl_repro.data.registry import open_data
from mcl_repro.data.tars import read_webdataset_pairs


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
    assert (over.array(order, 9) == want[order]).all()
    assert (over.take(order[:8]).array(None, 9) == want[order[:8]]).all()
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
        assert again.fingerprint == pairs.fingerprint
        assert (again.image_array(size=32) == pairs.image_array(size=32)).all()

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
    assert fresh.fingerprint == before
    assert fresh.captions == pairs.captions
    assert (fresh.image_rows == pairs.image_rows).all()

def test_overlay_changes_only_the_named_pairs():
    pairs = make_pairs()
    changed = pairs.overlay([3, 0], ArrayImages(np.zeros((2, 8, 8, 3), np.uint8)))
    before, after = pairs.image_array(size=8), changed.image_array(size=8)
    assert (after[[0, 3]] == 0).all() and (after[[1, 2, 4, 5]] == before[[1, 2, 4, 5]]).all()

@pytest.mark.parametrize("change, message", [
    (dict(ids=["a"]*6), "id a comes twice"),
    (dict(captions=["x"]*5 + ["\t"]), "pair p5 (row 5) has an empty caption"),
    (dict(captions=["x"]*5), "6 ids but 5 captions"),
    (dict(image_rows=[0]*5 + [3]), "row 3 does not exist"),
    (dict(captions=["x"]*5 + [None]), "empty caption"),
])
def test_pairs_refuse_what_is_wrong(change, message):
    refused(message, make_pairs().replace, **change)
