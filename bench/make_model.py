"""Writes a GGUF file of any llama-like shape with random weights: what speed is measured on, at any size.

    python bench/make_model.py OUT.gguf              the "1B" shape, Q4_0 with a Q8_0 head: 656 MB
    python bench/make_model.py OUT.gguf --dim 576 --layers 30 --heads 9 --kv-heads 3 --ffn 1536
    python bench/make_model.py OUT.gguf --type F16 --head-type F16       for llama-quantize, into K-quants

Types: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0 and Q5_1 by the gguf package, Q4_K, Q5_K and Q6_K by
k_quants.py, less carefully than llama.cpp does. For these as llama.cpp makes them, and for all others, write
F16 and let llama-quantize make them; the values are the same, since a tensor's values depend on the seed and
on its name alone.

The weights are normal with a standard deviation of 1/sqrt(inputs), times 1/sqrt(2 layers) where a block
writes to the residual stream, and norms are near 1: activations keep the size that they have in trained
models, attention scores and logits have a deviation near 1, or --score-deviation and --logit-deviation. The
tokenizer is the default model's or that of --tokenizer, cut or filled up to --vocab. Tensors are made and
written one by one; the memory is that of the largest one, twice.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import k_quants
import numpy as np
import numpy.typing as npt

CHUNK = 1 << 22  # values that are drawn and quantized at once
KINDS = ("embed", "q", "k", "v", "o", "gate", "up", "down", "head")


@dataclass(frozen=True)
class Shape:
    """Sizes of the decoder; the default is the "1B" shape.

    Attributes:
        score_deviation, logit_deviation: standard deviation of attention scores and logits, about. At 1 both
            distributions are nearly flat; in trained models it is 2 to 4.
    """

    dim: int = 2048
    layers: int = 16
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 64
    ffn: int = 8192
    vocab: int = 49152
    context: int = 32768
    tied: bool = True
    rope_base: float = 100000.0
    score_deviation: float = 1.0
    logit_deviation: float = 1.0


@dataclass(frozen=True)
class Tensor:
    """name in the file, kind (one of KINDS or "norm"), rows (0: a vector), columns; deviation and mean."""

    name: str
    kind: str
    rows: int
    cols: int
    deviation: float
    mean: float = 0.0


def tensors(shape: Shape) -> Iterator[Tensor]:
    """All tensors in the order of the file."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    into_residual = (2 * shape.layers) ** -0.5
    yield Tensor("token_embd.weight", "embed", shape.vocab, shape.dim, shape.dim**-0.5)
    for layer in range(shape.layers):
        prefix = f"blk.{layer}."
        yield Tensor(prefix + "attn_norm.weight", "norm", 0, shape.dim, 0.02, 1.0)
        for name, kind, rows, cols, factor in (
            ("attn_q", "q", q, shape.dim, shape.score_deviation),
            ("attn_k", "k", kv, shape.dim, 1.0),
            ("attn_v", "v", kv, shape.dim, 1.0),
            ("attn_output", "o", shape.dim, q, into_residual),
            ("ffn_gate", "gate", shape.ffn, shape.dim, 1.0),
            ("ffn_up", "up", shape.ffn, shape.dim, 1.0),
            ("ffn_down", "down", shape.dim, shape.ffn, into_residual),
        ):
            yield Tensor(f"{prefix}{name}.weight", kind, rows, cols, factor * cols**-0.5)
        yield Tensor(prefix + "ffn_norm.weight", "norm", 0, shape.dim, 0.02, 1.0)
    gain = shape.logit_deviation
    yield Tensor("output_norm.weight", "norm", 0, shape.dim, 0.02 * gain, gain)
    if not shape.tied:
        yield Tensor("output.weight", "head", shape.vocab, shape.dim, shape.dim**-0.5)


def make(tensor: Tensor, kind: gguf.GGMLQuantizationType, seed: int) -> npt.NDArray[Any]:
    """The tensor's values in its type: floats (rows, cols) or (cols,), or the blocks' bytes."""
    stream = np.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
    if not tensor.rows:
        return tensor.mean + tensor.deviation * stream.standard_normal(tensor.cols, np.float32)
    parts = []
    step = max(CHUNK // tensor.cols, 1)
    for first in range(0, tensor.rows, step):
        count = min(step, tensor.rows - first)
        values = stream.standard_normal((count, tensor.cols), np.float32)
        values *= np.float32(tensor.deviation)
        if kind.name in k_quants.TYPES:
            parts.append(k_quants.quantize(values, kind.name))
        else:
            parts.append(gguf.quants.quantize(values, kind))
    return np.concatenate(parts)


# -- tokenizer -----------------------------------------------------------------------------------------------


def tokenizer_fields(source: Path, vocab: int) -> dict[str, tuple[Any, gguf.GGUFValueType, Any]]:
    """The tokenizer of a GGUF file as key -> (value, type, element type), for so many tokens."""
    fields: dict[str, tuple[Any, gguf.GGUFValueType, Any]] = {}
    for key, field in gguf.GGUFReader(source).fields.items():
        if key.startswith("tokenizer."):
            fields[key] = (field.contents(), field.types[0], field.types[-1])
    tokens = list(fields["tokenizer.ggml.tokens"][0])
    kept = tokens[:vocab] + [f"<|unused_{i}|>" for i in range(len(tokens), vocab)]
    known = set(kept)

    def replace(key: str, value: list[Any]) -> None:
        if key in fields:
            fields[key] = (value, *fields[key][1:])

    replace("tokenizer.ggml.tokens", kept)
    for key, filler in (
        ("tokenizer.ggml.token_type", int(gguf.TokenType.UNUSED)),
        ("tokenizer.ggml.scores", 0.0),
    ):
        if key in fields:
            replace(key, list(fields[key][0])[:vocab] + [filler] * (vocab - len(tokens)))
    if "tokenizer.ggml.merges" in fields:  # those whose parts and result are still there
        merges = [pair for pair in fields["tokenizer.ggml.merges"][0] if _joins(pair, known)]
        replace("tokenizer.ggml.merges", merges)
    for key in [key for key in fields if key.endswith("_token_id") and fields[key][0] >= vocab]:
        del fields[key]
    return fields


def _joins(pair: str, known: set[str]) -> bool:
    left, _, right = pair.partition(" ")
    return left in known and right in known and left + right in known


# -- the file ------------------------------------------------------------------------------------------------


def write(
    path: Path, shape: Shape, types: Mapping[str, str], seed: int, tokenizer: Path | None, name: str
) -> None:
    """One GGUF file, with the tokenizer of another one or none. It takes its name once it is complete."""
    partial = path.with_name(path.name + ".part")
    writer = gguf.GGUFWriter(partial, "llama")
    writer.add_name(name)
    writer.add_description(f"random weights, seed {seed}")
    writer.add_vocab_size(shape.vocab)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.dim)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(1e-5)
    metadata = tokenizer_fields(tokenizer, shape.vocab) if tokenizer else {}
    for key, (value, value_type, element) in metadata.items():
        is_array = value_type is gguf.GGUFValueType.ARRAY
        writer.add_key_value(key, value, value_type, element if is_array else None)

    listed = [(tensor, gguf.GGMLQuantizationType[types.get(tensor.kind, "F32")]) for tensor in tensors(shape)]
    for tensor, kind in listed:
        size = (tensor.rows, tensor.cols) if tensor.rows else (tensor.cols,)
        block, width = gguf.GGML_QUANT_SIZES[kind]
        if tensor.cols % block:
            raise SystemExit(f"{tensor.name}: {tensor.cols} columns are no multiple of {kind.name}'s {block}")
        writer.add_tensor_info(
            tensor.name, size, np.dtype(np.float32), int(np.prod(size)) // block * width, raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, kind in listed:
        writer.write_tensor_data(make(tensor, kind, seed))
    writer.close()
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    for name in ("dim", "layers", "heads", "kv_heads", "head_dim", "ffn", "vocab", "context"):
        default = getattr(Shape, name)
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default, help=f"({default})")
    for name in ("rope_base", "score_deviation", "logit_deviation"):
        default = getattr(Shape, name)
        parser.add_argument("--" + name.replace("_", "-"), type=float, default=default, help=f"({default:g})")
    parser.add_argument("--untied", action="store_true", help="a head of its own, not the embedding")
    parser.add_argument("--type", default="Q4_0", help="of all matrices but the next two (Q4_0)")
    parser.add_argument("--head-type", default="Q8_0", help="of the head and of a tied embedding (Q8_0)")
    parser.add_argument("--embed-type", help="of the embedding of an untied model; otherwise the head's")
    parser.add_argument(
        "--types",
        default="{}",
        help="JSON, kind -> type, over the others; kinds: " + ", ".join(KINDS),
    )
    parser.add_argument("--tokenizer", help="a GGUF file or model reference; otherwise the default model")
    parser.add_argument("--name", default="random")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    from fastllm.formats.source import DEFAULT_MODEL, resolve

    sizes = {field.name for field in dataclasses.fields(Shape)} - {"tied"}
    shape = Shape(**{name: getattr(options, name) for name in sizes}, tied=not options.untied)
    types = dict.fromkeys(KINDS, options.type)
    types["head"] = types["embed"] = options.head_type
    if options.embed_type and options.untied:
        types["embed"] = options.embed_type
    types.update(json.loads(options.types))
    if unknown := set(types) - set(KINDS):
        parser.error(f"--types: no such kind: {', '.join(sorted(unknown))}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = resolve(options.tokenizer or DEFAULT_MODEL)
    write(options.out, shape, types, options.seed, tokenizer, options.name)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
