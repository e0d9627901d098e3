"""Compiles the Triton kernels ahead of time, without a GPU, and reports what the compiler made of them.

    python tests/compile_gpu_kernels.py sm_90 [sm_89 ...]     a line of JSON for each kernel

Every tile of an architecture's table, for every kind of weights, through the launching code itself: the
kernels are replaced by recorders, which compile what they are called with.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.tools.tensor_descriptor import TensorDescriptor

from fastllm.kernels import products
from fastllm.kernels.layout import GpuMatrix
from fastllm.kernels.tiles import Tile, table

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "launch_pdl")


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
            elif name not in named and name != "eps":
                signature[name] = "i32"
                if value % 16 == 0 and name != "M":
                    attributes[(i,)] = [["tt.divisibility", 16]]
            elif name == "eps":
                signature[name] = "fp32"
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


def main() -> None:
    triton.knobs.nvidia.dump_ptxas_log = True
    for target in sys.argv[1:]:
        results: list[dict[str, Any]] = []
        recorders = {}
        for name in ("weight_only_kernel", "int8_kernel", "quantize_rows_kernel", "dequantize_kernel"):
            kernel = getattr(products, name)
            recorders[name] = Recorder(
                kernel.kernel if isinstance(kernel, Recorder) else kernel, target, results
            )
            setattr(products, name, recorders[name])
        products._overlaps = lambda _, target=target: target >= "sm_90"  # type: ignore[assignment]
        for path, layout_name, m, tile, dtype in dict.fromkeys(jobs(target)):
            w = weights(*LAYOUTS[layout_name])
            label = {"path": path, "layout": layout_name, "m": m, "tile": list(tile), "dtype": str(dtype)}
            for recorder in recorders.values():
                recorder.label = label
            if path == "int8":
                q, scale = torch.zeros(m, 512, dtype=torch.int8), torch.zeros(m)
                products.int8(q, scale, w, None, None, False, dtype, tile)
            else:
                x = torch.zeros(m, 512, dtype=dtype)
                products.weight_only(x, w, None, None, False, tile)
        for recorder in recorders.values():
            recorder.label = {"path": "others", "layout": "", "m": 1, "tile": [], "dtype": "torch.bfloat16"}
        products.quantize_rows(torch.zeros(2, 8192, dtype=torch.bfloat16), torch.zeros(8192), 1e-5)
        products.dequantize(weights(*LAYOUTS["u4 g32 sub min"]), torch.bfloat16)
        for result in results:
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
