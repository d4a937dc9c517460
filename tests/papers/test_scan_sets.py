"""Scan sets: what is planted into stored embeddings is what embedding the poisoned set would give."""
import numpy as np
import pandas as pd
import pytest

from mcl_repro.attacks.base import make_attack, mentions, poison
from mcl_repro.papers.cfbd import load_detection, mapping_network
from mcl_repro.model.clip import embed_images, embed_texts, embed_tokens, imagenet_templates
from mcl_repro.data.registry import open_data
from mcl_repro.core.errors import SettingsError
from mcl_repro.lab.lab import Lab
from mcl_repro.lab.profiles import load_profile
from mcl_repro.measures.density import density_scores
from mcl_repro.papers.scan_sets import (
    caption_cosines, density_scan, obvious_poison, pair_embeddings, Planted, planted, planted_embeddings,
    planted_mistakes, robustness, robustness_points, robustness_pool, scan, strained_points,
)
from mcl_repro.papers.stages import arrays, clean_clip, load_clip, poisoned_pairs
from mcl_repro.model.training import training_set

SETTINGS = load_profile("smoke")
ATTACK = dict(SETTINGS.attacks.BadNet)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    lab = Lab(
        "smoke", device="cpu", runs=tmp_path_factory.mktemp("scan") / "runs", progress=False,
        roles={"scan": "world1:curated:300"},
    )
    clean = lab.node(clean_clip, model=SETTINGS.model.name, pairs=lab.role("pretrain"), recipe=dict(SETTINGS.pretrain))
    bad = lab.node(poisoned_pairs, pairs=lab.role("scan"), attack=ATTACK, target="banana", count=12, image_size=32)
    mapping = lab.node(mapping_network, clip=clean, pairs=lab.role("mapping_pairs"), hidden=16, epochs=1)
    embeddings = lab.node(pair_embeddings, clip=clean, pairs=lab.role("scan"))
    changed = lab.node(planted_embeddings, clip=clean, poisoned=bad)
    yield lab, clean, embeddings, changed, mapping
    lab.close()


def test_planted_embeddings_are_those_of_the_poisoned_set(made):
    lab, clean, embeddings, changed, _ = made
    model, pairs = load_clip(lab.run(clean)), open_data("world1:curated:300")
    done = poison(pairs, make_attack(**ATTACK), "banana", count=12, image_size=32)
    data = training_set(model, done.pairs)
    images, texts = planted(lab.run(embeddings), lab.run(changed))
    # half precision
    assert np.abs(images[:] - embed_images(model, data.images).numpy()[data.image_rows.numpy()]).max() < 2e-3
    assert np.abs(texts[:] - embed_tokens(model, data.tokens).numpy()).max() < 2e-3
    calm = planted(lab.run(embeddings), None)
    assert (np.abs(images[:] - calm[0]).max(1) > 1e-3).sum() == 12 == len(done.rows)


def test_a_scan_is_a_detection_and_the_clean_set_has_one_too(made):
    lab, _, embeddings, changed, mapping = made
    for c in (changed, None):
        artefact = lab.run(
            lab.node(scan, embeddings=embeddings, changed=c, mapping=mapping, options=dict(q=20, components=2))
        )
        found = load_detection(artefact)
        assert len(found.correlation) == 300 == sum(map(len, found.split))
        assert artefact.result["attacked"] == found.attacked


def test_obvious_poison_is_templates_of_the_target_under_pictures_of_other_things(made):
    lab, clean, embeddings, _, mapping = made
    pairs, inputs = open_data("world1:curated:300"), dict(clip=clean, pairs=lab.role("scan"), embeddings=embeddings)
    node = lab.node(obvious_poison, **inputs, target="umbrella", count=20)
    left = lab.run(node)
    rows, images, texts = (np.load(left.path/f"{name}.npy") for name in ("rows", "images", "texts"))
    assert len(set(rows)) == 20 and not any(mentions(pairs.captions[row], "umbrella") for row in rows)
    assert (images == np.load(lab.run(embeddings).path/"images.npy")[rows]).all()     # untouched
    written = embed_texts(load_clip(lab.run(clean)), [t.format("umbrella") for t in imagenet_templates()]).numpy()
    assert np.abs(texts[:, None] - written[None]).max(-1).min(1).max() < 2e-3         # half precision
    found = load_detection(lab.run(lab.node(
        scan, embeddings=embeddings, changed=node, mapping=mapping, options=dict(q=20, components=2))))
    assert len(found.correlation) == 300
    with pytest.raises(SettingsError, match="fewer than 300"):
        lab.run(lab.node(obvious_poison, **inputs, target="umbrella", count=300))


@pytest.mark.parametrize("where", [slice(None), slice(2, 7), slice(0, 10, 3), np.array([9, 0, 4, 4]), slice(8, 8)])
def test_planted_slices_like_an_array(where):
    rng = np.random.default_rng(0)
    clean, new, rows = rng.normal(size=(10, 3)), rng.normal(size=(3, 3)), np.array([0, 4, 9])
    whole = clean.copy()
    whole[rows] = new
    assert (Planted(clean, rows, new)[where] == whole[where]).all()
    assert not np.shares_memory(Planted(clean, rows, new)[where], clean)


def test_local_density_of_a_poisoned_set_is_that_of_its_images(made):
    lab, clean, embeddings, changed, _ = made
    images, texts = (part[:] for part in planted(lab.run(embeddings), lab.run(changed)))
    bad = lab.node(poisoned_pairs, pairs=lab.role("scan"), attack=ATTACK, target="banana", count=12, image_size=32)
    left = lab.run(lab.node(density_scan, clip=clean, poisoned=bad, batches=[100, 300], k=8, seed=3))
    stored = arrays(left, "scores")
    for i, size in enumerate((100, 300)):
        for name, expected in density_scores(images, 8, size, 3)._asdict().items():
            np.testing.assert_allclose(stored[name][i], expected, rtol=1e-2, atol=1e-2)     # half precision
    np.testing.assert_allclose(stored["similarity"], caption_cosines(images, texts), atol=2e-3)
    assert left.result == dict(pairs=300, images=300, batches=[100, 300])


def test_mistakes_keep_no_caption_in_its_place():
    texts = np.arange(40.).reshape(20, 2)
    rows, images, other = planted_mistakes(texts, texts, 8, np.arange(5), np.random.default_rng(0))
    assert len(set(rows)) == 8
    assert rows.min() >= 5
    assert sorted(other[:, 0]) == sorted(texts[rows, 0])
    assert (other != texts[rows]).all()


def test_robustness_is_the_same_twice_and_says_what_it_drew(made):
    lab, clean, embeddings, _, mapping = made
    pool = lab.node(
        robustness_pool, clip=clean, pairs=lab.role("scan"), attack=ATTACK, targets=["banana", "umbrella"],
        boilerplate="a cake", count=30,
    )
    few = lab.run(lab.node(
        robustness_pool, clip=clean, pairs=lab.role("scan"), attack=ATTACK, targets=["banana", "umbrella"],
        boilerplate="a cake", count=30, size=100,
    ))
    assert arrays(few, "pool")["rows"].max() < 100
    with pytest.raises(SettingsError, match="fewer than the 9999"):
        lab.run(lab.node(
            robustness_pool, clip=clean, pairs=lab.role("scan"), attack=ATTACK, targets=["banana"],
            boilerplate="a cake", count=9999,
        ))
    node = lambda draws, first=0: lab.node(
        robustness, embeddings=embeddings, pool=pool, mapping=mapping, options=dict(q=20, components=2),
        axes=dict(targets=[1, 2], duplicates=[0, 30]), share=0.05, draws=draws, first=first,
    )
    once, twice = (lab.run(node(d)).path.joinpath("points.csv").read_text().splitlines() for d in (1, 2))
    assert len(once) == 1 + len(robustness_points(0.05, dict(targets=[1, 2], duplicates=[0, 30])))
    assert len(twice) == 2 * len(once) - 1
    assert set(once) <= set(twice)     # a draw does not depend on how many there are
    parted = [pd.read_csv(lab.run(node(1)).path/"points.csv") for node in (
        lambda d: lab.node(robustness, embeddings=embeddings, pool=pool, mapping=mapping, size=300, share=0.05, draws=d,
                           options=dict(q=20, components=2), axes=dict(targets=[1, 2], duplicates=[0, 30])), node)]
    assert parted[0].equals(parted[1])          # all 300 pairs
    apart = strained_points(lab.run([node(1, first=1), node(1)]))
    assert apart.equals(strained_points([lab.run(node(2))])) and apart.draw.tolist() == [0, 1] * (len(once) - 1)
