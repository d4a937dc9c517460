"CleanCLIP: its loss against a plain formula, what goes through the model, its variants, and what it refuses."
import ast, inspect
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mcl_repro import cleanclip
from mcl_repro.augmentation import augment_captions, augment_images
from mcl_repro.cleanclip import caption_views, cleaned_clip, cleanclip_loss, self_supervised_loss
from mcl_repro.clip import build_clip, load_weights, save_clip, to_pixels
from mcl_repro.data import open_data
from mcl_repro.errors import DataError, SettingsError
from mcl_repro.lab import load_profile
from mcl_repro.training import read_batch, seeded, training_set

RECIPE = dict(epochs=1, batch_size=16, learning_rate=1e-3)


@pytest.fixture(scope='module')
def clip(): return build_clip('smoke-RN')


@pytest.fixture(scope='module')
def pairs(): return open_data('world:validation:32')


@pytest.fixture
def batch(clip, pairs): return read_batch(training_set(clip, pairs), torch.arange(8, 20), 'cpu', step=5)


def unit(n, seed): return F.normalize(torch.randn(n, 16, generator=torch.Generator().manual_seed(seed)), dim=-1)


def naive_cross_entropy(a, b, scale):
    "Mean of -log softmax of the diagonal, in numpy, row by row."
    logits = scale * a.double().numpy() @ b.double().numpy().T
    return float(np.mean([-logits[k, k] + np.log(np.exp(logits[k]).sum()) for k in range(len(logits))]))


# ---- the loss

@pytest.mark.parametrize('scale', [1., 14.3, 100.])
def test_the_self_supervised_loss_is_the_formula_and_has_one_direction(scale):
    i, ai, t, at = (unit(9, k) for k in range(4))
    loss = self_supervised_loss(i, ai, t, at, scale).item()
    assert loss == pytest.approx((naive_cross_entropy(i, ai, scale) + naive_cross_entropy(t, at, scale)) / 2, rel=1e-5)
    assert loss != pytest.approx((naive_cross_entropy(ai, i, scale) + naive_cross_entropy(at, t, scale)) / 2, rel=1e-4)


def test_the_whole_objective_is_its_parts_in_one_forward_pass(clip, pairs, batch):
    "Embeddings are computed here by the model itself, originals and augmentations in one batch of 2B."
    captions = list(pairs.captions)
    loss = cleanclip_loss(caption_views(clip, captions, seed=3), .5, 2., seed=3)(clip, batch).item()
    views = augment_captions(captions, seeded(3, 5, 5))[8:20]
    images = torch.cat([batch.images, augment_images(batch.images, 'autoaugment', seeded(3, 4, 5))])
    u = F.normalize(clip.model.encode_image(to_pixels(clip, images)), dim=-1).detach()
    v = F.normalize(clip.model.encode_text(clip.tokenizer([*captions[8:20], *views])), dim=-1).detach()
    s, (i, ai), (t, at) = clip.model.logit_scale.exp().item(), u.chunk(2), v.chunk(2)
    parts = [naive_cross_entropy(a, b, s) for a, b in ((i, t), (t, i), (i, ai), (t, at))]
    assert loss == pytest.approx(.5 * sum(parts[:2]) / 2 + 2. * sum(parts[2:]) / 2, rel=1e-4)


def test_one_forward_pass_of_both_halves(clip, batch, pairs):
    seen = []; hook = clip.model.visual.register_forward_hook(lambda m, given, out: seen.append(len(given[0])))
    for weight in (1., 0.): cleanclip_loss(caption_views(clip, list(pairs.captions)), 1., weight)(clip, batch)
    hook.remove()
    assert seen == [24, 12]      # without the self-supervised term nothing is augmented


def test_the_scale_is_shared_and_learns_from_both_terms(clip, batch, pairs):
    gradients = []
    for weights in ((1., 0.), (0., 1.), (1., 1.)):
        clip.model.zero_grad(); cleanclip_loss(caption_views(clip, list(pairs.captions)), *weights)(clip, batch).backward()
        gradients.append(clip.model.logit_scale.grad.item())
    assert 0 not in gradients and len(set(gradients)) == 3


def test_the_loss_depends_on_seed_and_step_only(clip, batch, pairs):
    captions, later = list(pairs.captions), SimpleNamespace(**vars(batch) | dict(step=6))
    value = lambda b, **kwargs: cleanclip_loss(caption_views(clip, captions, **kwargs), **{k: v for k, v in kwargs.items() if k == 'seed'})(clip, b).item()
    torch.rand(5)
    assert value(batch) == value(batch) and len({value(batch), value(later), value(batch, seed=1)}) == 3


def test_frozen_captions_never_change(clip, batch, pairs):
    later = SimpleNamespace(**vars(batch) | dict(step=99))
    for frozen, same in ((True, True), (False, False)):
        views = caption_views(clip, list(pairs.captions), frozen=frozen)
        assert torch.equal(views(batch), views(later)) is same and views(batch).shape == batch.tokens.shape


@pytest.mark.parametrize('weights', [(0., 0.), (-1., 1.), (1., -.1)])
def test_weights_that_leave_nothing_to_minimise(weights):
    with pytest.raises(SettingsError, match='weights of at least 0'): cleanclip_loss(None, *weights)


# ---- the stage

def clean(folder, start, **changes):
    "Run the stage without a lab."
    for name in ('out', 'scratch'): (folder/name).mkdir(parents=True)
    work = SimpleNamespace(out=folder/'out', scratch=folder/'scratch', device='cpu', progress=lambda *a: None)
    settings = dict(clip=start, pairs='world:validation:32', recipe=RECIPE) | changes
    return cleaned_clip(work, **settings), (folder/'out/clip.safetensors').read_bytes()


@pytest.fixture
def start(tmp_path, clip):
    save_clip(clip, tmp_path/'clip.safetensors')
    return SimpleNamespace(path=tmp_path, result=dict(model='smoke-RN'))


def test_the_stage_gives_the_same_bytes_twice_and_others_for_other_settings(tmp_path, start):
    changes = [{}, {}, dict(frozen_captions=True), dict(self_supervised_weight=0.), dict(clip_weight=0.), dict(recipe=dict(RECIPE, seed=1)), dict(image_policy='roclip')]
    torch.rand(3)
    done = [clean(tmp_path/str(k), start, **change) for k, change in enumerate(changes)]
    assert done[0] == done[1] and len({weights for _, weights in done}) == len(changes) - 1
    result = done[0][0]
    assert (result['pairs'], result['steps'], result['synonyms'], result['frozen_captions']) == (32, 2, 'builtin', False)
    assert done[2][0]['frozen_captions'] is True
    load_weights(build_clip('smoke-RN', seed=5), tmp_path/'0/out/clip.safetensors')


def test_bad_input_is_refused_before_training(tmp_path, start, monkeypatch):
    monkeypatch.setattr(cleanclip, 'train_and_save', lambda *a, **k: pytest.fail('it trained'))
    with pytest.raises(SettingsError, match="synonyms auto means another thing on every machine"): clean(tmp_path/'a', start, synonyms='auto')
    with pytest.raises(SettingsError, match="unknown source of synonyms 'roget'"): clean(tmp_path/'b', start, synonyms='roget')
    with pytest.raises(SettingsError, match='one of them above'): clean(tmp_path/'c', start, clip_weight=0., self_supervised_weight=0.)
    (tmp_path/'pairs.csv').write_text('image,caption\nx.png,a dog\nx.png,2024\n')
    from PIL import Image
    Image.new('RGB', (32, 32)).save(tmp_path/'x.png')
    with pytest.raises(DataError, match="row 1 has no letters: '2024'"): clean(tmp_path/'d', start, pairs=str(tmp_path/'pairs.csv'))


def test_the_stage_is_told_nothing_of_the_attack():
    told = set(inspect.signature(cleaned_clip).parameters)
    assert {'clip', 'pairs', 'recipe'} <= told and not told & {'attack', 'target', 'poisoned', 'trigger', 'test'}
    used = {getattr(n, 'id', getattr(n, 'attr', '')) for f in ast.parse(Path(cleanclip.__file__).read_text()).body if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    assert not used & {'classification', 'attack_hits', 'poisoned_pairs', 'open_poisoned', 'zero_shot_weights'}


@pytest.mark.parametrize('profile', ['smoke', 'mini', 'paper'])
def test_profiles_give_what_the_stage_takes(profile):
    settings = load_profile(profile)
    takes = inspect.signature(cleaned_clip).parameters
    assert set(settings.cleanclip) <= set(takes) and settings.cleanclip.synonyms != 'auto' and settings.roles.clean_pairs
    if profile == 'paper':
        recipe = settings.cleanclip.recipe
        assert (recipe.epochs, recipe.batch_size, recipe.learning_rate, recipe.warmup_steps, settings.cleanclip.synonyms) == (10, 64, 1e-5, 50, 'wordnet')
