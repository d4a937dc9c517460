"""What one of several processes does in tests: started by torchrun with a folder, it leaves what it computed there.

With no process group it computes the same alone.
"""
import os, sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from mcl_repro.papers.baselines import ascent_loss, attach_pool, constraint_loss, roclip_loss
from mcl_repro.model.clip import build_clip, embed_images
from mcl_repro.papers.cleanclip import caption_views, cleanclip_loss
from mcl_repro.data.registry import open_data
from mcl_repro.model.devices import average_gradients, own_rank
from mcl_repro.model.training import contrastive_loss, read_batch, Recipe, rows_of, train, training_set
from mcl_repro.papers.ubt import FORGETTING, overfitting_loss, unlearning_loss

RECIPE = dict(epochs=2, batch_size=24, learning_rate=1e-3, warmup_steps=2)
def device():
    return os.environ.get("TEST_DEVICE", "cpu")


def losses(clip, pairs):
    """Every loss that the papers train with, by name; some draw pairs from a second set.

    For RoCLIP the model gets its pool.
    """
    data = training_set(clip, pairs)
    other = rows_of(data, range(len(data)//2, len(data)))
    attach_pool(clip, data, 20)
    return dict(
        contrastive=contrastive_loss, cleanclip=cleanclip_loss(caption_views(clip, pairs.captions)),
        roclip=roclip_loss(1, every=1), overfitting=overfitting_loss(torch.arange(len(data)) % 4 == 1),
        abl=constraint_loss(torch.arange(len(data)) % 4 == 1), abl_ascent=ascent_loss(other, batch_size=9),
        **{f"unlearning_{f}": unlearning_loss(other, f, retention=0.5, batch_size=9) for f in FORGETTING},
    )


def gradients(model, frozen, lazy):
    """Loss and gradients of one batch by loss; the batch does not divide evenly between two processes.

    An untrained ResNet says the same of every picture, which of a pool is nearest is left to rounding.
    """
    clip, pairs, found = build_clip(model, seed=1, device=device()), open_data("world:train:60"), {}
    data = training_set(clip, pairs, memory_limit=0 if lazy else 0.5)
    for name, loss in losses(clip, pairs).items():
        if frozen and name == "roclip":
            continue
        clip.model.train()
        if frozen:
            for m in clip.model.modules():
                if isinstance(m, torch.nn.BatchNorm2d):
                    m.eval()
        clip.model.zero_grad()
        value = loss(clip, read_batch(data, torch.arange(25), device()))
        value.backward()
        average_gradients(list(clip.model.parameters()))
        found |= {f"{model}.{name}.loss": value.detach()} | {
            f"{model}.{name}.{n}": p.grad for n, p in clip.model.named_parameters() if p.grad is not None
        }
    return found


def trained(model, lazy, checkpoint):
    "Weights after a short training, and embeddings that processes compute together."
    clip, pairs = build_clip(model, seed=2, device=device()), open_data("world:train:60")
    history = train(
        clip, training_set(clip, pairs, memory_limit=0 if lazy else 0.5), Recipe(**RECIPE), checkpoint=checkpoint
    )
    return {
        "trained.loss": torch.tensor([h["loss"] for h in history]),
        "trained.embeddings": embed_images(clip, pairs.images, batch_size=7),
    } | {f"trained.{n}": p.detach() for n, p in clip.model.named_parameters()}


def everything(folder):
    found = (
        gradients("small-ViT", False, False)
        | gradients("smoke-RN", True, False)
        | trained("small-ViT", True, folder / "checkpoint.safetensors")
    )
    return {k: v.cpu().clone().contiguous() for k, v in found.items()}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    save_file(everything(folder), str(folder/f"rank{own_rank()}.safetensors"))
    dist.barrier()
    dist.destroy_process_group()
