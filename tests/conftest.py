"""Tests compute on one thread, as stages do: two threads round differently."""
import torch

torch.set_num_threads(1)
