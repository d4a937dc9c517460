"""Checkpoints as people bring them: the embeddings of the model they are from, or one line."""
import argparse, collections, datetime, io, json, os, pathlib, pickle, warnings, zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mcl_repro.core.errors import DataError, SettingsError, UserError
from mcl_repro.core.libraries import import_open_clip
from mcl_repro.model.checkpoints import read_checkpoint
from mcl_repro.model.clip import build_clip, embed_images, embed_texts, model_config, save_clip
from mcl_repro.tools.inputs import as_clip, brings_weights

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
CAPTIONS = ["a red square", "two dogs on the grass"]


@pytest.fixture(scope="module")
def clips():
    return {name: build_clip(name, seed=1) for name in ("smoke-RN", "mini-ViT")}


def state(clip):
    return {name: tensor.clone() for name, tensor in clip.model.state_dict().items()}


def alike(clip, other, tolerance=0.):
    "Whether two models give the same embeddings and have the same temperature."
    near = lambda a, b: torch.allclose(a, b, rtol=0, atol=tolerance) if tolerance else torch.equal(a, b)
    return (near(embed_images(clip, PIXELS), embed_images(other, PIXELS))
            and near(embed_texts(clip, CAPTIONS), embed_texts(other, CAPTIONS))
            and near(clip.model.logit_scale, other.model.logit_scale))


def loaded(path, name="smoke-RN", **options):
    "The model with these weights, and what was said."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        clip = build_clip(name, pretrained=str(path), seed=9, **options)
    return clip, [str(each.message) for each in said]


# ---- trainings

EXTRAS = dict(
    epoch=3, name="x", best=np.float64(.5), scores=np.arange(4.), args=argparse.Namespace(lr=1.),
    when=datetime.datetime(2024, 1, 2),
    where=pathlib.Path("a/b"), counts=collections.Counter("abca"), kinds={1, 2},
    words=collections.defaultdict(list, a=[1]),
    dtype=torch.float16, size=torch.Size([1, 2]), none=None, random=np.random.default_rng(0).bit_generator.state,
)
KEYS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "clip", "ema", "model_ema",
        "my_own_key")


@pytest.mark.parametrize("key", KEYS)
def test_a_training_under_any_key_with_anything_beside_it(clips, tmp_path, key):
    optimizer = torch.optim.AdamW(clips["smoke-RN"].model.parameters())
    torch.save({**EXTRAS, key: state(clips["smoke-RN"]), "optimizer": optimizer.state_dict()}, tmp_path/"a.pt")
    clip, said = loaded(tmp_path/"a.pt")
    assert alike(clip, clips["smoke-RN"]) and not said


@pytest.mark.parametrize("nested", [("model", "state_dict"), ("ema", "module"), ("a", "b", "c")])
def test_nested_dictionaries(clips, tmp_path, nested):
    found = collections.OrderedDict(state(clips["smoke-RN"]))
    for key in reversed(nested):
        found = {key: found, "epoch": 1}
    torch.save(found, tmp_path/"a.pt")
    assert alike(loaded(tmp_path/"a.pt")[0], clips["smoke-RN"])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "clip.", "clip_model.", "backbone.",
                                    "module._orig_mod.", "_orig_mod.module.", "model.clip_model.",
                                    "module.backbone.clip."])
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_prefixes_in_any_order(clips, tmp_path, prefix, ending):
    tensors = {prefix + name: tensor for name, tensor in state(clips["smoke-RN"]).items()}
    save = save_file if ending == "safetensors" else torch.save
    save(tensors, str(tmp_path/f"a.{ending}"))
    clip, said = loaded(tmp_path/f"a.{ending}")
    assert alike(clip, clips["smoke-RN"]) and not said


def test_wrappers_within_names(clips, tmp_path):
    tensors = {name.replace("visual.", "visual._orig_mod.").replace("transformer.", "transformer.module."): tensor
               for name, tensor in state(clips["smoke-RN"]).items()}
    torch.save(tensors, tmp_path/"a.pt")
    assert alike(loaded(tmp_path/"a.pt")[0], clips["smoke-RN"])


@pytest.mark.parametrize("first", ["ema", "model"])
def test_the_plain_model_is_taken_before_a_running_average_and_that_is_said(clips, tmp_path, first):
    sets = dict(ema=state(build_clip("smoke-RN", seed=2)), model=state(clips["smoke-RN"]))
    torch.save({key: sets[key] for key in sorted(sets, key=lambda key: key != first)}, tmp_path/"a.pt")
    clip, said = loaded(tmp_path/"a.pt")
    assert alike(clip, clips["smoke-RN"])
    assert said == [f"{tmp_path}/a.pt holds several models that fit; model is taken, not ema"]


def test_what_lies_beside_the_model_is_left_out_and_that_is_said(clips, tmp_path):
    inside = {f"clip.{name}": tensor for name, tensor in state(clips["smoke-RN"]).items()}
    head = {"head.weight": torch.zeros(2), "head.bias": torch.zeros(2)}
    torch.save(dict(state_dict=inside | head), tmp_path/"a.ckpt")
    clip, said = loaded(tmp_path/"a.ckpt")
    assert alike(clip, clips["smoke-RN"]) and "2 tensors beside the model are left out, such as head.weight" in said[0]


def test_a_restart_point_of_our_own_training(clips, tmp_path):
    from mcl_repro.model.training import Recipe, TrainingState, RowAdamW, save_checkpoint
    own, recipe = build_clip("smoke-RN", seed=1), Recipe(1, 2, 1e-3)
    save_checkpoint(TrainingState(own, RowAdamW(own.model, recipe), recipe, 1), tmp_path/"checkpoint.safetensors")
    assert alike(loaded(tmp_path/"checkpoint.safetensors")[0], clips["smoke-RN"])


@pytest.mark.parametrize("extra", ["attn_mask", "input_resolution", "context_length", "vocab_size", "logit_bias",
                                   "text.transformer.embeddings.position_ids"])
def test_constants_of_other_versions_are_left_out(clips, tmp_path, extra):
    torch.save(state(clips["mini-ViT"]) | {extra: torch.zeros(2)}, tmp_path/"a.pt")
    clip, said = loaded(tmp_path/"a.pt", "mini-ViT")
    assert alike(clip, clips["mini-ViT"]) and not said


def test_an_unknown_tensor_is_not_left_out(clips, tmp_path):
    torch.save(state(clips["mini-ViT"]) | {"visual.extra": torch.zeros(2)}, tmp_path/"a.pt")
    with pytest.raises(DataError, match=r"1 tensors differ, first 'visual.extra' \(not in the model\)"):
        loaded(tmp_path/"a.pt", "mini-ViT")


def test_a_missing_temperature_is_clips_first_one_and_that_is_said(clips, tmp_path):
    torch.save({k: v for k, v in state(clips["smoke-RN"]).items() if k != "logit_scale"}, tmp_path/"a.pt")
    clip, said = loaded(tmp_path/"a.pt")
    assert abs(float(clip.model.logit_scale.exp().detach()) - 1/.07) < 1e-4 and "has no logit_scale" in said[0]
    assert torch.equal(embed_images(clip, PIXELS), embed_images(clips["smoke-RN"], PIXELS))


@pytest.mark.parametrize("kind, tolerance", [(torch.float16, 2e-2), (torch.bfloat16, 1e-1), (torch.float64, 0.)])
@pytest.mark.parametrize("form", ["zip", "old", "safetensors", "pickle"])
def test_other_precisions_and_containers(clips, tmp_path, kind, tolerance, form):
    tensors = {k: v.to(kind) if v.is_floating_point() else v for k, v in state(clips["smoke-RN"]).items()}
    path = tmp_path/"v1.5-run"
    if form == "safetensors":
        save_file(tensors, str(path))
    elif form == "pickle":
        path.write_bytes(pickle.dumps(tensors))
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=form == "zip",
                   pickle_protocol=4 if form == "zip" else 2)
    assert alike(loaded(path)[0], clips["smoke-RN"], tolerance)


def test_arrays_of_numpy(clips, tmp_path):
    arrays = {name: tensor.numpy() for name, tensor in state(clips["smoke-RN"]).items()}
    torch.save(dict(model=arrays), tmp_path/"a.pt")
    np.savez(tmp_path/"a.npz", **arrays)
    for name in ("a.pt", "a.npz"):
        assert alike(loaded(tmp_path/name)[0], clips["smoke-RN"])


def test_a_whole_module_and_a_training_that_holds_one(clips, tmp_path):
    model = clips["mini-ViT"].model
    for number, saved in enumerate((model, dict(epoch=1, model=torch.nn.DataParallel(model)))):
        torch.save(saved, tmp_path/f"{number}.pt")
        assert alike(loaded(tmp_path/f"{number}.pt", "mini-ViT")[0], clips["mini-ViT"])


# ---- nothing is run

class Harm:
    "Unpickled by anybody else, it makes a folder."
    def __init__(self, mark):
        self.mark = mark
    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_beside_weights_is_not_run(clips, tmp_path, zipped):
    torch.save(dict(args=Harm(str(tmp_path/"ran")), model=state(clips["smoke-RN"])), tmp_path/"a.pt",
               _use_new_zipfile_serialization=zipped)
    assert alike(loaded(tmp_path/"a.pt")[0], clips["smoke-RN"]) and not (tmp_path/"ran").exists()


@pytest.mark.parametrize("body", [
    b"cbuiltins\neval\n(S'__import__(\"os\").mkdir(\"ran\")'\ntR.", b"c__main__\nx\n.", b"cos\nmkdir\n(S'ran'\ntR.",
    b"cbuiltins\ngetattr\n(cos\nsystem\nS'x'\ntRS'mkdir ran'\n\x85R.",
])
def test_pickles_that_want_to_run_something(tmp_path, monkeypatch, body):
    monkeypatch.chdir(tmp_path)
    for form in ("plain", "zip"):
        path = tmp_path/"a.pt"
        if form == "plain":
            path.write_bytes(b"\x80\x02" + body)
        else:
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("a/data.pkl", b"\x80\x02" + body)
        with pytest.raises(DataError) as error:
            read_checkpoint(path)
        assert "\n" not in str(error.value) and not (tmp_path/"ran").exists()


def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path):
    torch.save({"a": torch.zeros(4)}, tmp_path/"a.pt")
    with zipfile.ZipFile(tmp_path/"a.pt") as old:
        entries = {name: old.read(name) for name in old.namelist()}
    main = next(name for name in entries if name.endswith("data.pkl"))
    entries[main] = entries[main].replace(b"K\x04\x85", b"K\x7f\x85")   # its length, 4, as 127
    with zipfile.ZipFile(tmp_path/"a.pt", "w") as new:
        for name, content in entries.items():
            new.writestr(name, content)
    with pytest.raises(DataError, match="cut off, damaged or something else"):
        read_checkpoint(tmp_path/"a.pt")


# ---- several files

@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_shards_by_index_by_folder_and_by_one_of_them(clips, tmp_path, ending):
    tensors, stem = state(clips["smoke-RN"]), "model" if ending == "safetensors" else "pytorch_model"
    names, save = list(tensors), save_file if ending == "safetensors" else torch.save
    files = [f"{stem}-0000{n}-of-00002.{ending}" for n in (1, 2)]
    for n, file in enumerate(files):
        save({name: tensors[name] for name in names[n::2]}, str(tmp_path/file))
    index = tmp_path/f"{stem}.{ending}.index.json"
    for with_index in (False, True):
        if with_index:
            index.write_text(json.dumps(dict(weight_map={name: files[n % 2] for n, name in enumerate(names)})))
        for given in (tmp_path, tmp_path/files[0], tmp_path/files[1], index)[:4 if with_index else 3]:
            assert alike(loaded(given)[0], clips["smoke-RN"])
    (tmp_path/files[1]).unlink()
    for given in (tmp_path, tmp_path/files[0], index):
        with pytest.raises(DataError, match=f"of which {files[1]} is not beside it: download it too"):
            loaded(given)


def test_an_index_may_not_lead_elsewhere(tmp_path):
    (tmp_path/"model.safetensors.index.json").write_text(json.dumps(dict(weight_map={"a": "../../secret.safetensors"})))
    with pytest.raises(DataError, match="names files outside of its folder"):
        read_checkpoint(tmp_path)


# ---- transformers

def as_transformers(tensors):
    "The names of transformers' CLIPModel, written down apart from the library's own table."
    found = {"text_model.embeddings.position_ids": torch.arange(4)[None], "logit_scale": tensors["logit_scale"]}
    place = lambda tower: {"text": "", "vision": "visual."}[tower]
    simple = dict(text={"embeddings.token_embedding.weight": "token_embedding.weight",
                        "embeddings.position_embedding.weight": "positional_embedding"},
                  vision={"embeddings.class_embedding": "class_embedding",
                          "embeddings.patch_embedding.weight": "conv1.weight",
                          "embeddings.position_embedding.weight": "positional_embedding"})
    norms = dict(text={"final_layer_norm": "ln_final"}, vision={"pre_layrnorm": "ln_pre", "post_layernorm": "ln_post"})
    parts = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
             "self_attn.out_proj": "attn.out_proj"}
    for tower in ("text", "vision"):
        for theirs, ours in simple[tower].items():
            found[f"{tower}_model.{theirs}"] = tensors[place(tower) + ours]
        for kind in ("weight", "bias"):
            for theirs, ours in norms[tower].items():
                found[f"{tower}_model.{theirs}.{kind}"] = tensors[f"{place(tower)}{ours}.{kind}"]
            for n in range(9):
                block = f"{place(tower)}transformer.resblocks.{n}."
                if f"{block}ln_1.weight" not in tensors:
                    break
                layer = f"{tower}_model.encoder.layers.{n}."
                for theirs, ours in parts.items():
                    found[f"{layer}{theirs}.{kind}"] = tensors[f"{block}{ours}.{kind}"]
                for letter, part in zip("qkv", tensors[f"{block}attn.in_proj_{kind}"].chunk(3)):
                    found[f"{layer}self_attn.{letter}_proj.{kind}"] = part.clone()
    found["text_projection.weight"] = tensors["text_projection"].T.contiguous()
    found["visual_projection.weight"] = tensors["visual.proj"].T.contiguous()
    return {name: tensor.contiguous() for name, tensor in found.items()}


def transformers_folder(clip, folder, **changes):
    save_file(as_transformers(state(clip)), str(folder/"model.safetensors"))
    tower = dict(hidden_size=96, intermediate_size=384, hidden_act="gelu", num_attention_heads=3) | changes
    config = dict(model_type="clip", projection_dim=128,
                  text_config=dict(tower, num_hidden_layers=2, max_position_embeddings=32, vocab_size=49408),
                  vision_config=dict(tower, num_hidden_layers=3, image_size=32, patch_size=4))
    (folder/"config.json").write_text(json.dumps(config))


def test_a_model_of_transformers(clips, tmp_path):
    transformers_folder(clips["mini-ViT"], tmp_path)
    for given in (tmp_path, tmp_path/"model.safetensors"):
        clip, said = loaded(given, "mini-ViT")
        assert alike(clip, clips["mini-ViT"]) and not said
    guessed = as_clip(tmp_path)
    assert guessed.name == "mini-ViT" and alike(guessed, clips["mini-ViT"])
    with pytest.raises(DataError, match="does not fit smoke-RN"):
        loaded(tmp_path)
    (tmp_path/"config.json").unlink()
    clip, said = loaded(tmp_path, "mini-ViT")
    assert alike(clip, clips["mini-ViT"]) and "does not tell its activation" in said[0]


@pytest.mark.parametrize("changes, says", [
    (dict(hidden_act="quick_gelu"), r"differ in the activation \(QuickGELU and GELU\)"),
    (dict(num_attention_heads=6), r"differ in the image tower's heads \(6 and 3\) and the text tower's heads"),
    (dict(hidden_act="relu"), "open_clip has no CLIP with the activation relu"),
    (dict(layer_norm_eps=1e-12), "an epsilon of 1e-12"),
])
def test_tensors_that_fit_a_network_that_computes_something_else_are_refused(clips, tmp_path, changes, says):
    transformers_folder(clips["mini-ViT"], tmp_path, **changes)
    with pytest.raises(DataError, match=says):
        loaded(tmp_path, "mini-ViT")


# ---- TorchScript

class Towers(torch.nn.Module):
    "An archive as OpenAI's: half precision, and its settings as buffers."
    def __init__(self, model):
        super().__init__()
        self.visual, self.transformer = model.visual, model.transformer
        self.token_embedding, self.ln_final = model.token_embedding, model.ln_final
        self.positional_embedding, self.text_projection = model.positional_embedding, model.text_projection
        self.logit_scale = model.logit_scale
        for name in ("input_resolution", "context_length", "vocab_size"):
            self.register_buffer(name, torch.tensor(32))
    def forward(self, x):
        return self.visual(x)


def test_an_archive_of_torchscript_is_read_and_not_run(clips, tmp_path, monkeypatch):
    halves = build_clip("smoke-RN", seed=1)
    scripted = torch.jit.trace(Towers(halves.model).eval(), torch.zeros(1, 3, 32, 32), check_trace=False)
    for parameter in scripted.parameters():
        parameter.data = parameter.data.half()
    scripted.save(str(tmp_path/"a.pt"))
    monkeypatch.setattr(torch.jit, "load", lambda *given, **named: pytest.fail("it was loaded"))
    clip, said = loaded(tmp_path/"a.pt")
    rounded = build_clip("smoke-RN", seed=1)
    with torch.no_grad():
        for parameter in rounded.model.parameters():
            parameter.copy_(parameter.half().float())
    assert alike(clip, rounded) and not said


@pytest.mark.parametrize("net, says", [
    (torch.nn.Linear(2, 2), "is a TorchScript archive of something else, it does not fit smoke-RN"),
    (torch.nn.ReLU(), "but a TorchScript archive without weights"),
])
def test_an_archive_of_something_else(tmp_path, net, says):
    torch.jit.trace(net, torch.zeros(1, 2)).save(str(tmp_path/"a.pt"))
    with pytest.raises(DataError, match=says):
        loaded(tmp_path/"a.pt")


# ---- what is no checkpoint

def zipped(**entries):
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return held.getvalue()


def torched(saved, **options):
    held = io.BytesIO()
    torch.save(saved, held, **options)
    return held.getvalue()


FILES = {
    "empty": (b"", "an empty file"), "zeros": (bytes(3000), "zeros: a download that was not finished"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a pointer of Git LFS .* git lfs pull"),
    "page": (b"\n\n<!DOCTYPE html><html>", "a web page: download the file itself"),
    "xml": (b"<?xml version='1'?>", "in XML"),
    "text": (b"Entry not found", "text, 'Entry not found'"), "json": (b'{"error": "Repository not found"}', "text"),
    "gzip": (b"\x1f\x8b\x08\0", "a gzip archive: unpack it"), "hdf5": (b"\x89HDF\r\n", "an HDF5 file"),
    "gguf": (b"GGUF\3\0", "a GGUF file"), "picture": (b"\x89PNG\r\n\x1a\n", "a picture"),
    "zip": (zipped(readme="hello"), "a zip archive, with readme in it: unpack it"),
    "noise": (bytes(range(1, 200)), "something else"),
    "optimizer": (
        torched(torch.optim.SGD([torch.zeros(2)], .1).state_dict()), "holds no state dict of tensors, only state",
    ),
    "numbers": (torched(dict(epoch=3)), "holds no state dict of tensors, only epoch"),
    "list": (torched([torch.zeros(2)]), "a pickle of list"), "nothing": (torched({}), "only nothing"),
    "cut zip": (torched(dict(a=torch.zeros(999)))[:-40], "cut off or damaged: download"),
    "cut stream": (torched(dict(a=torch.zeros(999)), _use_new_zipfile_serialization=False)[:-40], "cut off, damaged"),
}


@pytest.mark.parametrize("ending", [".pt", ".safetensors", ""])
@pytest.mark.parametrize("content, says", FILES.values(), ids=FILES)
def test_what_is_no_checkpoint_is_named_in_one_line(tmp_path, content, says, ending):
    path = tmp_path/f"a{ending}"
    path.write_bytes(content)
    for use in (lambda: build_clip("smoke-RN", pretrained=str(path)), lambda: as_clip(path)):
        with pytest.raises(DataError, match=says) as error:
            use()
        assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("share", [.001, .3, .999])
def test_a_safetensors_file_that_is_cut_off(clips, tmp_path, share):
    save_clip(clips["smoke-RN"], tmp_path/"a.safetensors")
    content = (tmp_path/"a.safetensors").read_bytes()
    (tmp_path/"a.safetensors").write_bytes(content[:int(len(content) * share)])
    with pytest.raises(DataError, match="cut off"):
        loaded(tmp_path/"a.safetensors")


@pytest.mark.parametrize("half, other", [("text", "image"), ("image", "text")])
def test_half_a_model(clips, tmp_path, half, other):
    tensors = {k: v for k, v in state(clips["smoke-RN"]).items() if k.startswith("visual.") == (half == "image")}
    torch.save({f"model.{k}": v for k, v in tensors.items()}, tmp_path/"a.pt")
    with pytest.raises(DataError, match=f"holds only the {half} half of a CLIP, nothing of its {other} tower"):
        loaded(tmp_path/"a.pt")


def test_an_adapter_and_a_quantised_model(clips, tmp_path):
    adapter = {"base_model.model.text.q_proj.lora_A.weight": torch.zeros(4, 8)}
    save_file(adapter, str(tmp_path/"adapter_model.safetensors"))
    for given in (tmp_path/"adapter_model.safetensors", tmp_path):
        with pytest.raises(DataError, match=r"is a LoRA adapter, .* merge_and_unload\(\) of peft"):
            loaded(given)
    small = {k: v.char() if k.endswith("weight") else v for k, v in state(clips["smoke-RN"]).items()}
    torch.save(small, tmp_path/"small.pt")
    with pytest.raises(DataError, match="its weights were quantised"):
        loaded(tmp_path/"small.pt")


def test_folders_and_links(clips, tmp_path):
    (tmp_path/"empty").mkdir()
    with pytest.raises(DataError, match="is a folder with no checkpoint"):
        loaded(tmp_path/"empty")
    for name in ("epoch_1.pt", "epoch_2.pt"):
        torch.save(state(clips["smoke-RN"]), tmp_path/name)
    with pytest.raises(DataError, match="a folder with 2 checkpoints, epoch_1.pt, epoch_2.pt: give one file"):
        loaded(tmp_path)
    (tmp_path/"link.pt").symlink_to(tmp_path/"gone")
    with pytest.raises(DataError, match="is a link to a file that is not there"):
        loaded(tmp_path/"link.pt")


# ---- folders of open_clip, and public weights

def open_clip_folder(clip, folder, config=None):
    save_file(state(clip), str(folder/"open_clip_model.safetensors"))
    config = config or dict(model_cfg=model_config(clip.name), preprocess_cfg=dict(mean=[.5]*3, std=[.25]*3))
    (folder/"open_clip_config.json").write_text(json.dumps(config))


def test_a_folder_of_open_clip(clips, tmp_path, monkeypatch):
    open_clip_folder(clips["mini-ViT"], tmp_path)
    expected = replace(clips["mini-ViT"], mean=(.5,)*3, std=(.25,)*3)
    monkeypatch.chdir(tmp_path.parent)
    place = tmp_path.name
    for given in (f"local-dir:{tmp_path}", f"local-dir:{place}", f"local-dir:./{place}", str(tmp_path), tmp_path):
        clip = as_clip(given)
        assert (clip.name, clip.mean) == ("mini-ViT", (.5, .5, .5)) and alike(clip, expected) and brings_weights(given)
    assert not brings_weights("mini-ViT")


def test_a_folder_with_an_architecture_of_its_own(tmp_path):
    own = dict(model_config("mini-ViT"), embed_dim=48)
    model = import_open_clip().CLIP(**own)
    save_file(dict(model.state_dict()), str(tmp_path/"open_clip_model.safetensors"))
    (tmp_path/"open_clip_config.json").write_text(json.dumps(dict(model_cfg=own)))
    clip = as_clip(f"local-dir:{tmp_path}")
    assert clip.name == f"local-dir:{tmp_path}" and embed_images(clip, PIXELS).shape == (2, 48)
    assert all(torch.equal(v, clip.model.state_dict()[k]) for k, v in model.state_dict().items())
    save_clip(clip, tmp_path/"again.safetensors")
    assert alike(as_clip(f"local-dir:{tmp_path}", pretrained=str(tmp_path/"again.safetensors")), clip)
    with pytest.raises(SettingsError, match="only you may name a hub or a folder"):
        as_clip(tmp_path/"again.safetensors")


@pytest.mark.parametrize("config", ["{", "[]", "{}", '{"model_cfg": {"embed_dim": 2}}'])
def test_a_folder_whose_configuration_is_none(clips, tmp_path, config):
    open_clip_folder(clips["smoke-RN"], tmp_path)
    (tmp_path/"open_clip_config.json").write_text(config)
    with pytest.raises(DataError, match="is no configuration of open_clip"):
        as_clip(f"local-dir:{tmp_path}")


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    "An empty cache, and a network that leads nowhere."
    import requests
    (tmp_path/"hub").mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path/"hub"))
    def head(*given, **named):
        raise requests.ConnectionError("nowhere")
    monkeypatch.setattr("requests.head", head)


@pytest.mark.parametrize("model, tag, says", [
    ("ViT-B-32", "openai", "openai of ViT-B-32-quickgelu: not on this machine.*huggingface.co does not answer.*"
     "Download https://huggingface.co/timm/.* --model ViT-B-32-quickgelu --pretrained FILE"),
    ("ViT-B-32", "laion2b-s34b-b79k", "Download https://.*--model ViT-B-32 --pretrained FILE"),
    ("hf-hub:laion/nothing", None, "hf-hub:laion/nothing: not on this machine"),
    ("local-dir:nowhere", None, "nowhere is no folder"), ("local-dir:", None, "names no model"),
])
def test_without_a_network_one_line_comes_at_once(no_network, model, tag, says):
    import time
    import_open_clip()
    began = time.perf_counter()
    with pytest.raises(UserError, match=says) as error:
        as_clip(model, tag)
    assert "\n" not in str(error.value) and time.perf_counter() - began < 5


def test_offline_by_the_environment_is_said(no_network, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="cannot be downloaded, HF_HUB_OFFLINE is set"):
        build_clip("RN50", "openai")


def cached(folder, repository, name, content):
    "A file in a cache as the Hub's library keeps it."
    place = folder/f"models--{repository.replace('/', '--')}"
    (place/"refs").mkdir(parents=True)
    (place/"refs"/"main").write_text("0"*40)
    (place/"snapshots"/("0"*40)).mkdir(parents=True)
    file = place/"snapshots"/("0"*40)/name
    file.write_bytes(content)
    return file


def test_what_is_in_the_cache_is_used_without_a_network(no_network, clips, tmp_path):
    file = cached(tmp_path/"hub", "someone/tiny", "open_clip_config.json", b"")
    open_clip_folder(clips["mini-ViT"], file.parent)
    assert alike(as_clip("hf-hub:someone/tiny"), replace(clips["mini-ViT"], mean=(.5,)*3, std=(.25,)*3))


def test_a_damaged_file_in_the_cache_is_named(no_network, tmp_path):
    cached(tmp_path/"hub", "timm/resnet50_clip.openai", "open_clip_model.safetensors", b"\x08\0\0\0\0\0\0\0{")
    with pytest.raises(UserError, match="RN50-quickgelu cannot be built .*remove .*open_clip_model.safetensors and"):
        build_clip("RN50", "openai")


def test_a_model_whose_own_names_have_a_wrapper(tmp_path):
    from colour_clip import ColourClip, read_words
    from mcl_repro.model.clip import load_weights
    own, other = (as_clip(ColourClip(), tokenizer=read_words, image_size=32) for _ in range(2))
    with torch.no_grad():
        own.model.module.palette.add_(1)
    assert any(name.startswith("module.") for name in own.model.state_dict())
    save_clip(own, tmp_path/"a.safetensors")
    torch.save(dict(model={f"model.{k}": v for k, v in own.model.state_dict().items()}), tmp_path/"a.pt")
    for name in ("a.safetensors", "a.pt"):
        assert torch.equal(load_weights(other, tmp_path/name).model.module.palette, own.model.module.palette)


def test_a_half_downloaded_file_of_a_tag_without_the_hub_is_named(no_network, monkeypatch, tmp_path):
    oc = import_open_clip()
    known = dict(url="https://openaipublic.azureedge.net/clip/models/" + "a"*64 + "/RN50.pt", quick_gelu=True)
    monkeypatch.setitem(oc.pretrained._PRETRAINED["RN50-quickgelu"], "openai", known)
    monkeypatch.setattr("pathlib.Path.home", lambda: tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(DataError, match="openaipublic.azureedge.net does not answer .*Download https://openaipublic"):
        build_clip("RN50-quickgelu", "openai")
    (tmp_path/".cache"/"clip").mkdir(parents=True)
    (tmp_path/".cache"/"clip"/"RN50.pt").write_bytes(b"half")
    def urlopen(*given, **named):
        raise OSError("nowhere")
    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    with pytest.warns(UserWarning, match="SHA256"), pytest.raises(DataError, match="RN50.pt is damaged or cut off"):
        build_clip("RN50-quickgelu", "openai")
