"""Tiny random checkpoints of every architecture, complete with a tokenizer, made in well under a second each.

`make_model` gives a `transformers` model with random weights; `save_hf` and `save_gguf` write it down as a
user would find it; `logits` runs it. Writing in a format that rounds weights leaves the model with the
rounded ones, so that the model always is what the file says. Names and row orders of GGUF files come from the
`gguf` package and from the description of llama.cpp's converter, never from fastllm's own tables.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import tokenizers
import torch
import transformers
from random_blocks import random_blocks

torch.set_num_threads(1)  # these models are too small for more, and tests share the machine

VOCAB_SIZE = 300
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
WIDE: dict[str, Any] = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512}
"""Overrides that make every matrix's rows a multiple of 256, as the K-quants need."""

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 50000.0, "factor": 2.5}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 32, "num_key_value_heads": 1}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": ("llama", {"rope_parameters": LINEAR_ROPE}),
    "mistral": ("mistral", {"sliding_window": 7}),
    "mistral-full": ("mistral", {"sliding_window": None, "num_key_value_heads": 4}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-tied": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-biased": ("qwen3", {"head_dim": 32, "attention_bias": True}),
}
"""name -> (transformers model type, overrides of SIZES)."""

GGUF_VARIANTS = tuple(name for name in VARIANTS if name != "qwen2-sliding")
"""Those that a GGUF file can express."""

_GGUF_ARCH = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}

_NOT_MADE_BY_GGUF = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")


def make_model(variant: str = "llama", *, seed: int = 0, **overrides: Any) -> Any:
    """A `transformers` model in float32 with weights large enough for every part to matter."""
    kind, own = VARIANTS[variant]
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **own, **overrides})
    return randomize(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"), seed)


def randomize(model: Any, seed: int = 0) -> Any:
    """Gives a model random weights: matrices of standard deviation 1 / sqrt(inputs), norms around what they
    are."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "embed" in name or "wte" in name or "wpe" in name:
                weight.copy_(0.25 * noise)
            elif weight.ndim == 2:
                gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
                weight.copy_(gain * noise / weight.shape[1] ** 0.5)
            elif "norm" in name or "ln_" in name:
                weight.add_(0.2 * noise)
            else:
                weight.copy_(0.5 * noise)
    return model.eval()


def gguf_architecture(variant: str) -> str:
    """`general.architecture` of a variant's GGUF file."""
    return gguf.MODEL_ARCH_NAMES[_GGUF_ARCH[VARIANTS[variant][0]]]


def tokens(count: int, *, seed: int = 0) -> list[int]:
    """Random token ids that every tiny model knows."""
    return [int(t) for t in np.random.default_rng(seed).integers(3, 259, count)]


def logits(model: Any, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
    """What `transformers` computes for one sequence, (T, vocab_size)."""
    with torch.no_grad():
        return model(torch.tensor([list(token_ids)]), use_cache=False).logits[0].numpy()


# Writing


def write(kind: str, path: Path, variant: str = "llama", **metadata: Any) -> Path:
    """Writes a checkpoint of either kind into a directory, see `save_gguf`."""
    model = make_model(variant)
    if kind == "gguf":
        return save_gguf(model, path / "model.gguf", **metadata)
    return save_hf(model, path)


def save_hf(model: Any, path: Path, *, dtype: torch.dtype = torch.float32, shard_size: str = "1GB") -> Path:
    """Writes a directory with config.json, safetensors (in shards of at most `shard_size`) and a
    tokenizer."""
    # A copy: converting the model itself would round its rotary frequencies too, which no file holds.
    copy.deepcopy(model).to(dtype).save_pretrained(path, max_shard_size=shard_size)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(dtype))
    save_tokenizer(path)
    return path


def save_gguf(model: Any, path: Path, *, dtype: str = "F32", seed: int = 0, **metadata: Any) -> Path:
    """Writes a GGUF file with matrices of one ggml type, norms and biases in F32.

    Types that the `gguf` package cannot make get random blocks instead of the model's weights.

    Args:
        metadata: further key-value pairs, named without their architecture; they replace those that the model
            calls for.
    """
    config = model.config
    arch = _GGUF_ARCH[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_type(gguf.GGUFType.MODEL)
    for key, value in (_gguf_metadata(config) | metadata).items():
        _add_value(writer, f"{gguf.MODEL_ARCH_NAMES[arch]}.{key}", value)
    _add_gguf_tokenizer(writer, config.vocab_size)

    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    quantized = gguf.GGMLQuantizationType[dtype]
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():  # a tied head is not among them
            heads = _permuted_heads(name, config) if arch == gguf.MODEL_ARCH.LLAMA else 0
            values = interleave(weight.numpy(), heads) if heads else weight.numpy()
            gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if values.ndim == 1:
                writer.add_tensor(gguf_name, values)
                continue
            if dtype in _NOT_MADE_BY_GGUF:
                data = random_blocks(dtype, *values.shape, rng=rng, std=float(values.std()))
            else:
                data = gguf.quants.quantize(values, quantized)
            values = gguf.quants.dequantize(data, quantized)
            weight.copy_(torch.from_numpy(deinterleave(values, heads) if heads else values.copy()))
            writer.add_tensor(gguf_name, data, raw_dtype=quantized)
    if (factors := _rope_factors(model)) is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_metadata(config: Any) -> dict[str, Any]:
    """Hyperparameters as llama.cpp's converter writes them."""
    rope = config.rope_parameters
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": head_dim,
    }
    if head_dim * config.num_attention_heads != config.hidden_size:
        values |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if rope["rope_type"] == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if config.model_type == "mistral" and config.sliding_window:
        values |= {"attention.sliding_window": config.sliding_window}
    return values


def _add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {
        bool: gguf.GGUFValueType.BOOL,
        int: gguf.GGUFValueType.UINT32,
        float: gguf.GGUFValueType.FLOAT32,
        str: gguf.GGUFValueType.STRING,
        list: gguf.GGUFValueType.ARRAY,
    }
    writer.add_key_value(key, value, kinds[type(value)])


def _rope_factors(model: Any) -> npt.NDArray[np.float32] | None:
    """Plain frequencies over those that `transformers` uses, where Llama 3's scaling makes them differ."""
    rope = model.config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    used = model.model.rotary_emb.inv_freq.numpy().astype(np.float64)
    plain = rope["rope_theta"] ** (-np.arange(used.size) / used.size)
    return (plain / used).astype(np.float32)


def _permuted_heads(name: str, config: Any) -> int:
    """The number of heads in q and k projections, 0 for everything else."""
    if "q_proj" in name:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if "k_proj" in name else 0


def interleave(weight: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Rows of a head from (first half, second half) to neighbouring pairs, as llama.cpp's converter does."""
    half = weight.shape[0] // heads // 2
    paired = weight.reshape(heads, 2, half, *weight.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(paired.reshape(weight.shape))


def deinterleave(weight: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    half = weight.shape[0] // heads // 2
    split = weight.reshape(heads, half, 2, *weight.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(split.reshape(weight.shape))


# Tokenizer: byte-level BPE with a few merges

SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>")
MERGES = (("Ġ", "t"), ("h", "e"), ("i", "n"), ("Ġt", "he"), ("e", "r"), ("Ġ", "a"), ("o", "u"), ("in", "g"))
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def vocabulary() -> list[str]:
    """Tokens by id: special ones, the 256 bytes, what the merges make."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    return [*SPECIAL_TOKENS, *alphabet, *(first + second for first, second in MERGES)]


def save_tokenizer(path: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json into a model directory."""
    ids = {token: i for i, token in enumerate(vocabulary())}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=ids, merges=list(MERGES)))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[1],
        "pad_token": SPECIAL_TOKENS[2],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def _add_gguf_tokenizer(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    known = vocabulary()
    unused = [f"<|unused{i}|>" for i in range(len(known), vocab_size)]
    special, normal = len(SPECIAL_TOKENS), len(known) - len(SPECIAL_TOKENS)
    kinds = [gguf.TokenType.CONTROL] * special + [gguf.TokenType.NORMAL] * normal
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(known + unused)
    writer.add_token_types(kinds + [gguf.TokenType.UNUSED] * len(unused))
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
