"""Triton kernels against a float64 oracle and the CPU core: in Triton's interpreter, or on a GPU where there is one.

The interpreter computes bfloat16 wrongly, so it is left out there; and it takes milliseconds for a step of a loop, so shapes
are a few blocks. What the compiler makes of the kernels is tested in test_gpu_compilation.py.
"""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read as the kernels are imported

from fastllm import RequestError, kernels, ops
from fastllm.kernels import products
from fastllm.kernels.layout import GpuMatrix, unpack_codes
from fastllm.kernels.tiles import Tile
from fastllm.reference.integer import quantize_activations
from random_blocks import FORMATS, random_rows

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if GPU else [])
