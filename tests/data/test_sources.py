"""Data frames, lists of dictionaries, parquet and Hugging Face's data sets, as pairs and as labelled images."""
import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from data_files import encoded, refused
from mcl_repro.core.errors import SettingsError
from mcl_repro.data.pairs import LabelledImages
from mcl_repro.data.registry import open_data
from mcl_repro.data.sources import HeldImages, is_python_source, open_hub, open_python, read_parquet
from mcl_repro.tools.inputs import as_labelled, as_pairs, readable_pairs


def picture(data):
    "Pixels of an encoded picture."
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

@pytest.mark.parametrize("value", [
    encoded(3), bytearray(encoded(3)), dict(bytes=encoded(3), path=None), dict(bytes=encoded(3), path="gone.png"),
    Image.fromarray(picture(encoded(3))), picture(encoded(3)),
])
def test_a_picture_may_be_any_of_its_usual_objects(value):
    held = HeldImages([value], "frame")
    assert (np.asarray(held[0]) == picture(encoded(3))).all() and len(held.fingerprint) == 64

def test_pictures_of_deep_modes_are_shown_as_files_of_them_are():
    deep = Image.fromarray((np.arange(256, dtype=np.uint16).reshape(16, 16)*257))
    assert (np.asarray(HeldImages([deep], "frame")[0])[..., 0] == np.arange(256).reshape(16, 16)).all()
    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    assert (np.asarray(HeldImages([clear], "frame")[0]) == 255).all()

def test_a_data_frame_goes_where_pairs_go(folder):
    frame = pd.DataFrame(dict(file_name=[str(folder/f"{k}.jpg") for k in range(4)], text=["a", "b", None, "d"]),
                         index=[10, 20, 30, 40])
    refused("row 30: the caption is missing", as_pairs, frame)
    pairs = as_pairs(frame, tolerance=.25)
    assert pairs.captions == ["a", "b", "d"] and len(pairs.left_out) == 1
    assert (pairs.image_array([1], 8) == open_python(frame.dropna()).image_array([1], 8)).all()
    assert len(readable_pairs(pairs, .25).problems) == 1
    refused("more than the tolerated", readable_pairs, pairs, .1)

def test_lists_of_dictionaries_with_captions_or_classes():
    entries = [dict(image=encoded(k), caption=[f"{k} one", f"{k} two"]) for k in range(3)]
    pairs = as_pairs(entries)
    assert pairs.captions[:2] == ["0 one", "0 two"] and len(pairs) == 6
    assert (pairs.image_array([3], 8)[0] == HeldImages([encoded(1)], "x").array(size=8)[0]).all()
    both = [dict(image=encoded(k), caption="x", label=name) for k, name in enumerate(["cat", "dog"])]
    assert as_labelled(both).classnames == ["cat", "dog"] and as_pairs(both).captions == ["x", "x"]
    refused("has no classes", as_labelled, pairs)
    assert not is_python_source([]) and not is_python_source([1]) and not is_python_source(pairs)

def test_one_class_alone_is_refused():
    refused("an accuracy needs two or more", as_labelled, [dict(image=encoded(k), label="cat") for k in range(3)])

def test_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    frame = pd.DataFrame(dict(image=[dict(bytes=encoded(k), path=f"{k}.png") for k in range(3)], text=list("abc")))
    frame.to_parquet(tmp_path/"train-00000-of-00001.parquet")
    for source in (tmp_path/"train-00000-of-00001.parquet", tmp_path):
        assert open_data(str(source)).captions == ["a", "b", "c"]
    (tmp_path/"0.png").write_bytes(encoded())
    pd.DataFrame(dict(image_path=["0.png", "gone.png"], caption=["a", "b"])).to_parquet(tmp_path/"paths.parquet")
    assert read_parquet(tmp_path/"paths.parquet", tolerance=.5).captions == ["a"]
    (tmp_path/"x.parquet").write_bytes(b"PAR1")
    refused("cannot be read as parquet", open_data, str(tmp_path/"x.parquet"))

@pytest.fixture
def hub():
    "Hugging Face's library."
    return pytest.importorskip("datasets")

def test_data_sets_of_hugging_face(hub, tmp_path):
    columns = dict(image=[dict(bytes=encoded(k), path=None) for k in range(4)], label=[0, 1, 1, 0],
                   caption=[["a", "b"], ["c"], ["d"], ["e"]])
    features = hub.Features(image=hub.Image(), label=hub.ClassLabel(names=["cat", "hot dog"]),
                            caption=hub.Sequence(hub.Value("string")))
    made = hub.Dataset.from_dict(columns, features=features)
    labelled = as_labelled(made)
    assert labelled.classnames == ["cat", "hot dog"] and list(labelled.labels) == [0, 1, 1, 0]
    assert as_pairs(made).captions == ["a", "b", "c", "d", "e"]
    assert (labelled.image_array([2], 8) == HeldImages([encoded(2)], "x").array(size=8)).all()
    hub.DatasetDict(train=made, test=made.select([0, 1])).save_to_disk(tmp_path/"saved")
    refused("has the splits train, test; choose one with split=", open_data, str(tmp_path/"saved"))
    assert len(open_data(str(tmp_path/"saved"), split="test")) == 3
    assert isinstance(open_data(str(tmp_path/"saved"), split="train", kind="labelled"), LabelledImages)

def test_what_the_hub_does_not_give_is_one_line(hub, monkeypatch):
    monkeypatch.setattr(hub, "load_dataset", lambda *_: (_ for _ in ()).throw(ConnectionError("no network\nat all")))
    refused("hf:somebody/set:train cannot be had (ConnectionError: no network); check the name", open_hub,
            "hf:somebody/set:train")
    refused("is written hf:NAME:SPLIT", open_hub, "hf:")

def test_without_the_extra_its_name_is_said(monkeypatch, tmp_path):
    import builtins
    real = builtins.__import__
    def without(name, *rest, **more):
        if name in ("pyarrow", "datasets"):
            raise ImportError(name)
        return real(name, *rest, **more)
    monkeypatch.setattr(builtins, "__import__", without)
    refused("pip install 'mcl_repro[datasets]'", read_parquet, tmp_path/"x.parquet", kind=SettingsError)
    refused("pip install 'mcl_repro[datasets]'", open_hub, "hf:x:train", kind=SettingsError)
