"""From model files to answers, through the whole house: `LLM` on tiny checkpoints of both kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from api_fakes import weight_bytes

from fastllm import LLM, CapacityError, RequestError, SamplingParams
from fastllm.outputs import RequestOutput

SMALL: dict[str, Any] = {"kv_cache_tokens": 1024, "max_num_seqs": 8}
LONG = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=3)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama as a directory, its matrices in fp32."""
    return tiny.write("hf", tmp_path_factory.mktemp("hf"))


def answers(outputs: list[RequestOutput]) -> list[Any]:
    """Everything that must not depend on how the requests were computed."""
    return [
        (item.token_ids, item.text, item.logprobs, item.finish_reason) for o in outputs for item in o.outputs
    ]


@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_greedy_tokens_are_those_of_the_model(kind: str, tmp_path: Path) -> None:
    model = tiny.make_model("llama")
    path = tiny.save_hf(model, tmp_path) if kind == "hf" else tiny.save_gguf(model, tmp_path / "m.gguf")
    prompt = tiny.tokens(30)
    expected: list[int] = []
    for _ in range(10):
        logits = tiny.logits(model, [*prompt, *expected])[-1]
        best = np.sort(logits)[-2:]
        assert best[1] - best[0] > 1e-3, "a tie: choose another prompt"
        expected.append(int(logits.argmax()))
    with LLM(path, kv_cache_dtype="fp32", **SMALL) as llm:
        params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
        (output,) = llm.generate({"prompt_token_ids": prompt}, params)
        assert output.outputs[0].token_ids == expected
        assert output.outputs[0].text == llm.get_tokenizer().decode(expected)


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_batch_has_the_bits_that_each_prompt_has_alone(
    directory: Path, quantization: str | None, temperature: float
) -> None:
    prompts: Any = [{"prompt_token_ids": tiny.tokens(1 + 7 * i % 90, seed=i)} for i in range(12)]
    params = [
        SamplingParams(
            temperature=temperature, seed=i, n=1 + i % 2, max_tokens=20, ignore_eos=True, logprobs=3
        )
        for i in range(12)
    ]
    options: dict[str, Any] = {"quantization": quantization, **SMALL}
    with LLM(directory, threads=1, **options) as llm:
        alone = [answers(llm.generate(prompt, given)) for prompt, given in zip(prompts, params, strict=True)]
    expected = [item for part in alone for item in part]
    for more in (
        {"threads": 2},
        {"max_num_batched_tokens": 16, "block_size": 32},  # chunks of prompts
        {"kv_cache_tokens": 256, "max_num_seqs": 12},  # preempted
    ):
        with LLM(directory, **{**options, **more}) as llm:
            assert answers(llm.generate(prompts, params)) == expected


def test_quantizing_takes_less_memory(directory: Path) -> None:
    size = {}
    for quantization in (None, "int8", "int4"):
        with LLM(directory, quantization=quantization, **SMALL) as llm:
            size[quantization] = weight_bytes(llm)
    assert size["int4"] < size["int8"] < size[None] / 3


def test_the_tokenizer_may_come_from_elsewhere(directory: Path, tmp_path: Path) -> None:
    gguf = tiny.write("gguf", tmp_path)
    with LLM(directory, **SMALL) as llm:
        own = llm.get_tokenizer()
    alone = tmp_path / "tokenizer"
    alone.mkdir()
    for file in directory.glob("*token*"):
        (alone / file.name).write_bytes(file.read_bytes())
    for reference in (directory, str(alone), own):
        with LLM(gguf, tokenizer=reference, **SMALL) as llm:
            assert llm.get_tokenizer().encode("some text") == own.encode("some text")
            assert len(llm.generate("some text", LONG)[0].outputs[0].token_ids) == 20
    for wrong in (tmp_path / "nothing", "pypi:", 5, b"bytes"):
        with pytest.raises(RequestError) as caught:
            LLM(gguf, tokenizer=wrong, **SMALL)  # type: ignore[arg-type]
        assert caught.value.field == "tokenizer"


def test_lengths_come_from_model_and_cache(directory: Path) -> None:
    with LLM(directory, **SMALL) as llm:
        assert llm.max_model_len == 256
    with LLM(directory, kv_cache_tokens=33) as llm:
        assert llm.max_model_len == 48
        (output,) = llm.generate(
            {"prompt_token_ids": tiny.tokens(20)}, SamplingParams(max_tokens=None, ignore_eos=True)
        )
        assert len(output.outputs[0].token_ids) == 28
    with pytest.raises(RequestError, match="at most the model's context of 256 tokens"):
        LLM(directory, max_model_len=257)


@pytest.mark.parametrize("share", [1, 0.25])
def test_a_share_of_the_free_memory(
    share: float, directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fastllm.executor.cpu.available_memory", lambda: 8 << 20)
    with caplog.at_level("INFO", logger="fastllm"), LLM(directory, kv_cache_memory_share=share) as llm:
        executor = llm._thread._engine._executor
        per_block = executor._decoder.kv_bytes_per_block(16, "int16")
        assert executor.kv_capacity() == int((8 << 20) * share) // per_block
    assert f"({share:g} of 8.0 MiB free)" in caplog.text


def test_a_share_too_small_for_a_block_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastllm.executor.cpu.available_memory", lambda: 1 << 20)
    with pytest.raises(CapacityError, match="one block of 16 tokens in the KV cache") as caught:
        LLM(directory, kv_cache_memory_share=0.001)
    assert caught.value.had == 1048


def _resident() -> int:
    """Bytes of this process in memory."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


@pytest.mark.model
def test_closing_gives_the_memory_back(default_model_path: Path) -> None:
    llm = LLM(default_model_path, kv_cache_tokens=2048, kv_cache_dtype="fp32")
    weights = weight_bytes(llm)
    llm.generate("The capital of France is" * 100, LONG)
    during = _resident()
    llm.close()
    # The cache too, as far as it was used: 500 tokens of 45 KiB.
    assert during - _resident() > weights + (20 << 20)
