"""How near the engine stays to a float32 reference on the same dequantized weights: texts, prompts, measures.

The reference shares nothing with fastllm but the file: `gguf` reads and dequantizes it, `transformers`
computes it in float32, activations included. Both sides get the same token ids.

The texts are fixed, so that figures of different machines and days can be compared: prose.txt was written for
this, code.txt holds files of fastllm (C++, Python, Cython) as they were in its first days.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import gguf
import numpy as np
import numpy.typing as npt
import torch
import transformers
from step_batches import step_batch, whole

from fastllm import LLM, SamplingParams
from fastllm.executor.cpu import CpuExecutor

Float64: TypeAlias = npt.NDArray[np.float64]

TEXTS = {name: Path(__file__).parent / "data" / "quality" / f"{name}.txt" for name in ("prose", "code")}
WINDOW = 1024
"""Tokens that are scored together, each given those before it in the window."""

CONTINUATION = 12
"""Tokens of a greedy continuation."""

# Chosen before anything was measured, and not to be changed for what is measured.
PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "The largest planet in our solar system is",
    "In 1969, Neil Armstrong became the first person to",
    "Photosynthesis is the process by which plants",
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
    "import numpy as np\n\ndef softmax(x):\n",
    "for (int i = 0; i < n; i++) {\n",
    "SELECT name, age FROM users WHERE",
    "<!DOCTYPE html>\n<html>\n<head>\n",
    "The days of the week are Monday, Tuesday,",
    "Ingredients for pancakes:\n- 2 cups of flour\n-",
    "1, 1, 2, 3, 5, 8, 13,",
    "Top three tips for learning a new language:\n1.",
    "Alice: Did you finish the report?\nBob:",
    '"Where are you going?" she asked.\n\n"',
    "<|im_start|>user\nName three primary colors.<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWrite a short poem about the sea.<|im_end|>\n<|im_start|>assistant\n",
    "Once upon a time, in a small village by the sea, there lived",
    "Dear Sir or Madam,\n\nI am writing to",
)


# -- the reference -------------------------------------------------------------------------------------------


class Reference:
    """A llama-like GGUF file in `transformers`, float32 throughout."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)

        def value(key: str) -> Any:
            return reader.fields[f"llama.{key}"].contents()

        heads, kv_heads = value("attention.head_count"), value("attention.head_count_kv")
        tensors = {
            tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors
        }
        config: dict[str, Any] = {
            "vocab_size": tensors["token_embd.weight"].shape[0],
            "hidden_size": value("embedding_length"),
            "num_hidden_layers": value("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": tensors["blk.0.attn_q.weight"].shape[0] // heads,
            "intermediate_size": value("feed_forward_length"),
            "max_position_embeddings": value("context_length"),
            "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
            "rope_theta": value("rope.freq_base"),
            "tie_word_embeddings": "output.weight" not in tensors,
        }
        with torch.device("meta"):  # no memory, no random weights
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
        weights = {
            _transformers_name(name): torch.from_numpy(
                _half_order(values, heads if "attn_q" in name else kv_heads)
                if "attn_q." in name or "attn_k." in name
                else np.array(values, np.float32)
            )
            for name, values in tensors.items()
        }
        missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
        assert not unexpected
        assert set(missing) <= {"lm_head.weight"}
        model.tie_weights()
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its tables are no weights
        model.train(False)
        self.model = model

    def logits(self, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """For each sequence float32 (T, V): row t predicts the token at position t + 1."""
        longest = max(len(ids) for ids in sequences)
        # What is appended stands behind all that is looked at, and attention is causal.
        batch = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in sequences])
        with torch.inference_mode():
            logits = self.model(batch, use_cache=False).logits
        return [logits[i, : len(ids)] for i, ids in enumerate(sequences)]

    def logprobs(self, ids: Sequence[int]) -> Float64:
        """Log probability of every token but the first, given those before it. (T - 1,)"""
        (logits,) = self.logits([ids])
        out = np.empty(len(ids) - 1)
        for first in range(0, len(out), 128):  # float64 for a few rows at a time
            rows = logits[first : min(first + 128, len(out))].double()
            chosen = rows[range(len(rows)), list(ids[first + 1 : first + 1 + len(rows)])]
            out[first : first + len(rows)] = (chosen - rows.logsumexp(-1)).numpy()
        return out


def reference_logprobs(reference: Reference, cut: Sequence[Sequence[int]]) -> list[Float64]:
    """`Reference.logprobs` of every window.

    A few windows at a time, a thread for each (torch's own threads are best set to one): threads that share a
    window wait for each other at every operation, and for long where the machine is busy.
    """
    with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), 4)) as threads:
        return list(threads.map(reference.logprobs, cut))


def _transformers_name(name: str) -> str:
    outside = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    inside = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    parts = name.removesuffix(".weight").split(".")
    place = outside[parts[0]] if len(parts) == 1 else f"model.layers.{parts[1]}.{inside[parts[2]]}"
    return f"{place}.weight"


def _half_order(values: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """GGUF keeps the two rows of a rotating pair beside each other, transformers half a head apart."""
    rows, columns = values.shape
    paired = values.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(paired.swapaxes(1, 2).reshape(rows, columns))


# -- perplexity ----------------------------------------------------------------------------------------------


def windows(ids: Sequence[int], size: int = WINDOW) -> list[list[int]]:
    """The ids cut into windows; the last may be shorter, but never holds a single token."""
    cut = [list(ids[first : first + size]) for first in range(0, len(ids), size)]
    return [window for window in cut if len(window) > 1]


def text_windows(llm: LLM) -> dict[str, list[list[int]]]:
    """The fixed texts in the model's tokens."""
    tokenizer = llm.get_tokenizer()
    return {name: windows(tokenizer.encode(path.read_text("utf-8"))) for name, path in TEXTS.items()}


def engine_logprobs(llm: LLM, cut: Sequence[Sequence[int]]) -> list[Float64]:
    """What `Reference.logprobs` gives, from the engine, all windows in one call."""
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": list(ids)} for ids in cut], params, use_tqdm=False)
    result = []
    for ids, output in zip(cut, outputs, strict=True):
        assert output.prompt_logprobs is not None
        rows = output.prompt_logprobs
        assert rows[0] is None
        given = [row[token].logprob for row, token in zip(rows[1:], ids[1:], strict=True) if row is not None]
        result.append(np.array(given))
    return result


@dataclass(frozen=True)
class Perplexity:
    """Two rates of surprise at the same tokens.

    Attributes:
        tokens: how many were scored.
        reference, measured: perplexities.
        change: measured / reference - 1.
        error: standard error of `change`, with the tokens taken as independent.
    """

    tokens: int
    reference: float
    measured: float
    change: float
    error: float


def perplexity(reference: Sequence[Float64], measured: Sequence[Float64]) -> Perplexity:
    """From the logprobs that two sides give the same tokens."""
    a, b = np.concatenate(reference), np.concatenate(measured)
    assert a.shape == b.shape
    assert np.isfinite(a).all()
    assert np.isfinite(b).all()
    difference = a - b
    change = float(np.expm1(difference.mean()))
    return Perplexity(
        tokens=len(a),
        reference=float(np.exp(-a.mean())),
        measured=float(np.exp(-b.mean())),
        change=change,
        error=_standard_error(difference) * (1 + change),
    )


# -- distributions -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Divergence:
    """How far one side's distributions are from another's. Errors are standard errors over positions.

    Attributes:
        positions: how many distributions were compared.
        entropy: mean entropy of the reference's distributions, nats.
        kl_mean, kl_error: Kullback-Leibler divergence from the reference, nats, and its standard error.
        kl_99th_percentile, kl_max: the same of single positions.
        same_top_token, same_top_token_error: share of positions with the same most likely token.
        logit_error: root mean square of the logits' differences over that of the reference's logits.
    """

    positions: int
    entropy: float
    kl_mean: float
    kl_error: float
    kl_99th_percentile: float
    kl_max: float
    same_top_token: float
    same_top_token_error: float
    logit_error: float


class Tally:
    """Two sides' logits, position by position.

    Attributes:
        expected, found: both sides' log probabilities of the tokens that came, for `perplexity`.
    """

    def __init__(self) -> None:
        self.expected: list[Float64] = []
        self.found: list[Float64] = []
        self._entropy: list[Float64] = []
        self._divergence: list[Float64] = []
        self._same: list[Float64] = []
        self._squares = np.zeros(2)  # of the differences and of the reference

    def add(self, ids: Sequence[int], expected: torch.Tensor, found: torch.Tensor) -> None:
        """One window's logits (T, V) of both sides."""
        for first in range(0, len(ids) - 1, 128):  # float64 for a few rows at a time
            rows = slice(first, min(first + 128, len(ids) - 1))
            targets = torch.tensor(list(ids[rows.start + 1 : rows.stop + 1]))[:, None]
            a, b = expected[rows].double(), found[rows].double()
            self._squares += ((b - a).square().sum().item(), a.square().sum().item())
            p, q = a.log_softmax(-1), b.log_softmax(-1)
            self.expected.append(p.gather(-1, targets)[:, 0].numpy())
            self.found.append(q.gather(-1, targets)[:, 0].numpy())
            self._same.append((p.argmax(-1) == q.argmax(-1)).double().numpy())
            chances = p.exp()
            self._entropy.append(-(chances * p).sum(-1).numpy())
            self._divergence.append((chances * (p - q)).sum(-1).numpy())

    def extend(self, other: Tally) -> None:
        """All that was added to another one."""
        self.expected += other.expected
        self.found += other.found
        self._entropy += other._entropy
        self._divergence += other._divergence
        self._same += other._same
        self._squares += other._squares

    def divergence(self) -> Divergence:
        """Of everything added."""
        entropy, kl, same = map(np.concatenate, (self._entropy, self._divergence, self._same))
        assert np.isfinite(kl).all()
        return Divergence(
            positions=len(kl),
            entropy=float(entropy.mean()),
            kl_mean=float(kl.mean()),
            kl_error=_standard_error(kl),
            kl_99th_percentile=float(np.quantile(kl, 0.99)),
            kl_max=float(kl.max()),
            same_top_token=float(same.mean()),
            same_top_token_error=_standard_error(same),
            logit_error=float(np.sqrt(self._squares[0] / self._squares[1])),
        )


def executor_logits(executor: CpuExecutor, ids: Sequence[int]) -> torch.Tensor:
    """What `Reference.logits` gives for one sequence, from the executor by itself, in one step."""
    blocks = range(-(-len(ids) // executor.block_size))
    logits = executor.run(step_batch([whole(ids, blocks)], executor.block_size), logits=True)[1]
    assert logits is not None
    return torch.from_numpy(logits.copy())


def _standard_error(values: Float64) -> float:
    return float(values.std() / np.sqrt(len(values)))


# -- greedy continuations ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Where a greedy continuation leaves the reference's.

    Attributes:
        step: tokens that were the same.
        expected, found: the token of the reference, and ours.
        margin: nats between the reference's own two most likely tokens there.
        regret: nats between the reference's most likely token and the one found; never below `margin`.
    """

    step: int
    expected: int
    found: int
    margin: float
    regret: float


def greedy_splits(llm: LLM, reference: Reference) -> dict[str, Split | None]:
    """For every prompt, None or where the continuation of CONTINUATION tokens leaves the reference's.

    The reference reads prompt and continuation at once: up to the first token that it would not have chosen
    itself, these are its own.
    """
    params = SamplingParams(max_tokens=CONTINUATION, temperature=0, ignore_eos=True)
    outputs = llm.generate(list(PROMPTS), params, use_tqdm=False)
    continuations = [list(output.outputs[0].token_ids) for output in outputs]
    assert all(len(continued) == CONTINUATION for continued in continuations)
    read = [[*output.prompt_token_ids, *output.outputs[0].token_ids] for output in outputs]
    splits: dict[str, Split | None] = {}
    for prompt, continued, logits in zip(PROMPTS, continuations, reference.logits(read), strict=True):
        splits[prompt] = None
        rows = logits[-CONTINUATION - 1 : -1].double().numpy()
        for step, (row, found) in enumerate(zip(rows, continued, strict=True)):
            first, second = np.partition(row, -2)[:-3:-1]
            if row[found] < first:
                splits[prompt] = Split(
                    step, int(row.argmax()), found, float(first - second), float(first - row[found])
                )
                break
    return splits
