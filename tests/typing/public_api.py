"""What type checkers make of the public names. Read by mypy (.ci/lint), never run.

`assert_type` fails when a type is wider or narrower than written; a `type: ignore` whose line is in order
fails as well, so the wrong calls at the end stay errors.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import assert_type

from fastllm import (
    LLM,
    AsyncLLM,
    CapacityError,
    CompletionOutput,
    EmbeddingOutput,
    FastLLMError,
    Logprob,
    LoRARequest,
    PoolingParams,
    RequestOutput,
    SamplingParams,
    ScoringOutput,
    _core,
    ops,
)
from fastllm.engine.block_pool import BlockPool
from fastllm.engine.engine import Engine
from fastllm.engine.profile import Profile
from fastllm.engine.scheduler import Scheduler
from fastllm.engine.sequence import Sequence as RunningSequence
from fastllm.engine.step_batch import StepBatch
from fastllm.executor import base

Floats = npt.NDArray[np.float32]


def generating(llm: LLM, params: SamplingParams) -> None:
    assert_type(llm.generate("text"), list[RequestOutput])
    assert_type(
        llm.generate(["one", {"prompt": "two"}, {"prompt_token_ids": [1, 2]}], params), list[RequestOutput]
    )
    assert_type(llm.chat([{"role": "user", "content": "Hello"}]), list[RequestOutput])
    assert_type(llm.stream("text", params), Iterator[RequestOutput])
    with LLM("model.gguf", key_file="model.key", sha256="0" * 64, threads=2) as other:
        assert_type(other, LLM)


def embedding(llm: LLM) -> None:
    outputs = llm.embed(["one", {"prompt_token_ids": [1, 2]}], pooling="mean")
    assert_type(outputs, list[EmbeddingOutput])
    assert_type(outputs[0].embedding, Floats)
    assert_type(llm.score("query", ["one", "two"]), list[ScoringOutput])
    assert_type(llm.score("query", "one")[0].score, float)


def sleeping(llm: LLM) -> None:
    llm.sleep(2, mode="wait")
    assert_type(llm.is_sleeping, bool)
    llm.wake_up()


def adapting(llm: LLM, lora: LoRARequest) -> None:
    assert_type(lora.lora_name, str)
    assert_type(llm.add_lora(lora), bool)
    assert_type(llm.generate(["one", "two"], lora_request=[lora, None]), list[RequestOutput])
    assert_type(llm.remove_lora("name"), bool)
    assert_type(llm.list_loras(), list[LoRARequest])


def profiling(llm: LLM) -> None:
    with llm.profile() as profile:
        assert_type(profile, Profile)
        assert_type(profile.decode.parts, dict[str, float])


async def serving(llm: AsyncLLM, params: SamplingParams) -> None:
    stream = llm.generate("text", params, "request-1")
    assert_type(stream, AsyncGenerator[RequestOutput, None])
    async for output in stream:
        assert_type(output.outputs[0].text, str)
    assert_type(await llm.abort("request-1"), None)
    assert_type(llm.encode("text", PoolingParams()), AsyncGenerator[EmbeddingOutput, None])
    await llm.pause_generation(wait_for_inflight_requests=True)
    assert_type(await llm.is_paused(), bool)
    assert_type(await llm.start_profile(), Profile)
    assert_type(await llm.add_lora(LoRARequest("name", "directory")), bool)


def reading(output: RequestOutput) -> None:
    assert_type(output.prompt, str | None)
    assert_type(output.prompt_token_ids, list[int])
    assert_type(output.outputs, list[CompletionOutput])
    completion = output.outputs[0]
    assert_type(completion.token_ids, list[int])
    assert_type(completion.finish_reason, str | None)
    assert_type(completion.stop_reason, int | str | None)
    if completion.logprobs is not None:
        assert_type(completion.logprobs, list[dict[int, Logprob]])
    if output.prompt_logprobs is not None:
        assert_type(output.prompt_logprobs, list[dict[int, Logprob] | None])


def failing(error: CapacityError) -> FastLLMError:
    assert_type(error.asked, int)
    return error


def kernels(x: Floats, scores: Floats, ids: npt.NDArray[np.int32]) -> None:
    w = ops.quantize(x, bits=4)
    assert_type(w, ops.PackedMatrix)
    assert_type(w.layout, str)
    assert_type(ops.matmul(x, w, threads=2), Floats)
    assert_type(ops.embedding(w, ids), Floats)
    assert_type(ops.quantize_rows(x), tuple[npt.NDArray[np.int8], Floats])
    assert_type(ops.sample(scores).tokens, npt.NDArray[np.int32])
    assert_type(_core.supported_isas(), list[str])
    assert_type(_core.logits_summary(scores[0]), tuple[float, float, int])


def engine(engine: Engine, scheduler: Scheduler, sequence: RunningSequence) -> None:
    assert_type(engine.step(), list[RequestOutput | EmbeddingOutput])
    assert_type(engine.load().kv_usage, float)
    assert_type(scheduler.pool, BlockPool)
    assert_type(scheduler.pool.allocate(3), list[int])
    batch = scheduler.schedule()
    assert_type(batch, StepBatch | None)
    assert_type(sequence.finish_reason, str | None)
    if batch is not None:
        contract: base.StepBatch = batch  # the compiled batch is what executors are promised
        assert_type(contract.token_ids, npt.NDArray[np.int32])


def wrong(llm: LLM, x: Floats, prompts: Sequence[Any]) -> None:
    llm.generate(7)  # type: ignore[arg-type]
    llm.generate("text", lora_request="name")  # type: ignore[arg-type]
    llm.generate(prompts, temperature=0)  # type: ignore[call-arg]
    SamplingParams(temprature=0.5)  # type: ignore[call-arg]
    ops.matmul(x, x)  # type: ignore[call-overload]
    _core.isa("avx2")  # type: ignore[call-arg]
    BlockPool(4, 16).num_blocks = 5  # type: ignore[misc]
