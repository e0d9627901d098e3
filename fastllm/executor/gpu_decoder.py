"""The decoder of a `DecoderSpec` on a GPU: torch for memory and plain products, our kernels for the rest.

The residual stream and what goes between kernels is in the activations' type, every sum in fp32; logits are
fp32. A step reads its batch from tensors on the GPU alone, so that a CUDA graph can hold all of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fastllm.executor.gpu_weights import LayerWeights, Weights, multiply
from fastllm.executor.ranks import Rank
from fastllm.kernels.activation import activation
from fastllm.kernels.attention import DeviceItems, launch_attention
from fastllm.kernels.embedding import embedding
from fastllm.kernels.heads import LayerCache, prepare_heads
from fastllm.kernels.low_rank import add_low_rank
from fastllm.kernels.norm import norm
from fastllm.models.spec import DecoderSpec


@dataclass(frozen=True)
class AdapterStack:
    """The loaded adapters' matrices of one projection: a (adapters, R, K), b (adapters, N, R), scales."""

    a: torch.Tensor
    b: torch.Tensor
    scales: torch.Tensor


@dataclass(frozen=True)
class DeviceStep:
    """One step's batch on the GPU; T tokens, R rows, padding at the end of both."""

    token_ids: torch.Tensor  # (T,) int32; -1 - r: what row r of the step before sampled
    positions: torch.Tensor  # (T,) int32
    slots: torch.Tensor  # (T,) int32; -1: padding
    tables: torch.Tensor  # int32, the block tables one after the other; an item says where its own begins
    items: dict[int, DeviceItems]  # sliding window (0: none) -> work of attention
    row_token: torch.Tensor  # (R,) int32: the token whose hidden state is used
    adapter: torch.Tensor | None  # (T,) int32, -1: none; None: no token has one


class GpuDecoder:
    """Runs steps of one model on one GPU, or one rank's share of them.

    Args:
        spec: the whole decoder.
        weights: of `rank`.
        positions: that a sequence may have.
        deterministic: one path for every number of rows, so that a token's result does not depend on the
            batch.
        adapters: by slot and layer; looked at in every step.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        weights: Weights,
        *,
        dtype: torch.dtype,
        device: torch.device,
        positions: int,
        deterministic: bool,
        rank: Rank,
        adapters: dict[tuple[str, int], AdapterStack] | None = None,
    ) -> None:
        self._spec = spec
        self.weights = weights
        self._dtype = dtype
        self._deterministic = deterministic
        self._rank = rank
        self._heads = spec.num_heads // rank.size
        self._kv_heads = spec.num_kv_heads // rank.size
        self._rope, self._rope_sliding = rope_tables(spec, positions, device)
        self._adapters = {} if adapters is None else adapters

    def hidden(self, step: DeviceStep, sampled: torch.Tensor, cache: list[LayerCache]) -> torch.Tensor:
        """The hidden states of the step's rows after the final norm, (R, dim); fills the cache."""
        spec = self._spec
        weights = self.weights
        x = embedding(
            step.token_ids, sampled, step.positions, weights.embed, weights.position_embed,
            spec.embedding_scale, self._dtype,
        )  # fmt: skip
        # For all layers, one after the other. Attention writes no row of padding: those stay zeros.
        attended = x.new_zeros(x.shape[0], self._heads, spec.head_dim)
        for i, layer in enumerate(weights.layers):
            x = self._attention(x, layer, step, cache[i], i, attended)
            x = self._mlp(x, layer, step, i)
        return self._norm(x[step.row_token], weights.final_norm, weights.final_norm_bias, None)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 (R, V)."""
        head = self.weights.head
        out = torch.empty(hidden.shape[0], head.rows, dtype=torch.float32, device=hidden.device)
        multiply(hidden, head, deterministic=self._deterministic, out=out)
        logits = self._rank.gather(out)
        cap = self._spec.final_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def _norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
    ) -> torch.Tensor:
        return norm(x, weight, bias, residual, self._spec.norm_eps, layer=self._spec.norm == "layer")

    def _attention(
        self, x: torch.Tensor, layer: LayerWeights, step: DeviceStep, cache: LayerCache, index: int,
        attended: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        spec = self._spec
        vectors = layer.vectors
        h = x
        if spec.pre_norms:
            h = self._norm(x, vectors["attn_norm"], vectors.get("attn_norm_bias"), None)
        qkv = multiply(h, layer.qkv, deterministic=self._deterministic)
        widths = [count * spec.head_dim for count in (self._heads, self._kv_heads, self._kv_heads)]
        for name, part in zip("qkv", torch.split(qkv, widths, dim=1), strict=True):
            self._adapt(name, index, h, step, part)
        window = spec.layer_window(index)
        cos, sin = self._rope_sliding if window and self._rope_sliding is not None else self._rope
        prepare_heads(
            qkv, vectors.get("q_norm"), vectors.get("k_norm"), cos, sin, step.positions, step.slots, cache,
            spec.norm_eps, self._heads,
        )  # fmt: skip
        launch_attention(
            qkv[:, : widths[0]].view(-1, self._heads, spec.head_dim), cache.keys, cache.values, step.tables,
            step.items[window], attended, spec.attention_scale, spec.attn_softcap,
            cache.key_scales, cache.value_scales,
        )  # fmt: skip
        whole = self._rank.gather(attended.view(-1, widths[0]))
        return self._join(x, whole, layer, step, index, "o", "attn_post_norm")

    def _mlp(self, x: torch.Tensor, layer: LayerWeights, step: DeviceStep, index: int) -> torch.Tensor:
        spec = self._spec
        vectors = layer.vectors
        h = x
        if spec.pre_norms:
            h = self._norm(x, vectors["ffn_norm"], vectors.get("ffn_norm_bias"), None)
        adapted = step.adapter is not None and any((name, index) in self._adapters for name in ("gate", "up"))
        fused = spec.activation == "silu" and spec.gated_mlp and not adapted
        fused = fused and len(layer.gate_up.matrices) == 1
        m = multiply(h, layer.gate_up, paired=fused, deterministic=self._deterministic)
        if not fused:
            if adapted:
                step_of = 2 if spec.gated_mlp else 1
                for first, name in enumerate(("gate", "up") if spec.gated_mlp else ("up",)):
                    part = m[:, first::step_of].contiguous()
                    self._adapt(name, index, h, step, part)
                    m[:, first::step_of] = part
            m = activation(m, spec.activation, gated=spec.gated_mlp)
        m = self._rank.gather(m)
        return self._join(x, m, layer, step, index, "down", "ffn_post_norm")

    def _join(
        self, x: torch.Tensor, h: torch.Tensor, layer: LayerWeights, step: DeviceStep, index: int, slot: str,
        post: str,
    ) -> torch.Tensor:  # fmt: skip
        """x + (post norm of) the projection of h."""
        linear = layer.o if slot == "o" else layer.down
        whole = self._rank.size == 1
        adapted = step.adapter is not None and (slot, index) in self._adapters
        fused = whole and not adapted and not self._spec.post_norms
        y = multiply(h, linear, x if fused else None, deterministic=self._deterministic)
        if fused:
            return y
        self._adapt(slot, index, h, step, y)
        y = self._rank.gather(y)
        if self._spec.post_norms:
            return self._norm(y, layer.vectors[post], layer.vectors.get(f"{post}_bias"), x)
        return x + y

    def _adapt(self, slot: str, index: int, h: torch.Tensor, step: DeviceStep, y: torch.Tensor) -> None:
        stack = self._adapters.get((slot, index))
        if step.adapter is not None and stack is not None:
            add_low_rank(h, step.adapter, stack.a, stack.b, stack.scales, y)


Table = tuple[torch.Tensor, torch.Tensor]


def rope_tables(spec: DecoderSpec, positions: int, device: torch.device) -> tuple[Table, Table | None]:
    """cos and sin, fp32 (positions, rotary_dim / 2) from fp64 angles, and those of layers with a window, if
    they have a base of their own."""

    def table(base: float, linear: float, factors: tuple[float, ...]) -> Table:
        pairs = spec.rotary_dim // 2
        inverse = base ** (-2.0 * np.arange(pairs) / max(spec.rotary_dim, 1)) / linear
        if factors:
            inverse = inverse / np.asarray(factors, dtype=np.float64)
        angles = np.arange(positions, dtype=np.float64)[:, None] * inverse
        # Without rope there are no columns, and no element turns.
        values = [f(angles).astype(np.float32) for f in (np.cos, np.sin)]
        return (torch.from_numpy(values[0]).to(device), torch.from_numpy(values[1]).to(device))

    main = table(spec.rope_base, spec.rope_linear_factor, spec.rope_factors)
    sliding = table(spec.rope_base_sliding, 1.0, ()) if spec.rope_base_sliding else None
    return main, sliding
