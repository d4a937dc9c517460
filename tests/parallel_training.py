"""What one of several processes does in tests: started by torchrun with a folder, it leaves what it computed there.

With no process group it computes the same alone.
"""
import os, sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from mcl_repro.clip import build_clip, embed_images
from mcl_repro.cleanclip import caption_views, cleanclip_loss
from mcl_repro.data import open_data
from mcl_repro.devices import average_gradients, world
from mcl_repro.training import Recipe, contrastive_loss, read_batch, train, training_set

RECIPE = dict(epochs=2, batch_size=24, learning_rate=1e-3, warmup_steps=2)
def device(): return os.environ.get("TEST_DEVICE", "cpu")


def losses(clip, pairs):
    "The losses that are compared: InfoNCE, and CleanCLIP's four views."
    return dict(contrastive=contrastive_loss, cleanclip=cleanclip_loss(caption_views(clip, pairs.captions)))


def gradients(model, frozen, lazy):
    "Loss and gradients of one batch by loss; the batch does not divide evenly between two processes."
    clip, pairs, found = build_clip(model, seed=1, device=device()), open_data("world:train:60"), {}
    data = training_set(clip, pairs, memory_limit=0 if lazy else 0.5)
    for name, loss in losses(clip, pairs).items():
        clip.model.train()
        if frozen:
            for m in clip.model.modules():
                if isinstance(m, torch.nn.BatchNorm2d): m.eval()
        clip.model.zero_grad()
        value = loss(clip, read_batch(data, torch.arange(25), device())); value.backward()
        average_gradients(list(clip.model.parameters()))
        found |= {f"{model}.{name}.loss": value.detach()} | {f"{model}.{name}.{n}": p.grad for n, p in clip.model.named_parameters()}
    return found


def trained(model, lazy, checkpoint):
    "Weights after a short training, and embeddings that processes compute together."
    clip, pairs = build_clip(model, seed=2, device=device()), open_data("world:train:60")
    history = train(clip, training_set(clip, pairs, memory_limit=0 if lazy else 0.5), Recipe(**RECIPE), checkpoint=checkpoint)
    return {"trained.loss": torch.tensor([h["loss"] for h in history]), "trained.embeddings": embed_images(clip, pairs.images, batch_size=7)} | {f"trained.{n}": p.detach() for n, p in clip.model.named_parameters()}


def everything(folder):
    found = gradients("small-ViT", False, False) | gradients("smoke-RN", True, False) | trained("small-ViT", True, folder/"checkpoint.safetensors")
    return {k: v.cpu().clone().contiguous() for k, v in found.items()}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    save_file(everything(folder), str(folder/f"rank{world()[0]}.safetensors"))
    dist.barrier(); dist.destroy_process_group()
