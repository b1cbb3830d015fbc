"""One thread everywhere: small tensors on many threads take ten times as long, and bits depend on the number."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

torch.set_num_threads(1)
