"""Compiles the Triton kernels ahead of time, without a GPU, and reports what the compiler made of them.

    python tests/compile_gpu_kernels.py sm_90 [sm_89 ...]     a line of JSON for each kernel

Every tile of an architecture's table, for every kind of weights, and the other kernels in what models ask of
them, through the launching code itself: the kernels are replaced by recorders, which compile what they are
called with. sm_80 and sm_89, whose tables are alike, share their tiles: each compiles every other one. All of
everything is compiled with FASTLLM_TEST_PROFILE=full: attention for every head dim, cache and option, and
the kernels without tiles for these two as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.tools.tensor_descriptor import TensorDescriptor

from fastllm.kernels import (
    activation,
    attention,
    dense,
    embedding,
    heads,
    low_rank,
    norm,
    products,
    sampler,
)
from fastllm.kernels.attention_plan import plan_attention
from fastllm.kernels.layout import GpuMatrix
from fastllm.kernels.tiles import Tile, table

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
}
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion", "launch_pdl")


class Recorder:
    """Stands for a kernel: compiles for `target` what it is launched with, and keeps the result."""

    def __init__(self, kernel: Any, target: str, results: list[dict[str, Any]]) -> None:
        self.kernel, self.target, self.results = kernel, target, results
        self.label: dict[str, Any] = {}

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._compile

    def _compile(self, *arguments: Any, **named: Any) -> None:
        options = {name: named.pop(name) for name in OPTIONS if name in named}
        values = dict(zip(self.kernel.arg_names, arguments, strict=False)) | named
        signature, attributes = {}, {}
        for i, (name, value) in enumerate(values.items()):
            signature[name] = "constexpr"
            if isinstance(value, torch.Tensor):
                signature[name] = "*" + DTYPES[value.dtype]
                attributes[(i,)] = [["tt.divisibility", 16]]
            elif isinstance(value, TensorDescriptor):
                block = ", ".join(map(str, value.block_shape))
                signature[name] = f"tensordesc<{DTYPES[value.base.dtype]}[{block}]>"
            elif name in named:
                continue
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32"
                if value % 16 == 0 and name not in self.kernel.do_not_specialize:
                    attributes[(i,)] = [["tt.divisibility", 16]]
        constants = {name: values[name] for name, kind in signature.items() if kind == "constexpr"}
        source = triton.compiler.ASTSource(
            fn=self.kernel, signature=signature, constexprs=constants, attrs=attributes
        )
        capability = int(self.target.removeprefix("sm_"))
        log = io.StringIO()
        with contextlib.redirect_stdout(log):  # where dump_ptxas_log goes
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        notes = {"serialized": "wgmma.mma_async instructions are serialized" in log.getvalue()}
        self.results.append({"target": self.target, **self.label, **inspect(compiled), **notes})


def inspect(compiled: Any) -> dict[str, Any]:
    """Registers, spilled bytes, shared memory and the instructions that tell the path."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        code = subprocess.run(
            [TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True
        )
    resources = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage.stdout)
    assert resources is not None, usage.stdout
    registers, stack, local = map(int, resources.groups())
    operations = Counter(
        re.findall(r"^\s*(?:/\*\w+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z]\w*)", code.stdout, re.MULTILINE)
    )
    return {
        "registers": registers,
        "spilled": stack + local,
        "shared": compiled.metadata.shared,
        "operations": {
            name: operations[name]
            for name in ("HGMMA", "IGMMA", "HMMA", "IMMA", "LDSM", "UTMALDG", "LDL", "STL", "I2F")
            if operations[name]
        },
    }


def weights(kind: str, group: int, sub: bool, minimum: bool, n: int = 256, k: int = 512) -> GpuMatrix:
    blocks, groups = k // 128, k // group if group else 1
    coarse = k // 256 if sub else groups
    extra = {"u5": 1, "u6": 2}.get(kind)
    return GpuMatrix(
        kind,
        n,
        k,
        group,
        0 if minimum or kind == "i8" else 8,
        torch.zeros(blocks, n, 64 if kind == "i8" else 32, dtype=torch.int16),
        torch.zeros(blocks * extra // 4, n, 32, dtype=torch.int16) if extra else None,
        torch.zeros(coarse, n, dtype=torch.float16),
        torch.zeros(groups, n, dtype=torch.int8) if sub else None,
        torch.zeros(coarse, n, dtype=torch.float16) if minimum else None,
        torch.zeros(groups, n, dtype=torch.uint8) if sub and minimum else None,
    )


# What files hold (Q4_0, Q4_1, Q4_K, Q5_K, Q6_K, Q8_0, IQ4_XS), and what our quantizer makes.
LAYOUTS = {
    "u4 g128": ("u4", 128, False, False),
    "u4 g32": ("u4", 32, False, False),
    "u4 g32 min": ("u4", 32, False, True),
    "u4 g32 sub min": ("u4", 32, True, True),
    "u5 g32 sub min": ("u5", 32, True, True),
    "u6 g16 sub": ("u6", 16, True, False),
    "i8 g32": ("i8", 32, False, False),
    "i8 row": ("i8", 0, False, False),
}


def jobs(target: str) -> Iterator[tuple[str, str, int, Tile, torch.dtype]]:
    """(path, layout, M, tile, dtype): every tile with its own layout, the other layouts with a few."""
    tiles = table(target).tiles
    for kind, layout_name in (("u4", "u4 g128"), ("i8", "i8 row")):
        for m, tile in tiles[kind]:
            yield "weight_only", layout_name, m, tile, torch.bfloat16
    for m, tile in tiles["int8"]:
        yield "int8", "i8 row", m, tile, torch.bfloat16
    yield "int8", "i8 g32", 64, tiles["int8"][1][1], torch.float16
    for layout_name, description in LAYOUTS.items():
        choices = tiles[weights(*description).tile_kind]
        for m, tile in choices if layout_name == "u4 g32 sub min" else (choices[0], choices[-1]):
            yield "weight_only", layout_name, m, tile, torch.float16


KERNELS = {
    activation: ("activation_kernel",),
    attention: ("attention_kernel",),
    dense: ("dense_kernel",),
    embedding: ("embedding_kernel",),
    heads: ("prepare_heads_kernel",),
    low_rank: ("shrink_kernel", "expand_kernel"),
    norm: ("norm_kernel",),
    sampler: (
        *("stats_kernel", "count_kernel", "edit_kernel", "bound_kernel", "gather_kernel", "choose_kernel"),
        *("sift_kernel", "rank_kernel"),
    ),
    products: ("weight_only_kernel", "int8_kernel", "quantize_rows_kernel", "dequantize_kernel"),
}


def record(target: str, results: list[dict[str, Any]]) -> list[Recorder]:
    """Puts recorders in the place of all kernels."""
    recorders = []
    for module, names in KERNELS.items():
        for name in names:
            kernel = getattr(module, name)
            plain = kernel.kernel if isinstance(kernel, Recorder) else kernel
            recorders.append(Recorder(plain, target, results))
            setattr(module, name, recorders[-1])
    products._overlaps = lambda _: target >= "sm_90"  # type: ignore[assignment]
    return recorders


def compile_products(target: str, recorders: list[Recorder], everything: bool) -> None:
    part = slice(None) if everything else {"sm_80": slice(0, None, 2), "sm_89": slice(1, None, 2)}.get(target)
    for path, layout_name, m, tile, dtype in list(dict.fromkeys(jobs(target)))[part or slice(None)]:
        w = weights(*LAYOUTS[layout_name])
        label = {"path": path, "layout": layout_name, "m": m, "tile": list(tile), "dtype": str(dtype)}
        for recorder in recorders:
            recorder.label = label
        if path == "int8":
            q, scale = torch.zeros(m, 512, dtype=torch.int8), torch.zeros(m)
            products.int8(q, scale, w, None, None, False, dtype, tile)
        else:
            x = torch.zeros(m, 512, dtype=dtype)
            products.weight_only(x, w, None, None, False, tile)
    for m in (1, 64, 512):
        for recorder in recorders:
            recorder.label = {"path": "dense", "layout": "", "m": m, "tile": [], "dtype": "torch.bfloat16"}
        x, plain = torch.zeros(m, 512, dtype=torch.bfloat16), torch.zeros(256, 512, dtype=torch.bfloat16)
        dense.dense(x, plain, out=torch.zeros(m, 256))


def compile_others(recorders: list[Recorder]) -> None:
    for recorder in recorders:
        recorder.label = {"path": "others", "layout": "", "m": 1, "tile": [], "dtype": "torch.bfloat16"}
    bf16 = torch.bfloat16
    x, vector, row = torch.zeros(2, 8192, dtype=bf16), torch.zeros(8192), torch.zeros(1, dtype=torch.int32)
    packed = weights(*LAYOUTS["u4 g32 sub min"])
    products.quantize_rows(x, vector, 1e-5)
    products.dequantize(packed, bf16)
    norm.norm(x, vector, None, x, 1e-5, layer=False)
    norm.norm(x, vector, vector, None, 1e-5, layer=True)
    for kind in ("silu", "gelu", "gelu_tanh"):
        activation.activation(x, kind, gated=True)
    for matrix in (x, packed, weights(*LAYOUTS["u6 g16 sub"]), weights(*LAYOUTS["i8 g32"])):
        embedding.embedding(row, row, row, matrix, None, 1.5, bf16)
    for kind, scales in ((bf16, None), (torch.int8, torch.zeros(4, 8, 16))):
        for d in (64, 80, 128, 256):
            cache = torch.zeros(4, 8, 16, d, dtype=kind)
            qkv, table = torch.zeros(1, 48 * d, dtype=bf16), torch.zeros(64, d // 2)
            layer = heads.LayerCache(cache, cache, scales, scales)
            heads.prepare_heads(qkv, vector, vector, table, table, row, row, layer, 1e-5, 32)
    for rank in (16, 64, 256):
        a, b = torch.zeros(4, rank, 8192, dtype=bf16), torch.zeros(4, 256, rank, dtype=bf16)
        low_rank.add_low_rank(x[:1], row, a, b, torch.zeros(4), torch.zeros(1, 256, dtype=bf16))


# (head dim, cache, deterministic, window and soft-cap): what models have; the rest with `everything`.
ATTENTION = (
    (64, torch.bfloat16, False, False),
    (128, torch.bfloat16, False, False),
    (128, torch.int8, False, False),
    (128, torch.bfloat16, True, True),
)
MORE_ATTENTION = tuple(
    (d, kind, deterministic, special)
    for d in (64, 80, 96, 128, 256)
    for kind in (torch.bfloat16, torch.float16, torch.int8)
    for deterministic in (False, True)
    for special in (False, True)
)


def compile_attention(target: str, recorders: list[Recorder], everything: bool) -> None:
    """Both lists, in the tiles of the architecture: decodes beside a long prompt."""
    starts, lengths = np.array([0, 1, 257], np.int32), np.array([900, 300], np.int32)
    few = ATTENTION if target == "sm_90" else ATTENTION[1:2]
    for d, kind, deterministic, special in MORE_ATTENTION if everything else few:
        dtype = torch.float16 if kind == torch.float16 else torch.bfloat16
        for recorder in recorders:
            recorder.label = {
                "path": "attention", "layout": f"{d} {kind}", "m": 257, "tile": [], "dtype": str(dtype),
                "deterministic": deterministic, "special": special,
            }  # fmt: skip
        plan = plan_attention(
            starts, lengths, tiles=attention.tiles_of(target, d, dtype, kind), group=4, kv_heads=8,
            multiprocessors=100, table_width=64, window=200 if special else 0, deterministic=deterministic,
        )  # fmt: skip
        items = attention.to_device(plan, torch.device("cpu"), head_dim=d)
        cache = torch.zeros(4, 8, 16, d, dtype=kind)
        scales = torch.zeros(4, 8, 16) if kind == torch.int8 else None
        q, table = torch.zeros(257, 32, d, dtype=dtype), torch.zeros(128, dtype=torch.int32)
        softcap = 30.0 if special else 0.0
        attention.launch_attention(
            q, cache, cache, table, items, torch.empty_like(q), d**-0.5, softcap, scales, scales
        )


def compile_sampler(recorders: list[Recorder], vocabulary: int) -> None:
    for recorder in recorders:
        recorder.label = {"path": "others", "layout": "", "m": 2, "tile": [], "dtype": "torch.float32"}
    words = -(-vocabulary // 32)
    ints, floats = torch.zeros(4, dtype=torch.int32), torch.zeros(4)
    of = {field.name: ints for field in dataclasses.fields(sampler.SampleRows)}
    for name in ("temperature", "top_p", "min_p", "presence", "frequency", "repetition", "bias_values"):
        of[name] = floats
    of |= {"seed": ints.long(), "mask_words": torch.zeros(1, words, dtype=torch.int32)}
    sampler.launch(
        torch.zeros(2, vocabulary),
        sampler.SampleRows(**of),
        sampler.SampleOutputs.allocate(2, 20, "cpu"),
        sampler.SamplerScratch.allocate(2, vocabulary, "cpu"),
    )


def main() -> None:
    everything = os.environ.get("FASTLLM_TEST_PROFILE") == "full"
    triton.knobs.nvidia.dump_ptxas_log = True
    for target in sys.argv[1:]:
        results: list[dict[str, Any]] = []
        recorders = record(target, results)
        compile_products(target, recorders, everything)
        compile_attention(target, recorders, everything)
        if everything or target == "sm_90":
            compile_others(recorders)
            for vocabulary in (50257, 128256, 262208) if everything else (128256,):
                compile_sampler(recorders, vocabulary)
        for result in results:
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
