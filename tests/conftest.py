"""Tests compute on one thread, as stages do: two threads round differently."""
import signal
import torch

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would every process that they start to
# stop it by Ctrl-C.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a GPU; make test DEVICE=cuda runs these alone")
