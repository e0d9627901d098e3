"""What the engine's arithmetic costs the default model, as it is loaded by default: held against a float32
reference on the same dequantized weights. What each part contributes: bench/quality.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fidelity
import numpy as np
import pytest
import torch
from fidelity import Float64, Reference

from fastllm import LLM
from fastllm.formats.checkpoint import open_checkpoint
from fastllm.models.registry import spec_from_checkpoint
from fastllm.reference import decoder_forward, decoder_weights

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def reference(default_model_path: Path) -> Iterator[Reference]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # fidelity has its own
    yield Reference(default_model_path)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def llm(default_model_path: Path) -> Iterator[LLM]:
    with LLM(default_model_path) as made:
        yield made


@pytest.fixture(scope="module")
def texts(llm: LLM) -> list[list[int]]:
    """All windows of prose and code."""
    return [window for cut in fidelity.text_windows(llm).values() for window in cut]


@pytest.fixture(scope="module")
def logprobs(llm: LLM, texts: list[list[int]]) -> list[Float64]:
    return fidelity.engine_logprobs(llm, texts)


def test_reference_is_the_decoder_of_the_file(reference: Reference, default_model_path: Path) -> None:
    """Two ways to the logits without a line in common: were rows out of order or the rope another one, both
    would have to be wrong in the same way."""
    ids = [1, 4093, 198, 504, 3575, 282, 4649, 314, 28, 354, 49151, 0, 2, 30]
    with open_checkpoint(default_model_path) as checkpoint:
        spec = spec_from_checkpoint(checkpoint)
        expected = decoder_forward(spec, decoder_weights(checkpoint, spec), ids)
    (got,) = reference.logits([ids])
    assert np.abs(got.numpy() - expected).max() <= 2e-5 * np.abs(expected).max()


def test_perplexity(reference: Reference, texts: list[list[int]], logprobs: list[Float64]) -> None:
    result = fidelity.perplexity(fidelity.reference_logprobs(reference, texts), logprobs)
    assert result.tokens >= 8000
    assert result.reference < 16  # the text is read as text
    assert abs(result.change) <= 0.005, result


def test_perplexity_with_an_int8_cache(
    default_model_path: Path, texts: list[list[int]], logprobs: list[Float64]
) -> None:
    with LLM(default_model_path, kv_cache_dtype="int8") as llm:
        result = fidelity.perplexity(logprobs, fidelity.engine_logprobs(llm, texts))
    assert abs(result.change) <= 0.002, result


def test_greedy_continuations(reference: Reference, llm: LLM) -> None:
    splits = fidelity.greedy_splits(llm, reference)
    assert len(splits) == 20
    apart = {prompt: split for prompt, split in splits.items() if split is not None}
    assert len(apart) <= 6, apart
    assert all(split.regret < 0.3 for split in apart.values()), apart
