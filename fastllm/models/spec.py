"""What distinguishes one decoder from another, as data.

A `DecoderSpec` holds everything that the CPU decoder, the GPU decoder and the float64 oracle need to know
about a decoder-only transformer, apart from the weights themselves, and the `TensorMap` that says where a
checkpoint keeps those weights. Architectures are functions from a checkpoint to a spec (`registry.py`);
nothing else in fastllm knows an architecture by name.

The decoder that a spec describes, for one token with hidden state x of `dim` values:

    x = embed[token] * embedding_scale (+ position_embed[position])
    for every layer:
        h = pre_norm(x)                        unless pre_norms is false
        q, k, v = W_q h, W_k h, W_v h          (+ biases)
        q, k = norm(q), norm(k) per head       if qk_norm
        q, k = rope(q), rope(k)                unless rope_style is "none"
        a = softmax(softcap(attention_scale * q k^T)) v   causal, over the last sliding_window positions
        x = x + post_norm(W_o a)               post norm if post_norms
        h = pre_norm(x)
        m = act(W_gate h) * (W_up h)           or act(W_up h) if not gated
        x = x + post_norm(W_down m)
    logits = softcap(W_head final_norm(x))
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Literal, TypeAlias

from fastllm.errors import ModelFileError, UnsupportedModelError

NormKind: TypeAlias = Literal["rms", "layer"]
RopeStyle: TypeAlias = Literal["half", "none"]
RowOrder: TypeAlias = Literal["half", "interleaved"]
Activation: TypeAlias = Literal["silu", "gelu_tanh", "gelu"]
SpecValue: TypeAlias = "bool | int | float | str | list[bool] | list[float]"

_INT32_MAX = 2**31 - 1

# (least, most): below is a contradiction in the file, above is more than fastllm's kernels and indices hold.
_BOUNDS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "vocab_size": (1, 1 << 24),
        "dim": (1, 1 << 17),
        "num_layers": (1, 1024),
        "num_heads": (1, 4096),
        "num_kv_heads": (1, 4096),
        "head_dim": (2, 512),
        "ffn_dim": (1, 1 << 20),
        "context_length": (1, _INT32_MAX),
        "rotary_dim": (0, 512),
        "sliding_window": (0, _INT32_MAX),
    }
)

_CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "norm": ("rms", "layer"),
        "rope_style": ("half", "none"),
        "qk_row_order": ("half", "interleaved"),
        "activation": ("silu", "gelu_tanh", "gelu"),
    }
)


@dataclass(frozen=True)
class TensorMap:
    """Where one kind of checkpoint keeps the weights of one architecture.

    Attributes:
        names: decoder slot -> tensor name, with `{i}` for the layer. A fused slot (`slots.FUSED`: `qkv`,
            `gate_up` and their biases) stands for its parts stacked along the rows, and wins over them when
            both are named.
        ignored: `fnmatch` patterns of tensors that a decoder does not need.
        transposed: slots stored as (inputs, outputs) instead of (outputs, inputs).
        norm_offset: added to every norm weight while loading (1 where a checkpoint stores w for a norm that
            multiplies by 1 + w).
    """

    names: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    transposed: frozenset[str] = frozenset()
    norm_offset: float = 0.0

    def name(self, slot: str, layer: int) -> str:
        """The tensor that holds `slot` of `layer` (-1 for a slot outside the layers)."""
        return self.names[slot].replace("{i}", str(layer))


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """One decoder architecture with its sizes.

    Sizes are counts of values, never bytes. A zero in `sliding_window`, `attn_softcap`, `final_softcap` and
    `rope_base_sliding`, and an empty tuple in `rope_factors` and `sliding_layers`, mean that the thing is not
    there.

    Raises:
        ModelFileError: the values contradict each other.
        UnsupportedModelError: the values are sound but beyond what fastllm runs.
    """

    architecture: str
    """Name of the registry entry, for messages."""
    source: str = "DecoderSpec"
    """The file that the values come from, for messages."""

    # Sizes
    vocab_size: int
    """Rows of the embedding and of the head; at least the tokenizer's vocabulary."""
    dim: int
    """Width of the residual stream."""
    num_layers: int
    num_heads: int
    """Query heads; a multiple of `num_kv_heads`."""
    num_kv_heads: int
    head_dim: int
    """Width of one head, even; `num_heads * head_dim` need not be `dim`."""
    ffn_dim: int
    """Width of the hidden layer of the MLP (of the gate and of the up projection each)."""
    context_length: int
    """Positions that the model was made for."""

    # Norms
    norm: NormKind = "rms"
    norm_eps: float
    """Added to the mean square (rms) or to the variance (layer)."""
    norm_bias: bool = False
    """Norms add a bias; layer norm only."""
    pre_norms: bool = True
    """Attention and MLP read a normalised residual."""
    post_norms: bool = False
    """The outputs of attention and MLP are normalised before they join the residual."""
    qk_norm: bool = False
    """Queries and keys are normalised per head (one weight of `head_dim` each) before rope."""

    # Biases
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False

    # Positions
    rope_style: RopeStyle = "half"
    """"half": element i turns with element i + rotary_dim / 2; "none": no rotary embedding."""
    rope_base: float = 10000.0
    """Pair i turns by position * rope_base ** (-2 i / rotary_dim) / (rope_linear_factor *
    rope_factors[i])."""
    rope_base_sliding: float = 0.0
    """The base in layers with a sliding window, where it differs; neither factor applies there. 0: the
    same."""
    rotary_dim: int
    """Leading elements of a head that turn, even, at most `head_dim`; 0 without rope."""
    rope_linear_factor: float = 1.0
    rope_factors: tuple[float, ...] = ()
    """One divisor per pair (rotary_dim / 2), float32 values; empty: all one."""
    position_embeddings: bool = False
    """A learned embedding (context_length, dim) is added to the token embedding."""
    qk_row_order: RowOrder = "half"
    """Row order of q and k in the checkpoint. "interleaved": rotating pairs are neighbours (2 i, 2 i + 1) and
    the loader reorders whole rows, so that decoders see "half" only."""

    # Attention
    attention_scale: float = 0.0
    """Multiplies q k^T. 0 is replaced by 1 / sqrt(head_dim)."""
    attn_softcap: float = 0.0
    """Scores become cap * tanh(score / cap), after scaling and before the mask."""
    sliding_window: int = 0
    """A query at position p sees the positions in (p - sliding_window, p]."""
    sliding_layers: tuple[bool, ...] = ()
    """Which layers have the window; as many as layers when `sliding_window` is set."""

    # MLP, ends
    activation: Activation = "silu"
    gated_mlp: bool = True
    embedding_scale: float = 1.0
    final_softcap: float = 0.0
    tied_head: bool = False
    """The head is the embedding; one copy in memory."""

    tensors: TensorMap = field(default_factory=TensorMap, repr=False)
    """Where the checkpoint that the spec was read from keeps the weights."""

    def __post_init__(self) -> None:
        if self.attention_scale == 0.0 and self.head_dim > 0:
            object.__setattr__(self, "attention_scale", self.head_dim**-0.5)
        for name, (least, most) in _BOUNDS.items():
            value = getattr(self, name)
            if value < least:
                raise self._contradiction(name, f"expected at least {least}, got {value}")
            if value > most:
                raise UnsupportedModelError(
                    f"{self.source}: {name}: at most {most} is supported, got {value}"
                )
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UnsupportedModelError(
                    f"{self.source}: {name}: expected {' or '.join(allowed)}, got {getattr(self, name)!r}"
                )
        self._check_attention()
        self._check_positions()
        for name, ceiling in (("norm_eps", 1.0), ("attention_scale", 1e6), ("embedding_scale", 1e6)):
            self._check_number(name, getattr(self, name), ceiling)
        for name in ("attn_softcap", "final_softcap"):
            self._check_number(name, getattr(self, name), zero=True)
        if self.norm_bias and self.norm == "rms":
            raise UnsupportedModelError(f"{self.source}: norm_bias: not supported with RMS norms")

    def _check_attention(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise self._contradiction(
                "num_heads", f"{self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise UnsupportedModelError(
                f"{self.source}: head_dim: expected an even number, got {self.head_dim}"
            )
        expected = self.num_layers if self.sliding_window else 0
        if len(self.sliding_layers) != expected:
            raise self._contradiction(
                "sliding_layers",
                f"expected {expected} entries with sliding_window {self.sliding_window}, "
                f"got {len(self.sliding_layers)}",
            )

    def _check_positions(self) -> None:
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise self._contradiction(
                "rotary_dim",
                f"expected an even number of at most head_dim {self.head_dim}, got {self.rotary_dim}",
            )
        if (self.rotary_dim == 0) != (self.rope_style == "none"):
            raise self._contradiction(
                "rotary_dim", f"{self.rotary_dim} does not go with rope {self.rope_style!r}"
            )
        self._check_number("rope_base", self.rope_base)
        self._check_number("rope_linear_factor", self.rope_linear_factor)
        self._check_number("rope_base_sliding", self.rope_base_sliding, zero=True)
        if self.rope_factors:
            if len(self.rope_factors) != self.rotary_dim // 2:
                raise self._contradiction(
                    "rope_factors",
                    f"expected rotary_dim/2 = {self.rotary_dim // 2} entries, got {len(self.rope_factors)}",
                )
            for factor in self.rope_factors:
                self._check_number("rope_factors", factor)
        if self.qk_row_order == "interleaved" and self.qk_norm:
            raise UnsupportedModelError(
                f"{self.source}: qk_norm: not supported with interleaved q and k rows"
            )

    def _check_number(self, name: str, value: float, ceiling: float = 1e30, *, zero: bool = False) -> None:
        if not (math.isfinite(value) and value <= ceiling and (value > 0.0 or (zero and value == 0.0))):
            least = "0" if zero else "above 0"
            raise self._contradiction(name, f"expected a number from {least} to {ceiling:g}, got {value!r}")

    def _contradiction(self, name: str, reason: str) -> ModelFileError:
        return ModelFileError(self.source, reason, key=name)

    def layer_window(self, layer: int) -> int:
        """The sliding window of one layer, 0 for none."""
        return self.sliding_window if self.sliding_window and self.sliding_layers[layer] else 0

    def as_dict(self) -> dict[str, SpecValue]:
        """The spec as plain numbers, strings and lists, for the compiled decoder.

        `source` and `tensors` stay out: they concern reading a checkpoint, not running the decoder.
        """
        plain: dict[str, SpecValue] = {}
        for entry in fields(self):
            if entry.name in ("source", "tensors"):
                continue
            value = getattr(self, entry.name)
            plain[entry.name] = list(value) if isinstance(value, tuple) else value
        return plain
