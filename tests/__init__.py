"""Whoever imports Triton first decides whether its kernels are compiled or interpreted: so this stands before all."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
