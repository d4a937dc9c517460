"""torchvision beside another torch than it was built for, checkpoints by name and by file, long captions."""
import os, pickle, re, subprocess, sys, textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from mcl_repro.core.files import sha256_of
from mcl_repro.model.clip import (
    build_clip, embed_texts, load_weights, Origin, read_tensors, save_clip, token_table, tokenize,
)
from mcl_repro.model.checkpoints import saved_facts
from mcl_repro.data.pairs import ArrayImages, Pairs
from mcl_repro.data.registry import open_data
from mcl_repro.core.errors import DataError, SettingsError
from mcl_repro.model.training import Recipe, train, training_set

ROOT = Path(__file__).resolve().parents[2]


def python(code, *paths):
    "Run code in a process of its own, with these folders first on the module path."
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT)))}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


# ---- torchvision

def test_a_torchvision_of_another_torch_does_not_stop_open_clip():
    "Its extension is made unloadable here: that is what a CUDA wheel beside a CPU-only torch looks like."
    lines = python("""
        import torch
        def broken(path):
            raise OSError("libcudart.so: cannot open shared object file")
        torch.ops.load_library = broken
        try:
            import torchvision
        except RuntimeError as e:
            print(e)
        from mcl_repro.core.libraries import import_open_clip, import_torchvision
        from mcl_repro.model.clip import build_clip, embed_images, embed_texts
        torchvision, oc = import_torchvision(), import_open_clip()
        print(torchvision.extension._has_ops(), import_torchvision() is torchvision)
        import numpy as np
        from PIL import Image
        clip, caption = build_clip("smoke-RN"), ["a photo of a banana"]
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
        seen = oc.image_transform(clip.image_size, is_train=False)(picture)[None]
        image, text, scale = clip.model(seen, clip.tokenizer(caption))
        print(image.shape == text.shape == (1, 32) and bool(torch.isfinite(image).all() and torch.isfinite(text).all()))
        from mcl_repro.data.pictures import square
        ours = embed_images(clip, np.asarray(square(picture, 32))[None])
        print(torch.allclose(ours, image, atol=1e-4), torch.allclose(embed_texts(clip, caption), text, atol=1e-4))
        for call in (torchvision.ops.nms, torch.ops.torchvision.nms):
            try:
                call(torch.rand(3, 4), torch.rand(3), .5)
                print("silence")
            except (RuntimeError, NotImplementedError) as e:
                print(str(e).splitlines()[0])
    """)
    assert lines[0] == "operator torchvision::nms does not exist"   # what the shim is for
    assert lines[1:4] == ["False True", "True", "True True"]
    assert "Couldn't load custom C++ ops" in lines[4] and "Could not run 'torchvision::nms'" in lines[5]


def stub(folder, body):
    "A package `torchvision` with a submodule, that notes each time it is imported."
    package = folder/"torchvision"
    package.mkdir(parents=True)
    (package/"part.py").write_text("state = []\n")
    log = str(folder/"log")
    (package/"__init__.py").write_text(f"import torch\nopen({log!r}, 'a').write('x')\nfrom . import part\n{body}\n")


def test_only_missing_operators_are_mended(tmp_path):
    """One that loads is left alone, and another failure is shown.

    One that misses its operators is imported afresh with them declared.
    """
    stub(tmp_path/"whole", "whole = True")
    stub(tmp_path/"other", 'raise RuntimeError("something else")')
    stub(tmp_path/"absent", 'raise ImportError("no module")')
    uses_nms = 'torch.library.register_fake("torchvision::nms")(lambda dets, scores, iou: dets)'
    stub(tmp_path/"broken", f"part.state.append(1)\n{uses_nms}")
    lines = python(f"""
        import sys, torch
        from mcl_repro.core.libraries import import_torchvision
        def use(name):
            for module in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
                del sys.modules[module]
            sys.path.insert(0, {str(tmp_path)!r} + "/" + name)
        use("whole")
        import torchvision
        print(import_torchvision() is torchvision, torchvision.whole)
        for name in ("other", "absent"):
            use(name)
            try:
                import_torchvision()
            except Exception as e:
                print(repr(e))
        print(hasattr(torch.ops.torchvision, "nms"))
        use("broken")
        first = import_torchvision()
        print(first.part.state, import_torchvision() is first)
    """)
    assert lines == ["True True", "RuntimeError('something else')", "ImportError('no module')", "False", "[1] True"]
    imports = {name: len((tmp_path/name/"log").read_text()) for name in ("whole", "other", "absent", "broken")}
    assert imports == dict(whole=1, other=1, absent=1, broken=2)


# ---- weights by name and by file

@pytest.mark.parametrize("name", ["smoke-RN", "mini-RN"])
def test_a_small_model_has_no_public_weights_and_says_so(name):
    said = f"unknown weights 'openai' for {name}: open_clip has none, or give the path of a .safetensors file"
    with pytest.raises(SettingsError, match=said):
        build_clip(name, pretrained="openai")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w"])
def test_weights_come_from_a_file_of_any_name(tmp_path, name):
    clip = build_clip("smoke-RN", seed=1)
    if name == "w.safetensors":
        save_clip(clip, tmp_path/name)
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in clip.model.state_dict().items()}}, tmp_path/name)
    other = build_clip("smoke-RN", pretrained=str(tmp_path/name), seed=2)
    assert all(torch.equal(v, other.model.state_dict()[k]) for k, v in clip.model.state_dict().items())


def test_a_checkpoint_that_is_not_there_is_named_with_its_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=re.escape(f"no checkpoint at {tmp_path}/gone.safetensors: check")):
        build_clip("smoke-RN", pretrained="gone.safetensors")


class Harm:
    "Unpickled, it makes a folder."
    def __init__(self, mark):
        self.mark = mark
    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("name", ["a.pt", "a.bin", "a.safetensors", "a.ckpt", "a"])
@pytest.mark.parametrize("write", [
    lambda harm, path: path.write_bytes(pickle.dumps(harm, protocol=2)),
    lambda harm, path: torch.save({"state_dict": harm}, path),
], ids=["pickle", "torch"])
def test_a_pickle_is_refused_and_never_run(tmp_path, name, write):
    write(Harm(tmp_path/"ran"), tmp_path/name)
    clip = build_clip("smoke-RN")
    before = {k: v.clone() for k, v in clip.model.state_dict().items()}
    with pytest.raises(DataError, match="is not a file of plain tensors .* pickles are not loaded here") as e:
        load_weights(clip, tmp_path/name)
    assert "\n" not in str(e.value) and not (tmp_path/"ran").exists()
    assert all(torch.equal(v, before[k]) for k, v in clip.model.state_dict().items())


# ---- captions longer than the context

def test_long_captions_are_cut_with_their_end_kept_and_counted():
    clip = build_clip("smoke-RN")
    n = clip.context_length
    start, end = clip.tokenizer(["a"])[0, :2][0].item(), 49407
    fits, longer = " ".join(["dog"]*(n - 2)), " ".join(["dog"]*(n - 1))   # one token a word, and start and end
    tokens, cut = tokenize(clip, [fits, longer, "dog", longer + " and a very much longer rest"])
    assert cut == 2 and tokens.shape == (4, n)
    assert tokens[:, 0].tolist() == [start] * 4
    assert (tokens == end).sum(1).tolist() == [1] * 4
    assert tokens.argmax(1).tolist() == [n - 1, n - 1, 2, n - 1]
    assert torch.equal(tokens[0], tokens[1]) and torch.equal(embed_texts(clip, [fits]), embed_texts(clip, [longer]))


def test_a_training_says_how_many_captions_it_cut():
    clip = build_clip("smoke-RN")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    captions = [f"picture number {i}" + " and so on"*20*(i in (2, 5, 6)) for i in range(8)]
    data = training_set(clip, Pairs([str(i) for i in range(8)], captions, ArrayImages(pixels)))
    assert data.captions_cut == 3 and np.isfinite(train(clip, data, Recipe(1, 4, 1e-3))[-1]["loss"])


def test_a_model_without_weights_is_built_without_a_warning(caplog):
    import logging
    with caplog.at_level(logging.WARNING):
        clip = build_clip("ViT-B-32")
    assert clip.image_size == 224 and not caplog.records and logging.root.manager.disable == logging.NOTSET


# ---- in a store: no more of the token table than what is its own

@pytest.fixture
def store(tmp_path):
    "A folder with bases, and an artefact's place in it."
    (tmp_path/"bases").mkdir()
    place = tmp_path/"objects"/"stage"/"key"
    place.mkdir(parents=True)
    return place


def sharing(store, asked=None):
    "`share` of a store, in small; `asked` gets the names that it was asked for."
    bases, asked = store.parents[2]/"bases", [] if asked is None else asked
    def share(write, name=None):
        asked.append(name)
        write(bases/"part")
        return (bases/"part").replace(bases/f"{sha256_of(bases/'part')}.safetensors").name
    return share


def tensors(clip):
    return {k: v.clone() for k, v in clip.model.state_dict().items()}


def equal_bits(a, b):
    bits = lambda t: t.contiguous().flatten().view(torch.uint8)
    alike = lambda v, w: v.shape == w.shape and torch.equal(bits(v), bits(w))
    return a.keys() == b.keys() and all(alike(v, b[k]) for k, v in a.items())


def after_trainings(store, count):
    "A model after so many trainings, each of which went through the store; the files on the way."
    clip = build_clip("smoke-RN", seed=1)
    for number in range(count):
        rows = [3, 700 + number]
        with torch.no_grad():
            table = token_table(clip.model).weight
            first, kept = (clip.origin or Origin(table.clone())), table[rows] + 1
            table.mul_(.9 - .01 * number)
            table[rows] = kept
        clip.origin = Origin(first.first, (*first.factors, .9 - .01 * number), first.name)
        save_clip(clip, store/f"{number}.safetensors", share=sharing(store))
        expected = tensors(clip)
        clip = build_clip("smoke-RN", pretrained=str(store/f"{number}.safetensors"))
        assert equal_bits(tensors(clip), expected)
    return clip


def test_a_chain_of_trainings_is_read_back_to_the_bit_and_shares_its_first_table(store):
    clip = after_trainings(store, 3)
    assert len(clip.origin.factors) == 3 and len(list((store.parents[2]/"bases").iterdir())) == 1
    sizes = [(store/f"{n}.safetensors").stat().st_size for n in range(3)]
    save_clip(clip, store/"whole.safetensors")
    assert max(sizes) - min(sizes) < 2000 and max(sizes) < (store/"whole.safetensors").stat().st_size / 4
    assert equal_bits(read_tensors(store/"whole.safetensors"), read_tensors(store/"2.safetensors"))


def test_a_real_training_leaves_the_rows_of_its_captions(store):
    clip, data = build_clip("smoke-RN", seed=1), open_data("world:train:40")
    found = training_set(clip, data)
    for _ in range(2):
        train(clip, found, Recipe(epochs=2, batch_size=20, learning_rate=1e-3))
    save_clip(clip, store/"clip.safetensors", share=sharing(store))
    from safetensors.torch import load_file
    rows = load_file(store/"clip.safetensors")["token_embedding.weight.rows"]
    assert set(rows.tolist()) <= set(found.tokens.unique().tolist()) and len(rows) > 20
    assert equal_bits(read_tensors(store/"clip.safetensors"), tensors(clip)) and len(clip.origin.factors) == 2
    first, = (store.parents[2]/"bases").iterdir()
    assert torch.equal(load_file(first)["table"], token_table(build_clip("smoke-RN", seed=1).model).weight)


@pytest.mark.parametrize("change", ["all rows", "odd numbers", "nothing known"])
def test_whatever_the_rows_are_they_are_read_back_to_the_bit(store, change):
    clip = build_clip("smoke-RN", seed=1)
    table = token_table(clip.model).weight
    clip.origin = Origin(table.detach().clone(), (.5,), "0"*64 + ".safetensors")
    with torch.no_grad():
        if change == "all rows":
            table.add_(1)
        elif change == "nothing known":
            clip.origin = None
        else:
            table.mul_(.5)
            table[:4] = torch.tensor([float("nan"), -0., float("inf"), 1e-45])[:, None]
    expected = tensors(clip)
    save_clip(clip, store/"clip.safetensors", share=sharing(store))
    assert equal_bits(read_tensors(store/"clip.safetensors"), expected)
    rows = expected["token_embedding.weight"].shape[0]
    size = (store/"clip.safetensors").stat().st_size
    assert size < rows * 32 * 4 / 2       # no file has all rows: they have become a base of their own


def test_a_known_base_is_asked_for_by_name(store):
    clip, asked = after_trainings(store, 1), []
    save_clip(clip, store/"again.safetensors", share=sharing(store, asked))
    assert asked == [clip.origin.name] and (store.parents[2]/"bases"/asked[0]).is_file()
    before = (store/"again.safetensors").read_bytes()
    save_clip(clip, store/"again.safetensors", share=sharing(store))
    assert (store/"again.safetensors").read_bytes() == before


def renoted(path, change):
    "A file of a store with another note on its base."
    from safetensors.torch import load_file, save_file
    facts = saved_facts(path)
    facts["base"] = change(facts["base"])
    save_file(load_file(path), path, metadata=facts)


DAMAGES = {
    "no JSON": (lambda note: "{", "its note on the first token table is damaged"),
    "no factors": (lambda note: note.replace("factors", "f"), "its note on the first token table is damaged"),
    "a path": (lambda note: re.sub(r"[0-9a-f]{64}", "../../secret", note), "first token table is damaged"),
    "another table": (lambda note: note.replace("token_embedding.weight", "x"), "do not fit; save the model again"),
    "another base": (lambda note: re.sub(r"[0-9a-f]{64}", "0"*64, note), "its first token table, 00000000, lies in"),
}


@pytest.mark.parametrize("change,says", DAMAGES.values(), ids=DAMAGES)
def test_a_note_that_cannot_be_used_is_refused_in_one_line(store, change, says):
    after_trainings(store, 1)
    renoted(store/"0.safetensors", change)
    for read in (read_tensors, lambda path: build_clip("smoke-RN", pretrained=str(path))):
        with pytest.raises(DataError, match=says) as error:
            read(store/"0.safetensors")
        assert "\n" not in str(error.value)


def test_a_base_that_is_no_table_or_a_link_is_refused(store, tmp_path):
    after_trainings(store, 1)
    base, = (tmp_path/"bases").iterdir()
    content = base.read_bytes()
    for other, says in ((b"nonsense", "is no token table"), (content[:5000], "is no token table")):
        base.write_bytes(other)
        with pytest.raises(DataError, match=says):
            read_tensors(store/"0.safetensors")
    base.unlink()
    (tmp_path/"elsewhere").write_bytes(content)
    base.symlink_to(tmp_path/"elsewhere")
    with pytest.raises(DataError, match="holds a part of a model"):
        read_tensors(store/"0.safetensors")


def test_a_base_of_another_width_does_not_fit(store, tmp_path):
    from safetensors.torch import save_file
    after_trainings(store, 1)
    base, = (tmp_path/"bases").iterdir()
    save_file({"table": torch.zeros(10, 32)}, base)
    with pytest.raises(DataError, match="do not fit; save the model again"):
        read_tensors(store/"0.safetensors")
