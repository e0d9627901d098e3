"""From checkpoints to specs and slots: the registry, hyperparameters, shapes, and the errors on the way."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import memory_checkpoint
import numpy as np
import pytest
import tiny
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import fastllm.models
from fastllm.errors import ModelFileError, UnsupportedModelError
from fastllm.formats.checkpoint import Fields, open_checkpoint
from fastllm.models.loader import iter_tensors
from fastllm.models.registry import ARCHITECTURES, spec_from_checkpoint
from fastllm.models.rope import llama3_factors
from fastllm.models.slots import decoder_slots, sizes
from fastllm.models.spec import DecoderSpec

SPEC: dict[str, Any] = {
    "architecture": "test",
    "vocab_size": 300,
    "dim": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "ffn_dim": 96,
    "context_length": 256,
    "norm_eps": 1e-6,
    "rotary_dim": 16,
}
"""The least that a spec needs."""


def hf_config(config: dict[str, Any]) -> memory_checkpoint.MemoryCheckpoint:
    """A model directory of which only the configuration matters."""
    return memory_checkpoint.MemoryCheckpoint("hf", Path("m"), Fields("m/config.json", config), {})


# The registry


def variants() -> list[tuple[str, str]]:
    return [("hf", v) for v in tiny.VARIANTS] + [("gguf", v) for v in tiny.GGUF_VARIANTS]


@pytest.mark.parametrize(("kind", "variant"), variants())
def test_every_variant_fills_every_slot(kind: str, variant: str, tmp_path: Path) -> None:
    with open_checkpoint(tiny.write(kind, tmp_path, variant)) as checkpoint:
        assert checkpoint.kind == kind
        spec = spec_from_checkpoint(checkpoint)
        filled: dict[tuple[str, int], tuple[int, ...]] = {}
        for slot, layer, tensor, row_order in iter_tensors(checkpoint, spec):
            assert (slot, layer) not in filled
            filled[slot, layer] = tuple(tensor.shape)
            assert row_order is None or sorted(row_order) == list(range(tensor.shape[0]))
    if spec.rope_factors:
        assert filled.pop(("rope_factors", -1)) == (spec.rotary_dim // 2,)
    value = sizes(spec)
    assert filled == {
        (slot.name, layer): tuple(value[symbol] for symbol in slot.shape)
        for slot in decoder_slots(spec)
        for layer in (range(spec.num_layers) if slot.per_layer else (-1,))
    }


@pytest.mark.parametrize("variant", tiny.GGUF_VARIANTS)
def test_both_kinds_of_checkpoint_give_one_spec(variant: str, tmp_path: Path) -> None:
    specs = []
    for kind in ("gguf", "hf"):
        with open_checkpoint(tiny.write(kind, tmp_path, variant)) as checkpoint:
            plain = spec_from_checkpoint(checkpoint).as_dict()
        plain.pop("qk_row_order")
        for rounded in ("norm_eps", "rope_factors"):  # GGUF keeps float32
            plain[rounded] = np.float32(plain[rounded]).tolist()
        specs.append(plain)
    factors = [spec.pop("rope_factors") for spec in specs]
    assert specs[0] == specs[1]
    np.testing.assert_allclose(factors[0], factors[1], rtol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_every_entry_is_small_and_has_tiny_checkpoints(architecture: Any) -> None:
    file = Path(fastllm.models.__file__).parent / f"{architecture.name}.py"
    assert len(file.read_text().splitlines()) < 90
    tested = {type(tiny.make_model(variant)).__name__ for variant in tiny.VARIANTS}
    assert set(architecture.hf) <= tested
    assert set(architecture.gguf) <= {tiny.gguf_architecture(variant) for variant in tiny.GGUF_VARIANTS}


def test_names_belong_to_one_entry() -> None:
    for names in ([n for a in ARCHITECTURES for n in a.gguf], [n for a in ARCHITECTURES for n in a.hf]):
        assert len(names) == len(set(names))


# Published configurations, in the spelling of their time

LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_llama_3() -> None:
    spec = spec_from_checkpoint(hf_config(LLAMA_3_2_1B))
    assert (spec.dim, spec.num_layers, spec.num_heads, spec.num_kv_heads) == (2048, 16, 32, 8)
    assert (spec.rope_base, spec.rope_linear_factor, spec.tied_head) == (500000.0, 1.0, True)
    assert spec.rope_factors[:14] == (1.0,) * 14  # wavelengths under 2,048 stay
    assert spec.rope_factors[-14:] == (32.0,) * 14  # those over 8,192 are 32 times as long
    assert list(spec.rope_factors) == sorted(spec.rope_factors)
    assert spec.attention_scale == 0.125


def test_mistral_windows() -> None:
    spec = spec_from_checkpoint(hf_config(MISTRAL_7B))
    assert (spec.sliding_window, spec.sliding_layers) == (4096, (True,) * 32)
    spec = spec_from_checkpoint(hf_config({**MISTRAL_7B, "sliding_window": None}))
    assert (spec.sliding_window, spec.sliding_layers) == (0, ())
    without = {key: value for key, value in MISTRAL_7B.items() if key != "sliding_window"}
    assert spec_from_checkpoint(hf_config(without)).sliding_window == 4096  # as transformers has it


def test_qwen_3() -> None:
    spec = spec_from_checkpoint(hf_config(QWEN3_0_6B))
    assert (spec.num_heads * spec.head_dim, spec.dim) == (2048, 1024)
    assert (spec.qk_norm, spec.qkv_bias) == (True, False)
    assert (spec.rope_base, spec.sliding_window) == (1000000.0, 0)


def test_the_defaults_of_an_old_llama() -> None:
    sizes_only = (
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_layers",
        "vocab_size",
    )
    config = {key: MISTRAL_7B[key] for key in sizes_only} | {"architectures": ["LlamaForCausalLM"]}
    spec = spec_from_checkpoint(hf_config(config))
    assert (spec.num_kv_heads, spec.head_dim, spec.rope_base, spec.norm_eps) == (32, 128, 10000.0, 1e-6)
    assert (spec.tied_head, spec.qkv_bias, spec.mlp_bias) == (False, False, False)


# Hyperparameters that cannot be (M), or that ask for too much (U)

M, U = ModelFileError, UnsupportedModelError

GGUF_ERRORS = [
    ({"block_count": ...}, M, r"model\.gguf: llama\.block_count: expected \w+, got nothing"),
    ({"rope.freq_base": "big"}, M, r"model\.gguf: llama\.rope\.freq_base: expected \w+, got string"),
    ({"attention.head_count": 0}, M, r"llama\.attention\.head_count: .* got 0"),
    ({"attention.head_count": 3}, M, r"llama\.attention\.head_count: 3 does not divide .* 64"),
    ({"attention.head_count_kv": 3}, M, r"4 is not a multiple of num_kv_heads 3"),
    ({"attention.head_count_kv": [2, 1]}, U, r"head_count_kv = \[2, 1\]: layers that differ"),
    ({"block_count": 1025}, M, r"llama\.block_count: .* 1024, got 1025"),
    ({"embedding_length": -64}, M, r"llama\.embedding_length: .* got -64"),
    ({"embedding_length": True}, M, r"llama\.embedding_length: expected \w+, got bool"),
    ({"context_length": 2**40}, M, r"llama\.context_length: .* got 1099511627776"),
    ({"attention.layer_norm_rms_epsilon": 0.0}, M, r"rms_epsilon: expected a number above 0"),
    ({"attention.layer_norm_rms_epsilon": float("nan")}, M, r"rms_epsilon: .* finite .* nan"),
    ({"attention.key_length": 15}, U, r"head_dim: expected an even number, got 15"),
    ({"attention.key_length": 1024}, U, r"head_dim: at most 512 .* got 1024"),
    ({"attention.value_length": 32}, U, r"llama\.attention\.value_length = 32: "),
    ({"rope.dimension_count": 18}, M, r"rotary_dim: .* at most head_dim 16, got 18"),
    ({"rope.scaling.type": "yarn"}, U, r"llama\.rope\.scaling\.type = 'yarn': "),
    ({"rope.scaling.attn_factor": 1.2}, U, r"rope\.scaling\.attn_factor = 1\.2: "),
    ({"expert_count": 8}, U, r"llama\.expert_count = 8: "),
    ({"attention.causal": False}, U, r"llama\.attention\.causal = False: "),
    ({"logit_scale": 0.5}, U, r"llama\.logit_scale = 0\.5: is unknown to fastllm"),
    ({"general.architecture": "mamba"}, U, r"architecture = 'mamba': .* llama, qwen2, qwen3"),
    ({"general.architecture": 7}, M, r"general\.architecture: expected string, got \w+"),
    ({"general.type": "adapter"}, U, r"general\.type = 'adapter': "),
    ({"split.count": 3}, U, r"split\.count = 3: "),
]

HF_ERRORS = [
    ({"hidden_size": ...}, M, r"config\.json: hidden_size: expected integer, got nothing"),
    ({"hidden_size": "64"}, M, r"config\.json: hidden_size: expected integer, got string"),
    ({"hidden_size": 64.5}, M, r"config\.json: hidden_size: expected integer, got number"),
    ({"num_attention_heads": 0}, M, r"num_attention_heads: .* got 0"),
    ({"architectures": []}, M, r"architectures: expected the name of one class"),
    ({"architectures": ["BertModel"]}, U, r"\['BertModel'\]: .* LlamaForCausalLM"),
    ({"hidden_act": "relu"}, U, r"config\.json: hidden_act = 'relu': "),
    ({"tie_word_embeddings": 1}, M, r"tie_word_embeddings: expected boolean, got integer"),
    ({"num_local_experts": 8}, U, r"num_local_experts = 8: is unknown to fastllm"),
    ({"quantization_config": {"bits": 4}}, U, r"quantization_config = \{'bits': 4\}: "),
    ({"partial_rotary_factor": 0.5}, U, r"partial_rotary_factor = 0\.5: "),
    ({"rope_parameters": []}, M, r"rope_parameters: expected object, got array"),
    ({"rope_parameters": {"rope_theta": "x"}}, M, r"rope_parameters\.rope_theta: expected number"),
    ({"rope_parameters": {"rope_theta": -1.0}}, M, r"rope_theta: expected a number above 0"),
    ({"rope_parameters": {"rope_type": "yarn"}}, U, r"rope_parameters\.rope_type = 'yarn'"),
    ({"rope_parameters": {"mscale": 0.7}}, U, r"rope_parameters\.mscale = 0\.7: is unknown"),
    ({"rope_scaling": {"type": "longrope"}}, U, r"rope_scaling\.type = 'longrope'"),
    ({"rope_scaling": {"type": "linear"}}, M, r"rope_scaling\.factor: expected number, got nothing"),
    (
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}},
        M,
        r"rope_parameters\.high_freq_factor: expected number, got nothing",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), GGUF_ERRORS)
def test_bad_gguf_hyperparameters(
    changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    checkpoint = memory_checkpoint.read(tiny.write("gguf", tmp_path))
    memory_checkpoint.reconfigure(checkpoint, changes)
    with pytest.raises(error, match=message):
        spec_from_checkpoint(checkpoint)


@pytest.mark.parametrize(("changes", "error", "message"), HF_ERRORS)
def test_bad_hf_hyperparameters(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    checkpoint = hf_config(MISTRAL_7B | {"architectures": ["LlamaForCausalLM"], "sliding_window": None})
    memory_checkpoint.reconfigure(checkpoint, changes)
    with pytest.raises(error, match=message):
        spec_from_checkpoint(checkpoint)


def test_the_message_has_the_files_own_types(tmp_path: Path) -> None:
    path = tiny.write("gguf", tmp_path, **{"rope.freq_base": "big"})
    with open_checkpoint(path) as checkpoint, pytest.raises(ModelFileError) as caught:
        spec_from_checkpoint(checkpoint)
    assert str(caught.value) == f"{path}: llama.rope.freq_base: expected float32, got string"


@pytest.mark.parametrize(
    "changes",
    [
        {"expert_count": 0, "attention.causal": True, "rope.scaling.type": "none"},
        {"attention.head_count_kv": [2, 2], "feed_forward_length": [96, 96]},
        {"rope.scaling.original_context_length": 4096},
        {"vocab_size": ...},
    ],
)
def test_harmless_gguf_hyperparameters(changes: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = memory_checkpoint.read(tiny.write("gguf", tmp_path))
    expected = spec_from_checkpoint(checkpoint)
    memory_checkpoint.reconfigure(checkpoint, changes)
    assert spec_from_checkpoint(checkpoint) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention"]}, r"layer_types: expected 28 entries, got 1"),
        ({"layer_types": ["sliding_attention"] * 28}, r"layer_types: sliding attention without a"),
        ({"layer_types": ["chunked"] * 28}, r"layer_types = \['chunked', .*: a kind of layer"),
        ({"layer_types": "full_attention"}, r"layer_types: expected array, got string"),
    ],
)
def test_bad_layer_types(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ModelFileError, UnsupportedModelError), match=message):
        spec_from_checkpoint(hf_config(QWEN3_0_6B | changes))


# Rope


@given(
    st.sampled_from((16, 64, 128)),
    st.floats(1e3, 1e7),
    st.floats(1.0, 64.0),
    st.floats(0.5, 2.0),
    st.floats(2.5, 16.0),
    st.integers(32, 131072),
)
def test_llama3_factors_are_transformers(
    dim: int, base: float, factor: float, low: float, high: float, context: int
) -> None:
    how = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    config = transformers.LlamaConfig(
        hidden_size=4 * dim,
        num_attention_heads=4,
        max_position_embeddings=1 << 20,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": base,
            "original_max_position_embeddings": context,
            **how,
        },
    )
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = base ** (-np.arange(dim // 2) / (dim // 2))
    ours = llama3_factors(base, dim, original_context=context, **how)
    np.testing.assert_allclose(ours, plain / frequencies.numpy(), rtol=1e-4)


# The spec itself


def test_a_spec_is_plain_data() -> None:
    spec = DecoderSpec(**SPEC, sliding_window=4, sliding_layers=(True, False), rope_factors=(2.0,) * 8)
    plain = spec.as_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert set(plain) == {f.name for f in dataclasses.fields(spec)} - {"source", "tensors"}
    assert (plain["attention_scale"], plain["sliding_layers"]) == (0.25, [True, False])
    assert [spec.layer_window(layer) for layer in range(2)] == [4, 0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.dim = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"dim": 0}, ModelFileError),
        ({"dim": 1 << 20}, UnsupportedModelError),
        ({"num_heads": 5}, ModelFileError),
        ({"rotary_dim": 0}, ModelFileError),
        ({"rotary_dim": 7}, ModelFileError),
        ({"rope_base": float("inf")}, ModelFileError),
        ({"rope_factors": (1.0,)}, ModelFileError),
        ({"rope_factors": (-1.0,) * 8}, ModelFileError),
        ({"norm_eps": 1.5}, ModelFileError),
        ({"attn_softcap": -1.0}, ModelFileError),
        ({"sliding_window": 4}, ModelFileError),
        ({"sliding_layers": (True, True)}, ModelFileError),
        ({"norm_bias": True}, UnsupportedModelError),
        ({"norm": "batch"}, UnsupportedModelError),
        ({"rope_style": "yarn"}, UnsupportedModelError),
        ({"qk_norm": True, "qk_row_order": "interleaved"}, UnsupportedModelError),
    ],
)
def test_specs_that_cannot_be(changes: dict[str, Any], error: type[Exception]) -> None:
    name = next(iter(changes))
    with pytest.raises(error, match=rf"^here: .*{name}"):
        DecoderSpec(**{**SPEC, "source": "here", **changes})
