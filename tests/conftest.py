"""Tests run side by side, one process a core: each of them, and what it starts, computes on one thread."""

import os

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
