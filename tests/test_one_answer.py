"""One answer: the same request gives the same bits alone, batched, chunked, preempted, on any number of
threads and with every instruction set of the machine. On the default model, through the public API.

What is compared is the token ids together with the bits of their log-probabilities, which change with any bit
of the logits. tests/test_decoder.py compares the logits themselves on other models; .ci/full repeats a short
run under an emulator of older processors.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastllm import LLM, RequestOutput, SamplingParams, _core

pytestmark = pytest.mark.model

OPENINGS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time there was a small village at the edge of",
    "Water boils at 100 degrees because",
    "1, 1, 2, 3, 5, 8,",
    "Q: What is the largest planet?\nA:",
    "<html>\n<head>",
    "Il était une fois",
)
LONG = " ".join(f"Item {i} of the list is number {i * i}." for i in range(40))


def prompts(count: int) -> list[str]:
    """Short ones, long ones, and some that begin alike."""
    made = []
    for i in range(count):
        opening = OPENINGS[i % len(OPENINGS)]
        made.append((LONG[: 20 * (i % 13)] + "\n" if i % 5 == 3 else "") + opening + " " * (i // 8 % 2))
    return made


def params(index: int, max_tokens: int = 12) -> SamplingParams:
    """Greedy, sampled, filtered and penalised requests side by side."""
    kinds: tuple[dict[str, Any], ...] = (
        {"temperature": 0.0},
        {"temperature": 0.8},
        {"temperature": 1.0, "top_k": 40, "top_p": 0.9},
        {"temperature": 0.7, "min_p": 0.05, "repetition_penalty": 1.2},
        {"temperature": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    )
    return SamplingParams(
        **kinds[index % len(kinds)], seed=1000 + index, max_tokens=max_tokens, ignore_eos=True, logprobs=2
    )


def fingerprint(output: RequestOutput, index: int = 0) -> list[tuple[int, list[tuple[int, int]]]]:
    """Token ids with the bits of every reported log-probability."""
    completion = output.outputs[index]
    assert completion.logprobs is not None
    steps = []
    for token, entries in zip(completion.token_ids, completion.logprobs, strict=True):
        bits = [(i, int(np.float32(entry.logprob).view(np.int32))) for i, entry in sorted(entries.items())]
        steps.append((token, bits))
    return steps


@pytest.fixture(scope="module")
def alone(default_model_path: Path) -> list[Any]:
    """64 answers, each from a request that had the engine to itself, on one thread."""
    with LLM(default_model_path, max_model_len=512, threads=1, enable_prefix_caching=False) as llm:
        return [fingerprint(llm.generate(prompt, params(i))[0]) for i, prompt in enumerate(prompts(64))]


ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "batched": {},
    "chunked": {"max_num_batched_tokens": 7},
    "preempted": {"kv_cache_tokens": 192, "max_model_len": 192},
    "offloaded": {"kv_cache_tokens": 192, "max_model_len": 192, "kv_offload_bytes": 256 << 20},
    "one-thread": {"threads": 1},
    "more-threads-than-processors": {"threads": 5},
    "other-blocks": {"block_size": 64},
    "nothing-shared": {"enable_prefix_caching": False},
    "guessing": {"speculative_config": {"method": "ngram", "prompt_lookup_min": 1}},
}


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_64_prompts_together_give_what_each_gives_alone(
    arrangement: str, alone: list[Any], default_model_path: Path
) -> None:
    options = {"max_model_len": 512, **ARRANGEMENTS[arrangement]}
    count = 16 if arrangement == "more-threads-than-processors" else 64
    with LLM(default_model_path, **options) as llm:
        outputs = llm.generate(prompts(count), [params(i) for i in range(count)])
    if arrangement in ("preempted", "offloaded"):
        assert sum(output.metrics.num_preemptions for output in outputs) > 0
    for output, expected in zip(outputs, alone, strict=False):
        assert fingerprint(output) == expected


def test_a_prefix_hit_changes_no_bit(alone: list[Any], default_model_path: Path) -> None:
    with LLM(default_model_path, max_model_len=512) as llm:
        for time in range(3):
            outputs = llm.generate(prompts(64), [params(i) for i in range(64)])
            cached = [output.num_cached_tokens for output in outputs]
            assert max(cached) >= (0 if time == 0 else 48), cached
            for output, expected in zip(outputs, alone, strict=True):
                assert fingerprint(output) == expected


def test_several_sequences_share_a_prompt_and_change_no_bit(default_model_path: Path) -> None:
    """Blocks of the prompt are shared, and copied where a sequence writes to one."""
    asked = [SamplingParams(n=5, temperature=0.9, seed=i, max_tokens=20, logprobs=1) for i in range(4)]
    texts = prompts(4)
    answers = []
    with LLM(default_model_path, max_model_len=256, threads=1, max_num_seqs=1) as llm:
        answers.append([llm.generate(text, given)[0] for text, given in zip(texts, asked, strict=True)])
    with LLM(default_model_path, max_model_len=256) as llm:
        answers.append(llm.generate(texts, asked))
    for one, other in zip(*answers, strict=True):
        found = [fingerprint(one, index) for index in range(5)]
        assert found == [fingerprint(other, index) for index in range(5)]
        assert len({item.text for item in other.outputs}) > 1


RUN = """
import json, sys
import test_one_answer as suite
from fastllm import LLM, _core
with LLM(sys.argv[1], max_model_len=512) as llm:
    outputs = llm.generate(suite.prompts(6), [suite.params(i, 6) for i in range(6)])
print(json.dumps([_core.isa(), [suite.fingerprint(output) for output in outputs]]))
"""


def test_every_instruction_set_gives_the_same_bits(default_model_path: Path) -> None:
    answers = {}
    for isa in _core.supported_isas():
        done = subprocess.run(
            [sys.executable, "-c", RUN, str(default_model_path)],
            env={**os.environ, "FASTLLM_ISA": isa, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=True,
        )
        used, answers[isa] = json.loads(done.stdout)
        assert used == isa
    assert len(answers) == len(_core.supported_isas())
    first = next(iter(answers.values()))
    for isa, answer in answers.items():
        assert answer == first, isa


def test_quantized_cache_gives_one_answer_too(default_model_path: Path) -> None:
    with LLM(default_model_path, max_model_len=512, kv_cache_dtype="int8", threads=1) as llm:
        expected = [fingerprint(llm.generate(prompt, params(i))[0]) for i, prompt in enumerate(prompts(8))]
    with LLM(default_model_path, max_model_len=512, kv_cache_dtype="int8", max_num_batched_tokens=33) as llm:
        outputs = llm.generate(prompts(8), [params(i) for i in range(8)])
    assert [fingerprint(output) for output in outputs] == expected
