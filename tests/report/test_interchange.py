"""Models go to open_clip and come from it: same outputs there and back,
in every format that trainers write, as the clean model and as the poisoned one."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from mcl_repro.papers.cleanclip import cleaned_clip
from mcl_repro.core.libraries import import_open_clip
from mcl_repro.model.clip import _config_folder, build_clip, embed_images, embed_texts, save_clip, to_pixels
from mcl_repro.data.registry import open_data
from mcl_repro.core.errors import DataError, SettingsError
from mcl_repro.papers.plan import Experiments
from mcl_repro.tools.inputs import as_clip
from mcl_repro.lab.lab import Lab
from mcl_repro.lab.profiles import load_profile
from mcl_repro.papers.stages import clean_clip, given_clip, load_clip, weights_checksum
from mcl_repro.core.words import parse_pairs

open_clip = import_open_clip()
MODELS = ["smoke-RN", "mini-ViT", "tiny-RN-quickgelu", "tiny-ViT-quickgelu"]
CAPTIONS = ["a photo of a banana.", "two cups on a red table"]


@pytest.fixture(scope="module", autouse=True)
def known_to_open_clip(tmp_path_factory):
    "Our small architectures as open_clip knows its own: by name, with and without QuickGELU."
    folder = tmp_path_factory.mktemp("configs")
    for name, base in (("tiny-RN", "smoke-RN"), ("tiny-ViT", "mini-ViT")):
        config = json.loads((_config_folder / f"{base}.json").read_text())
        (folder / f"{name}.json").write_text(json.dumps(config))
        (folder / f"{name}-quickgelu.json").write_text(json.dumps({**config, "quick_gelu": True}))
    open_clip.add_model_config(folder)
    open_clip.add_model_config(_config_folder)


@pytest.fixture(scope="module")
def pixels():
    return to_pixels(build_clip("smoke-RN"), open_data("world:validation:6").image_array(range(6), 32))


def outputs(model, pixels):
    "What a model says of some pictures and captions, without anything of this library."
    model.eval()
    with torch.no_grad():
        return (
            model.encode_image(pixels),
            model.encode_text(open_clip.SimpleTokenizer(context_length=32)(CAPTIONS)),
            model.logit_scale.exp(),
        )


def same(a, b, pixels):
    return all(torch.equal(x, y) for x, y in zip(outputs(a, pixels), outputs(b, pixels)))


# ---- from here to open_clip


@pytest.mark.parametrize("name", MODELS)
def test_open_clip_loads_what_save_clip_wrote_with_equal_outputs(name, tmp_path, pixels):
    ours = build_clip(name, seed=5)
    save_clip(ours, tmp_path / "clip.safetensors", seed=5)
    theirs = open_clip.create_model(name, pretrained=str(tmp_path / "clip.safetensors"))
    assert same(ours.model, theirs, pixels) and not same(ours.model, build_clip(name, seed=6).model, pixels)


# ---- from elsewhere to here


def trainers(model, folder):
    "The same weights as seven kinds of trainers store them."
    state = model.state_dict()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    model.zero_grad()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    save_file({k: v.contiguous() for k, v in state.items()}, str(folder / "plain.safetensors"))
    torch.save(state, folder / "plain.pt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, folder / "parallel.pt")
    torch.save(
        {"epoch": 3, "name": "run", "state_dict": state, "optimizer": optimizer.state_dict()}, folder / "epoch_3.pt"
    )  # open_clip_train
    torch.save(
        {
            "epoch": 3,
            "name": "run",
            "state_dict": {f"module.{k}": v for k, v in state.items()},
            "optimizer": optimizer.state_dict(),
            "scaler": {"scale": 65536.0, "growth_factor": 2.0},
        },
        folder / "epoch_latest.pt",
    )
    torch.save({f"_orig_mod.{k}": v for k, v in state.items()}, folder / "compiled.pt")
    save_file(
        {f"_orig_mod.module.{k}": v.contiguous() for k, v in state.items()},
        str(folder / "compiled_parallel.safetensors"),
    )
    return [
        folder / name
        for name in (
            "plain.safetensors",
            "plain.pt",
            "parallel.pt",
            "epoch_3.pt",
            "epoch_latest.pt",
            "compiled.pt",
            "compiled_parallel.safetensors",
        )
    ]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    "A model of open_clip's making, and its files."
    torch.manual_seed(7)
    model = open_clip.create_model("smoke-RN")
    return model, trainers(model, tmp_path_factory.mktemp("foreign"))


def a_lab(tmp_path, **settings):
    return Lab(
        "smoke",
        device="cpu",
        runs=tmp_path / "runs",
        roles=dict(
            finetune="world:train:60",
            pretrain="world:pretrain:60",
            clean_pairs="world:validation:40",
            zeroshot="world:zeroshot_test:20",
        ),
        settings=settings,
        progress=False,
    )


def planned(lab):
    return Experiments(lab, ["ubt.table1"], attacks={"BadNets": "BadNet", "Blended": "Blended"})


@pytest.mark.parametrize("kind", range(7))
def test_checkpoints_of_every_trainer_are_the_clean_or_the_poisoned_model(kind, foreign, tmp_path, pixels):
    model, files = foreign
    file = str(files[kind])
    lab = a_lab(tmp_path, **{"model.pretrained": file, "poison.checkpoints": {"BadNet": file}})
    e = planned(lab)
    clean, victim = e.clean, e.chain("BadNets").victim
    assert (clean.stage.name, victim.stage.name) == ("stages.clean_clip", "stages.given_clip") and victim.settings[
        "checksum"
    ] == weights_checksum(file)
    for artefact in lab.run([clean, victim]):
        assert same(load_clip(artefact).model, model, pixels)


def test_a_given_model_changes_nothing_but_its_own_chain(foreign, tmp_path):
    file = str(foreign[1][0])
    given, trained = planned(a_lab(tmp_path, **{"poison.checkpoints": {"BadNet": file}})), planned(a_lab(tmp_path))
    for which in (
        dict(attack="Blended"),
        dict(attack="none"),
        dict(attack="BadNets", count=3),
        dict(attack="BadNets", target="umbrella"),
        dict(attack="BadNets", pairs="scan"),
    ):
        assert given.chain(**which).victim == trained.chain(**which).victim, which
    a, b = given.chain("BadNets", seed=1), trained.chain("BadNets", seed=1)
    assert a.victim != b.victim and a.poisoned == b.poisoned and a.victim == given.chain("BadNets", seed=0).victim
    assert "poisoned model of BadNets from the file plain.safetensors" in given.note(
        "CC3M"
    ) and "from the file" not in trained.note("CC3M")


# ---- what is refused, before anything runs


class Trap:
    def __reduce__(self):
        return (open, ("trapped", "w"))


def files_of_kinds(tmp_path):
    save_clip(build_clip("mini-ViT"), tmp_path / "vit.safetensors")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    (tmp_path / "trap.pt").write_bytes(pickle.dumps(Trap(), protocol=2))
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "vit.safetensors").read_bytes()[:5000])
    torch.save({"state_dict": {"step": 3}}, tmp_path / "numbers.pt")
    torch.save({0: torch.zeros(2)}, tmp_path / "numbered.pt")
    torch.save({"logit_scale": torch.zeros(2, 2).to_sparse()}, tmp_path / "sparse.pt")
    broken = build_clip("smoke-RN")
    broken.model.logit_scale.data.fill_(float("nan"))
    save_clip(broken, tmp_path / "nan.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    "file, error, says",
    [
        ("nowhere.pt", SettingsError, r"poison.checkpoints: no file at .*nowhere.pt for BadNets; give the whole path"),
        (
            "trap.pt",
            DataError,
            r"trap.pt is not a file of plain tensors .* where you trust it, pickles are not loaded here",
        ),
        ("module.pt", DataError, "module.pt does not fit smoke-RN"),
        ("cut.safetensors", DataError, "not a file of plain tensors"),
        ("numbers.pt", DataError, "holds no state dict of tensors"),
        ("numbered.pt", DataError, "holds no state dict of tensors"),
        ("sparse.pt", DataError, "holds no state dict of tensors"),
        (
            "nan.safetensors",
            SettingsError,
            r"poison.checkpoints, .*nan.safetensors: smoke-RN: the weights logit_scale are not finite",
        ),
        ("vit.safetensors", DataError, r"vit.safetensors does not fit smoke-RN: \d+ tensors differ"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_before_anything_runs(file, error, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files_of_kinds(tmp_path)
    with pytest.raises(error, match=says):
        planned(a_lab(tmp_path, **{"poison.checkpoints": {"BadNet": str(tmp_path / file)}}))
    assert not (tmp_path / "trapped").exists() and not list((tmp_path / "runs").rglob("clip.safetensors"))


def test_a_setting_that_is_none_is_refused(foreign, tmp_path):
    for given, says in [
        ({"BadNets": "a.pt"}, "unknown attack 'BadNets' in poison.checkpoints; known: BadCLIP, BadNet, "),
        ("a.pt", "poison.checkpoints is 'a.pt': write"),
        (["a.pt"], "an entry of the profile"),
    ]:
        with pytest.raises(SettingsError, match=says):
            planned(a_lab(tmp_path, **{"poison.checkpoints": given}))
    file = tmp_path / "other.safetensors"
    save_clip(build_clip("smoke-RN", seed=1), file)
    lab = a_lab(tmp_path)
    node = lab.node(given_clip, model="smoke-RN", checkpoint=str(file), checksum=weights_checksum(str(file)))
    save_clip(build_clip("smoke-RN", seed=2), file)
    with pytest.raises(SettingsError, match="is not the file that was asked for"):
        lab.run(node)


def test_the_command_line_gives_files_by_attack():
    given = parse_pairs(["poison.checkpoints={BadNet: /models/a b.safetensors, SSBA: ssba.pt}"], "--set")
    assert load_profile("smoke", given).poison.checkpoints == {"BadNet": "/models/a b.safetensors", "SSBA": "ssba.pt"}


# ---- a defended model


def test_open_clip_loads_a_defended_model_with_equal_embeddings(foreign, tmp_path):
    "A published poisoned model comes in, is cleaned, and goes out."
    lab = a_lab(tmp_path, **{"poison.checkpoints": {"BadNet": str(foreign[1][3])}})
    c = planned(lab).chain("BadNets")
    node = lab.node(
        cleaned_clip,
        clip=c.victim,
        pairs=lab.role("clean_pairs"),
        recipe=dict(epochs=1, batch_size=16, learning_rate=1e-3),
    )
    victim, cleaned = lab.run([c.victim, node])
    ours = load_clip(cleaned)
    save_clip(ours, tmp_path / "mine.safetensors")
    theirs = open_clip.create_model(cleaned.result["model"], pretrained=str(tmp_path / "mine.safetensors")).eval()
    pairs = open_data("world:validation:20")
    images = pairs.image_array(range(20), 32)
    with torch.no_grad():
        u, v = (
            theirs.encode_image(to_pixels(ours, images), normalize=True),
            theirs.encode_text(open_clip.SimpleTokenizer(context_length=32)(list(pairs.captions)), normalize=True),
        )
    assert torch.equal(embed_images(ours, images), u) and torch.allclose(
        embed_texts(ours, list(pairs.captions)), v, atol=1e-6
    )  # texts are computed without their padding here
    assert not torch.equal(embed_images(load_clip(victim), images), u)
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in load_file(tmp_path / "mine.safetensors").items())


# ---- QuickGELU


@pytest.fixture
def public(tmp_path, monkeypatch):
    "Weights with a tag that open_clip knows to need QuickGELU, as OpenAI's do; nothing is downloaded."
    torch.manual_seed(3)
    model = open_clip.create_model("tiny-ViT-quickgelu")
    torch.save(model.state_dict(), tmp_path / "public.pt")
    for name in ("tiny-ViT", "tiny-ViT-quickgelu"):
        monkeypatch.setitem(
            open_clip.pretrained._PRETRAINED, name, {"openai": dict(url="", hf_hub="", quick_gelu=True)}
        )
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *args, **kwargs: str(tmp_path / "public.pt"))
    return model


@pytest.mark.filterwarnings("ignore:QuickGELU mismatch")
@pytest.mark.parametrize("name", ["tiny-ViT", "tiny-ViT-quickgelu"])
def test_a_stage_stores_the_function_that_it_built_whatever_the_activation(name, public, tmp_path, pixels):
    "Models are built anew from their name and a file, again and again in a chain of stages."
    lab = a_lab(tmp_path)
    built = build_clip(name, pretrained="openai")
    stored = lab.run(lab.node(clean_clip, model=name, pretrained="openai"))
    again = load_clip(stored)
    assert stored.result["model"] == built.name and same(again.model, built.model, pixels)
    save_clip(load_clip(stored), tmp_path / "mine.safetensors")
    theirs = open_clip.create_model(stored.result["model"], pretrained=str(tmp_path / "mine.safetensors"))
    assert same(theirs, built.model, pixels)


def test_the_variant_that_profile_paper_names_is_the_public_model_and_the_plain_name_is_another_function(
    public, tmp_path, pixels
):
    assert same(build_clip("tiny-ViT-quickgelu", pretrained="openai").model, public, pixels)
    plain = build_clip("tiny-ViT", pretrained=str(tmp_path / "public.pt")).model  # the same tensors fit, silently
    assert not same(plain, public, pixels)
    name = load_profile("paper").model.name
    assert (
        open_clip.get_model_config(name)["quick_gelu"]
        and open_clip.pretrained.get_pretrained_cfg(name, "openai")["quick_gelu"]
    )


def test_public_weights_get_their_activation_also_under_the_plain_name(public, pixels):
    built = build_clip("tiny-ViT", pretrained="openai")
    assert built.name == "tiny-ViT-quickgelu" and same(built.model, public, pixels)


def test_a_poisoned_model_is_built_as_the_clean_one_is(public, tmp_path, pixels):
    "Weights fine-tuned from public ones come without a word about their activation."
    lab = a_lab(
        tmp_path,
        **{
            "model.name": "tiny-ViT",
            "model.pretrained": "openai",
            "poison.checkpoints": {"BadNet": str(tmp_path / "public.pt")},
        },
    )
    clean, victim = lab.run([(e := planned(lab)).clean, e.chain("BadNets").victim])
    assert victim.result["model"] == clean.result["model"] == "tiny-ViT-quickgelu" and same(
        load_clip(victim).model, public, pixels
    )


def test_the_normalisation_of_public_weights_stays_with_them(public, tmp_path, monkeypatch):
    grey = (0.5, 0.5, 0.5)
    monkeypatch.setitem(
        open_clip.pretrained._PRETRAINED, "tiny-ViT", {"grey": dict(url="", hf_hub="", mean=grey, std=grey)}
    )
    lab = a_lab(tmp_path)
    stored = lab.run(lab.node(clean_clip, model="tiny-ViT", pretrained="grey"))
    built, again, usual, images = (
        build_clip("tiny-ViT", pretrained="grey"),
        load_clip(stored),
        build_clip("tiny-ViT"),
        open_data("world:validation:4").images,
    )
    assert (
        again.mean
        == again.std
        == built.mean
        == as_clip(str(stored.path / "clip.safetensors")).mean
        == grey
        != usual.mean
    )
    assert torch.equal(embed_images(again, images), embed_images(built, images))
    again.mean, again.std = usual.mean, usual.std
    assert not torch.equal(embed_images(again, images), embed_images(built, images))


def test_a_file_is_not_read_into_another_activation(public, tmp_path):
    save_clip(build_clip("tiny-ViT", pretrained="openai"), tmp_path / "clip.safetensors")
    with pytest.raises(
        DataError, match="was saved from tiny-ViT-quickgelu, whose activation is another one.* build tiny-ViT-quickgelu"
    ):
        build_clip("tiny-ViT", pretrained=str(tmp_path / "clip.safetensors"))
    assert build_clip("tiny-ViT-quickgelu", pretrained=str(tmp_path / "clip.safetensors")).name == "tiny-ViT-quickgelu"
