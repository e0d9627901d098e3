"""The model files of the benchmarks, each made once under build/bench/models/ and then kept.

    python bench/models.py [NAME ...]        makes them, or all, and says where they are

smollm2-*: the default model, as shipped (Q4_1) or requantized by llama.cpp's llama-quantize. 30m-* to 1b-*:
random weights in shapes of so many parameters, the "1B" shape that of make_model.py; Q4_0 and Q4_1 with a
Q8_0 head directly, the others by llama-quantize from one F16 file with the same values. NAME-bf16 is a
directory of safetensors with the values of that file, for programs that read no GGUF; `transformers` writes
it. NAME-onnx is made from that by ONNX Runtime GenAI's model builder, which quantizes anew, to int4 in
blocks of 32.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import machine
import peers

FOLDER = machine.ROOT / "build" / "bench" / "models"

# Random models: their sizes as options of make_model.py. 135m and 360m are SmolLM2's, with a longer context.
SHAPES: dict[str, str] = {
    "30m": "--dim 384 --layers 7 --heads 6 --kv-heads 2 --ffn 1024 --context 65536",
    "135m": "--dim 576 --layers 30 --heads 9 --kv-heads 3 --ffn 1536 --context 65536",
    "360m": "--dim 960 --layers 32 --heads 15 --kv-heads 5 --ffn 2560 --context 65536",
    "1b": "",
}

_EXPORT = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
source, out = Path(sys.argv[1]), sys.argv[2]
where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).to(torch.bfloat16)
model.hf_quantizer = None  # the values are plain by now, but it takes the model for a quantized one
if hasattr(model.config, "quantization_config"):
    del model.config.quantization_config
model.save_pretrained(out)
AutoTokenizer.from_pretrained(**where).save_pretrained(out)
"""


def path(name: str) -> Path:
    """The model of that name, made if it is not there yet.

    Raises:
        SystemExit: a program that is needed for it is not installed.
    """
    if name == "smollm2-q4_1":
        from fastllm.formats.source import DEFAULT_MODEL, resolve

        return resolve(DEFAULT_MODEL)
    made = FOLDER / (name if name.endswith(("-bf16", "-onnx")) else name + ".gguf")
    if not made.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        partial = made.with_name("part-" + made.name)
        _recipe(name)(partial)
        partial.replace(made)
    return made


def _recipe(name: str) -> Callable[[Path], None]:
    source, _, kind = name.rpartition("-")
    if kind == "bf16":
        return lambda out: _export(path(source), out)
    if kind == "onnx":
        return lambda out: _build_onnx(path(source + "-bf16"), out)
    family, _, kind = name.partition("-")
    if family == "smollm2":
        return lambda out: _quantize(path("smollm2-q4_1"), out, kind)
    if family not in SHAPES:
        raise SystemExit(f"no such model: {name}; there are {', '.join(NAMES)}")
    if kind in ("q4_0", "q4_1"):
        return lambda out: _random(out, family, kind.upper(), "Q8_0")
    if kind == "f16":
        return lambda out: _random(out, family, "F16", "F16")
    return lambda out: _quantize(path(f"{family}-f16"), out, kind)


def _random(out: Path, family: str, kind: str, head: str) -> None:
    script = machine.ROOT / "bench" / "make_model.py"
    command = [sys.executable, str(script), str(out), "--type", kind, "--head-type", head]
    subprocess.run([*command, "--name", family.upper(), *SHAPES[family].split()], check=True)


def _quantize(source: Path, out: Path, kind: str) -> None:
    program = peers.llama("llama-quantize")
    if not program.exists():
        raise SystemExit(f"{out.name}: needs llama-quantize: python bench/peers.py install llama.cpp")
    command = [str(program), "--allow-requantize", str(source), str(out), kind.upper()]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _export(source: Path, out: Path) -> None:
    if peers.installed("transformers") is None:
        raise SystemExit(f"{out.name}: needs python bench/peers.py install transformers")
    python = peers.python_of("transformers")
    subprocess.run([str(python), "-c", _EXPORT, str(source), str(out)], check=True)


def _build_onnx(source: Path, out: Path) -> None:
    if peers.installed("onnxruntime") is None:
        raise SystemExit(f"{out.name}: needs python bench/peers.py install onnxruntime")
    command = [str(peers.python_of("onnxruntime")), "-m", "onnxruntime_genai.models.builder"]
    options = ["-i", str(source), "-o", str(out), "-p", "int4", "-e", "cpu", "-c", str(FOLDER / "onnx-cache")]
    subprocess.run([*command, *options, "--extra_options", "int4_block_size=32"], check=True)


NAMES = (
    *("smollm2-q4_1", "smollm2-q4_0", "smollm2-q4_0-bf16", "smollm2-q4_0-onnx"),
    *("30m-q4_0", "135m-q4_0", "360m-q4_0"),
    *("1b-q4_0", "1b-q4_1", "1b-q4_k_m", "1b-q5_k_m", "1b-q6_k", "1b-q8_0", "1b-f16"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", nargs="*", help=", ".join(NAMES))
    for name in parser.parse_args().name or NAMES:
        print(f"{name}: {path(name)}", flush=True)


if __name__ == "__main__":
    main()
