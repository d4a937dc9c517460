"""What a name of data means: sources, the manifest, registered folders."""
import json, multiprocessing, os

import pytest

from data_files import encoded, flickr_files, refused, sample, shard
from mcl_repro.core.errors import DataError, UserError
from mcl_repro.core.files import package_yaml
from mcl_repro.data.fetching import add_dataset
from mcl_repro.data.formats import reader_options
from mcl_repro.data.pairs import LabelledImages
from mcl_repro.data.registry import DataRef, open_data, read_manifest, read_registry, record_dataset, resolve
from mcl_repro.data.tars import read_webdataset_pairs


# ---- sources

def test_world_sources_have_the_prefix_property_and_a_cheap_fingerprint():
    few, many = open_data("world:train:3"), open_data("world:train:8")
    assert few.ids == many.ids[:3]
    assert few.captions == many.captions[:3]
    assert (few.image_array(size=32) == many.image_array([0, 1, 2], 32)).all()
    ref = resolve("world:train:3")
    assert ref.fingerprint == few.fingerprint != many.fingerprint and open_data(ref).ids == few.ids
    assert DataRef(**json.loads(json.dumps(ref.__dict__))) == ref
    assert open_data("world:train:3:0").fingerprint == few.fingerprint
    assert open_data("world:train:3:1").captions != few.captions, "another seed is another draw"

def test_every_split_of_the_world_opens_and_draws():
    from mcl_repro.data.world import SPLITS
    for name, split in SPLITS.items():
        data = open_data(f"world:{name}:3")
        assert isinstance(data, LabelledImages) == (split.kind == "labelled")
        assert data.image_array([0, 1], 32).shape == (2, 32, 32, 3)
        if split.kind == "retrieval":
            assert len(data) == 3*split.captions_per_image and list(data.image_rows) == sorted(data.image_rows)

@pytest.mark.parametrize("source, message", [
    ("nonsense", "unknown data source nonsense"),
    ("world", "named with its split"),
    ("world:trane", "no split trane; it has pretrain"),
    ("world:train:ten", "ten is not a number of images"),
    ("world:train:0", "0 is not a number"),
    ("world:train:-3", "is not a number"),
    ("world:train:3:x", "x is not a seed"),
    ("wrold:train", "did you mean world"),
    ("flickr8k:train", "flickr8k is not on this machine"),
    ("flickr8k:dev", "it has train, validation, test"),
    ("openai_clip:all", "not a set of pictures"),
    ("cc3m:train", "fetch the pictures with img2dataset"),
    ("a:b:c:d", "unknown data source"),
    ("no/such.csv", "there is no such file"),
    ("some.csv", "there is no such file"),
    ("x::3", "unknown data source"),
])
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
    assert add_dataset("web", odd)["splits"] == {"cc-train": dict(images=2, pairs=2)}
    assert len(read_webdataset_pairs(odd)) == 2
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

def test_manifest_is_complete_and_consistent(tmp_path):
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
                reader_options(tmp_path/"gone", l, s) # every option is one of its reader's
        for f in e.get("files", []):
            assert {"url", "save"} <= set(f) and ("md5" in f or "sha256" in f), name

def test_manifest_names_only_tables_that_exist():
    ids = {t["id"] for t in package_yaml("report/papers/tables.yaml")["tables"]}
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
