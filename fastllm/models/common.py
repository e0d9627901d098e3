"""The hyperparameters that dense decoders share, read from either kind of checkpoint.

Each function gives keyword arguments for `DecoderSpec`; an architecture adds or replaces what is its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastllm.models.hyperparameters import HyperParameters
from fastllm.models.rope import gguf_rope, hf_rope
from fastllm.models.tensors import GGUF_TENSORS, HF_TENSORS

if TYPE_CHECKING:
    from fastllm.formats.checkpoint import Checkpoint

GGUF_HARMLESS = frozenset(
    {
        "rope.scaling.original_context_length",  # only yarn and longrope read it, and they are refused
        "rope.scaling.finetuned",
        "tensor_data_layout",
    }
)

HF_HARMLESS = frozenset(
    """
    architectures model_type torch_dtype dtype transformers_version _name_or_path name_or_path
    tokenizer_class transformers.js_config is_llama_config _attn_implementation_autoset unsloth_fixed
    unsloth_version

    initializer_range attention_dropout hidden_dropout embd_pdrop resid_pdrop use_cache output_attentions
    output_hidden_states return_dict torchscript use_bfloat16 tf_legacy_loss pretraining_tp is_decoder
    id2label label2id problem_type finetuning_task task_specific_params pruned_heads
    chunk_size_feed_forward max_sequence_length tie_encoder_decoder

    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id prefix max_length
    min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids num_return_sequences output_scores return_dict_in_generate forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens
    """.split()  # noqa: SIM905
)
"""Fields of `config.json` that cannot change the answer: bookkeeping; training and what a framework returns;
token ids and generation defaults, which other parts read from their own files."""


def gguf_decoder(params: HyperParameters, checkpoint: Checkpoint) -> dict[str, Any]:
    """Sizes, rope, norms and head of a GGUF file; `params` are those of its architecture.

    A head is tied when the file has no `output.weight`.

    Raises:
        ModelFileError: a hyperparameter or the embedding is missing, or has a wrong type or range.
        UnsupportedModelError: experts, a value head of another width, non-causal attention.
    """
    params.expect("attention.causal", True)
    for absent in ("expert_count", "expert_used_count", "attention.clamp_kqv", "attention.max_alibi_bias"):
        params.expect(absent, 0, 0.0)
    params.expect("use_parallel_residual", False)
    dim = params.integer("embedding_length")
    heads = params.integer("attention.head_count")
    if not params.has("attention.key_length") and dim % heads:
        raise params.error("attention.head_count", f"{heads} does not divide embedding_length {dim}")
    head_dim = params.integer("attention.key_length", dim // heads)
    params.expect("attention.value_length", head_dim)
    rotary_dim = params.integer("rope.dimension_count", head_dim)
    layers = params.integer("block_count", most=1024)
    window = params.integer("attention.sliding_window", 0, least=0)
    embedding = checkpoint.tensors.get("token_embd.weight")
    rows = embedding.shape[0] if embedding is not None and len(embedding.shape) == 2 else 0
    return dict(
        source=str(checkpoint.path),
        vocab_size=params.integer("vocab_size", rows) if rows else params.integer("vocab_size"),
        dim=dim,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=params.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn_dim=params.integer("feed_forward_length"),
        context_length=params.integer("context_length"),
        norm_eps=params.number("attention.layer_norm_rms_epsilon"),
        rotary_dim=rotary_dim,
        **gguf_rope(params, checkpoint, rotary_dim),
        sliding_window=window,
        sliding_layers=(True,) * layers if window else (),
        tied_head="output.weight" not in checkpoint.tensors,
        tensors=GGUF_TENSORS,
    )


def hf_decoder(params: HyperParameters) -> dict[str, Any]:
    """Sizes, rope, norms and head from a `config.json`, under the names that Llama's configuration
    introduced.

    Raises:
        ModelFileError: a field is missing, or has a wrong type or range.
        UnsupportedModelError: an activation other than SiLU, or a variant of rope or attention that is not
            implemented.
    """
    params.expect("hidden_act", "silu")
    params.expect("is_encoder_decoder", False)
    params.expect("add_cross_attention", False)
    params.expect("rope_interleaved", False)
    params.expect("use_mrope", False)
    dim = params.integer("hidden_size")
    heads = params.integer("num_attention_heads")
    if not params.has("head_dim") and dim % heads:
        raise params.error("num_attention_heads", f"{heads} does not divide hidden_size {dim}")
    head_dim = params.integer("head_dim", dim // heads)
    context = params.integer("max_position_embeddings")
    return dict(
        source=params.source,
        vocab_size=params.integer("vocab_size"),
        dim=dim,
        num_layers=params.integer("num_hidden_layers", most=1024),
        num_heads=heads,
        num_kv_heads=params.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        ffn_dim=params.integer("intermediate_size"),
        context_length=context,
        norm_eps=params.number("rms_norm_eps", 1e-6),
        rotary_dim=head_dim,
        **hf_rope(params, head_dim, context),
        tied_head=params.boolean("tie_word_embeddings", False),
        tensors=HF_TENSORS,
    )


def hf_qwen_windows(params: HyperParameters, num_layers: int) -> dict[str, Any]:
    """Sliding windows as Qwen 2 and 3 configure them: off unless `use_sliding_window`, then from layer
    `max_window_layers` on; `layer_types` (transformers 5) says it per layer and wins.

    Raises:
        ModelFileError: a field is missing or has a wrong type or length.
        UnsupportedModelError: a kind of layer other than full and sliding attention.
    """
    first = params.integer("max_window_layers", num_layers, least=0)
    window = params.integer("sliding_window", 0, least=0)
    if not params.boolean("use_sliding_window", False):
        window = 0
    layers = [i >= first for i in range(num_layers)]
    if types := params.strings("layer_types"):
        if len(types) != num_layers:
            raise params.error("layer_types", f"expected {num_layers} entries, got {len(types)}")
        if set(types) - {"full_attention", "sliding_attention"}:
            raise params.unsupported("layer_types", "a kind of layer that is not implemented")
        layers = [kind == "sliding_attention" for kind in types]
    if window == 0 and types and any(layers):
        raise params.error("layer_types", "sliding attention without a sliding_window")
    if window == 0 or not any(layers):
        return {}
    return {"sliding_window": window, "sliding_layers": tuple(layers)}
