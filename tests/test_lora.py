"""LoRA adapters through `LLM` and `AsyncLLM`: loaded, named, unloaded, and one answer whatever the batch."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import tiny
from api_fakes import GREEDY, WAIT, ApiTokenizer, HeldExecutor, engine_threads, make_engine
from fake_executor import expected_tokens
from lora_files import edit_config, merge, save_adapter
from test_one_answer import fingerprint

from fastllm import (
    LLM,
    AsyncLLM,
    CapacityError,
    EngineDeadError,
    LoRARequest,
    ModelFileError,
    PoolingParams,
    RequestError,
    RequestOutput,
    SamplingParams,
    UnsupportedModelError,
    _core,
)

PROMPT = {"prompt_token_ids": [2, 3, 4, 5]}


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(engine_threads())
    yield
    gc.collect()
    deadline = time.monotonic() + WAIT
    while set(engine_threads()) - before and time.monotonic() < deadline:
        time.sleep(0.005)
    assert set(engine_threads()) <= before


def make(executor: HeldExecutor | None = None, **config: Any) -> LLM:
    return LLM._from_parts(make_engine(executor or HeldExecutor(), **config), ApiTokenizer())  # type: ignore[arg-type]


def make_async(executor: HeldExecutor | None = None, **config: Any) -> AsyncLLM:
    tokenizer: Any = ApiTokenizer()
    return AsyncLLM._from_parts(make_engine(executor or HeldExecutor(), **config), tokenizer)


def file(place: Path, name: str) -> LoRARequest:
    """An adapter for the fake executor."""
    (place / name).write_text(name)
    return LoRARequest(name, place / name)


def assert_answer(output: RequestOutput, adapter: str | None) -> None:
    digest = None if adapter is None else hashlib.sha256(adapter.encode()).digest()
    expected = expected_tokens(
        output.prompt_token_ids, GREEDY, len(output.prompt_token_ids) + 12, adapter=digest
    )
    assert output.finished
    assert output.outputs[0].token_ids == expected[0]


# ---- requests --------------------------------------------------------------------------------------------


def test_lora_request() -> None:
    request = LoRARequest("x", "/somewhere")
    assert (request.lora_name, request.lora_path) == ("x", "/somewhere")
    assert LoRARequest("x") == LoRARequest("x", None)
    assert hash(request) == hash(LoRARequest("x", "/somewhere"))
    with pytest.raises(FrozenInstanceError):
        request.lora_name = "y"  # type: ignore[misc]
    for name in ("", 5, None, "x" * 2000):
        with pytest.raises(RequestError, match="lora_name"):
            LoRARequest(name)  # type: ignore[arg-type]
    for path in (5, "", b"x"):
        with pytest.raises(RequestError, match="lora_path"):
            LoRARequest("x", path)  # type: ignore[arg-type]


def test_one_for_all_one_for_each_and_none(tmp_path: Path) -> None:
    x, y = file(tmp_path, "x"), file(tmp_path, "y")
    with make() as llm:
        for output in llm.generate([PROMPT, PROMPT], GREEDY, lora_request=x):
            assert_answer(output, "x")
        outputs = llm.generate([PROMPT] * 4, GREEDY, lora_request=[y, None, LoRARequest("x"), y])
        for output, name in zip(outputs, ("y", None, "x", "y"), strict=True):
            assert_answer(output, name)
        messages = [{"role": "user", "content": "abc"}]
        assert_answer(llm.chat(messages, GREEDY, lora_request=x)[0], "x")
        outputs = llm.chat([messages, messages], GREEDY, lora_request=[None, y])
        for output, name in zip(outputs, (None, "y"), strict=True):
            assert_answer(output, name)
        pieces = list(llm.stream(PROMPT, GREEDY, lora_request=y))
        found = [token for piece in pieces for token in piece.outputs[0].token_ids]
        assert found == llm.generate(PROMPT, GREEDY, lora_request=LoRARequest("y"))[0].outputs[0].token_ids
        assert llm.list_loras() == [x, y]


def test_what_is_refused_begins_nothing(tmp_path: Path) -> None:
    x = file(tmp_path, "x")
    executor = HeldExecutor()
    with make(executor) as llm:
        unknown = LoRARequest("unknown")
        for wrong, field in (
            (unknown, "adapter"),
            (LoRARequest("y", tmp_path / "nowhere"), "lora_path"),
            ("x", "lora_request"),
            ([x], "lora_request"),
            ([x, "x"], r"lora_request\[1\]"),
        ):
            with pytest.raises(RequestError, match=field):
                llm.generate([PROMPT, PROMPT], GREEDY, lora_request=wrong)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match=r"\Aprompts\[1\]: adapter: .*now: x\), got 'unknown'"):
            llm.generate([PROMPT, PROMPT], GREEDY, lora_request=[x, unknown])
        with pytest.raises(RequestError, match="adapter"):
            next(llm.stream(PROMPT, GREEDY, lora_request=unknown))
        (tmp_path / "other").mkdir()
        with pytest.raises(RequestError, match=r"lora_path: .*where the loaded 'x' is from"):
            llm.generate(PROMPT, GREEDY, lora_request=file(tmp_path / "other", "x"))
        assert executor.num_steps == 0
        assert_answer(llm.generate(PROMPT, GREEDY)[0], None)


def test_add_remove_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    x, y, z = (file(tmp_path, name) for name in "xyz")
    executor = HeldExecutor()
    with make(executor, max_loras=2) as llm, caplog.at_level(logging.INFO, "fastllm.engine.adapters"):
        assert llm.add_lora(x)
        assert not llm.add_lora(x)
        assert not llm.add_lora(LoRARequest("x"))
        monkeypatch.chdir(tmp_path)
        assert not llm.add_lora(LoRARequest("x", "x"))
        assert llm.add_lora(LoRARequest("y", "y"))
        assert llm.list_loras() == [x, y]
        with pytest.raises(CapacityError, match="asked 3 adapters, had 2"):
            llm.add_lora(z)
        with pytest.raises(CapacityError, match="asked 3 adapters, had 2"):
            llm.generate(PROMPT, GREEDY, lora_request=z)
        assert llm.remove_lora("x")
        assert not llm.remove_lora("x")
        assert llm.add_lora(z)
        assert llm.list_loras() == [y, z]
        for bad in (None, "x", 5):
            with pytest.raises(RequestError, match="lora_request"):
                llm.add_lora(bad)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="lora_path: expected a directory"):
            llm.add_lora(LoRARequest("w"))
        with pytest.raises(RequestError, match="lora_name"):
            llm.remove_lora(5)  # type: ignore[arg-type]
        assert_answer(llm.generate(PROMPT, GREEDY, lora_request=z)[0], "z")
    assert "2 of 2 adapters, 2.0 KiB together" in caplog.text
    for call in (lambda: llm.add_lora(x), lambda: llm.remove_lora("y"), llm.list_loras):
        with pytest.raises(EngineDeadError):
            call()


def test_steps_go_on_while_an_adapter_is_read(tmp_path: Path) -> None:
    """Reading takes place on the caller's thread, and takes as long as it likes."""
    executor = HeldExecutor()
    reading, go_on = threading.Event(), threading.Event()
    readers: list[str] = []

    def before_read() -> None:
        readers.append(threading.current_thread().name)
        reading.set()
        assert go_on.wait(WAIT)

    executor.before_read = before_read
    x = file(tmp_path, "x")
    with make(executor) as llm, ThreadPoolExecutor(4, thread_name_prefix="caller") as callers:
        asked = [callers.submit(llm.generate, PROMPT, GREEDY, lora_request=x) for _ in range(3)]
        assert reading.wait(WAIT)
        assert_answer(llm.generate(PROMPT, GREEDY)[0], None)
        go_on.set()
        for future in asked:
            assert_answer(future.result(WAIT)[0], "x")
    assert len(readers) == 1  # for all three
    assert readers[0].startswith("caller")


def test_unloading_while_it_is_used(tmp_path: Path) -> None:
    executor = HeldExecutor(held=True)
    x = file(tmp_path, "x")
    with make(executor) as llm, ThreadPoolExecutor(2) as callers:
        llm.add_lora(x)
        running = callers.submit(llm.generate, PROMPT, GREEDY, lora_request=x)
        executor.steps(3)
        removing = callers.submit(llm.remove_lora, "x")
        executor.steps(1)
        assert removing.result(WAIT)
        assert llm.list_loras() == []
        assert sorted(executor.adapters) == [0]
        executor.let_go()
        assert_answer(running.result(WAIT)[0], "x")
        with pytest.raises(RequestError, match="adapter"):
            llm.generate(PROMPT, GREEDY, lora_request=LoRARequest("x"))
        assert executor.adapters == {}


# ---- AsyncLLM --------------------------------------------------------------------------------------------


async def last(llm: AsyncLLM, lora: LoRARequest | None, request_id: str | None = None) -> RequestOutput:
    outputs = [output async for output in llm.generate(PROMPT, GREEDY, request_id, lora_request=lora)]  # type: ignore[arg-type]
    return outputs[-1]


async def test_async(tmp_path: Path) -> None:
    x, y, z = (file(tmp_path, name) for name in "xyz")
    reads: list[str] = []
    executor = HeldExecutor()
    executor.before_read = lambda: reads.append(threading.current_thread().name)
    async with make_async(executor, max_loras=2) as llm:
        loras: Sequence[LoRARequest | None] = (x, None, y, x, LoRARequest("y"), y)
        first = await asyncio.gather(last(llm, x), last(llm, None), last(llm, y), last(llm, x))
        for output, name in zip(first, ("x", None, "y", "x"), strict=True):
            assert_answer(output, name)
        answers = await asyncio.gather(*(last(llm, lora) for lora in loras))
        for output, lora in zip(answers, loras, strict=True):
            assert_answer(output, None if lora is None else lora.lora_name)
        assert len(reads) == 2
        assert all(name.startswith("fastllm-adapter") for name in reads)
        chat = llm.chat([{"role": "user", "content": "ab"}], GREEDY, lora_request=x)
        assert_answer([output async for output in chat][-1], "x")
        assert set(await llm.list_loras()) == {x, y}
        assert not await llm.add_lora(x)
        with pytest.raises(CapacityError):
            await llm.add_lora(z)
        with pytest.raises(CapacityError):
            await last(llm, z)
        assert await llm.remove_lora("x")
        assert not await llm.remove_lora("x")
        with pytest.raises(RequestError, match="adapter"):
            await last(llm, LoRARequest("x"))
        with pytest.raises(RequestError, match="lora_request"):
            llm.generate(PROMPT, GREEDY, lora_request="y")  # type: ignore[arg-type]
        assert await llm.add_lora(z)
        assert_answer(await last(llm, LoRARequest("z")), "z")
        removing = asyncio.create_task(llm.remove_lora("z"))
        await asyncio.sleep(0)
        removing.cancel()
        assert_answer(await last(llm, None), None)  # the engine goes on
        assert z not in await llm.list_loras()
    with pytest.raises(EngineDeadError):
        await llm.add_lora(x)
    with pytest.raises(EngineDeadError):
        await llm.list_loras()


async def test_aborted_while_its_adapter_is_read(tmp_path: Path) -> None:
    executor = HeldExecutor()
    reading, go_on = threading.Event(), threading.Event()

    def before_read() -> None:
        reading.set()
        assert go_on.wait(WAIT)

    executor.before_read = before_read
    async with make_async(executor) as llm:
        task = asyncio.create_task(last(llm, file(tmp_path, "x"), "a"))
        assert await asyncio.to_thread(reading.wait, WAIT)
        assert_answer(await last(llm, None), None)  # the event loop and the engine go on
        await llm.abort("a")
        go_on.set()
        output = await task
        assert output.outputs[0].finish_reason == "abort"
        assert not output.outputs[0].token_ids


async def test_closed_while_an_adapter_is_read(tmp_path: Path) -> None:
    executor = HeldExecutor()
    reading, go_on = threading.Event(), threading.Event()

    def before_read() -> None:
        reading.set()
        assert go_on.wait(WAIT)

    executor.before_read = before_read
    llm = make_async(executor)
    task = asyncio.create_task(last(llm, file(tmp_path, "x")))
    assert await asyncio.to_thread(reading.wait, WAIT)
    closing = asyncio.create_task(llm.aclose())
    go_on.set()
    await closing
    with pytest.raises(EngineDeadError):
        await task


# ---- a real model ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.make_model("llama", **tiny.WIDE)


@pytest.fixture(scope="module")
def path(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_gguf(model, tmp_path_factory.mktemp("model") / "model.gguf", dtype="Q8_0")


@pytest.fixture(scope="module")
def adapters(model: Any, tmp_path_factory: pytest.TempPathFactory) -> list[LoRARequest]:
    place = tmp_path_factory.mktemp("adapters")
    save_adapter(place / "all", model, rank=6, seed=1)
    save_adapter(place / "attention", model, rank=16, seed=2, targets=("q_proj", "v_proj"), dtype="BF16")
    save_adapter(place / "mlp", model, rank=3, seed=3, targets=("up_proj", "down_proj"), rslora=True)
    return [LoRARequest(name, place / name) for name in ("all", "attention", "mlp")]


def prompts(count: int) -> list[Any]:
    """Some begin alike, for several blocks."""
    common = tiny.tokens(40, seed=99)
    return [
        {"prompt_token_ids": (common if i % 2 else []) + tiny.tokens(3 + 5 * (i % 7), seed=i)}
        for i in range(count)
    ]


def params(index: int) -> SamplingParams:
    kinds: tuple[dict[str, Any], ...] = (
        {"temperature": 0.0},
        {"temperature": 0.9},
        {"temperature": 0.7, "top_k": 20},
    )
    return SamplingParams(**kinds[index % 3], seed=index, max_tokens=20, ignore_eos=True, logprobs=2)


def loras(adapters: list[LoRARequest], count: int) -> list[LoRARequest | None]:
    return [(None, *adapters)[i % 4] for i in range(count)]


COUNT = 24


@pytest.fixture(scope="module")
def alone(path: Path, adapters: list[LoRARequest]) -> list[Any]:
    """Answers of requests that had the engine to themselves, one thread, nothing shared."""
    with LLM(path, max_model_len=128, threads=1, enable_prefix_caching=False) as llm:
        return [
            fingerprint(llm.generate(prompt, params(i), lora_request=lora)[0])
            for i, (prompt, lora) in enumerate(zip(prompts(COUNT), loras(adapters, COUNT), strict=True))
        ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"threads": 1},
        {"threads": 2},
        {"max_num_batched_tokens": 7},
        {"kv_cache_tokens": 192, "max_model_len": 96},
        {"block_size": 64},
    ],
    ids=str,
)
def test_one_answer(
    options: dict[str, Any], path: Path, adapters: list[LoRARequest], alone: list[Any]
) -> None:
    """The same token ids and bits of log-probabilities in a batch of three adapters and none, whatever the
    chunks, preempted, with prefix hits, on any number of threads."""
    with LLM(path, **{"max_model_len": 128, **options}) as llm:
        preemptions = 0
        for time_ in range(2):
            outputs = llm.generate(
                prompts(COUNT), [params(i) for i in range(COUNT)], lora_request=loras(adapters, COUNT)
            )
            assert [fingerprint(output) for output in outputs] == alone
            preemptions += sum(output.metrics.num_preemptions for output in outputs)
            if time_ and "kv_cache_tokens" not in options and options.get("block_size") != 64:
                assert min(output.num_cached_tokens for output in outputs[1::2]) >= 32
        if "kv_cache_tokens" in options:
            assert preemptions > 0
        assert len({str(answer) for answer in alone}) == COUNT

        def check(engine: Any) -> tuple[int, int]:
            engine.check()
            return engine.pool.num_free, engine.pool.num_blocks

        free, blocks = llm._thread.call(check).result(WAIT)
        assert free == blocks


def test_answers_are_those_of_the_merged_model(model: Any, tmp_path: Path) -> None:
    """Greedy tokens of the adapter on an fp32 model are those of `transformers` with the merged weights."""
    saved = save_adapter(tmp_path / "adapter", model, seed=4)
    merged = merge(model, saved)
    ids = tiny.tokens(12)
    with LLM(tiny.save_hf(model, tmp_path), max_model_len=64, kv_cache_dtype="fp32") as llm:
        output = llm.generate(
            {"prompt_token_ids": ids},
            SamplingParams(temperature=0, max_tokens=10, ignore_eos=True),
            lora_request=LoRARequest("x", saved.path),
        )[0]
    expected = list(ids)
    for _ in range(10):
        expected.append(int(tiny.logits(merged, expected)[-1].argmax()))
    assert output.outputs[0].token_ids == expected[12:]


def test_embeddings_have_adapters_too(path: Path, adapters: list[LoRARequest]) -> None:
    """Each prompt its own, in one batch, on both surfaces; they are loaded with the first request."""
    batch = prompts(8)
    with LLM(path, max_model_len=128, enable_prefix_caching=False) as llm:
        alone = [
            llm.embed(prompt, pooling="mean", lora_request=lora)[0].embedding
            for prompt, lora in zip(batch, loras(adapters, 8), strict=True)
        ]
        plain = llm.embed(batch, pooling="mean")
        for output, lora, embedding in zip(plain, loras(adapters, 8), alone, strict=True):
            assert (output.embedding.tobytes() == embedding.tobytes()) == (lora is None)
        scored = llm.score(batch[0], batch[1], lora_request=adapters[0], pooling="mean")[0].score
        assert scored != llm.score(batch[0], batch[1], pooling="mean")[0].score
        with pytest.raises(RequestError, match="lora_request"):
            llm.embed(batch, lora_request=[None])
        with pytest.raises(RequestError, match="adapter"):
            llm.score(batch[0], batch[1], lora_request=LoRARequest("unknown"))
    with LLM(path, max_model_len=128) as llm:
        outputs = llm.embed(batch, pooling="mean", lora_request=loras(adapters, 8))
        assert [output.embedding.tobytes() for output in outputs] == [item.tobytes() for item in alone]

    async def encode() -> bytes:
        async with AsyncLLM(path, max_model_len=128) as llm:
            pooling = PoolingParams(pooling="mean")
            outputs = [item async for item in llm.encode(batch[1], pooling, lora_request=adapters[0])]
            return outputs[0].embedding.tobytes()

    assert asyncio.run(encode()) == alone[1].tobytes()


RUN = """
import json, sys
import test_lora as suite
from fastllm import LLM, LoRARequest, _core
adapters = [LoRARequest(str(i), path) for i, path in enumerate(sys.argv[2:])]
with LLM(sys.argv[1], max_model_len=128) as llm:
    outputs = llm.generate(
        suite.prompts(8), [suite.params(i) for i in range(8)], lora_request=suite.loras(adapters, 8)
    )
print(json.dumps([_core.isa(), [suite.fingerprint(output) for output in outputs]]))
"""


def test_every_instruction_set_gives_the_same_bits(
    path: Path, adapters: list[LoRARequest], alone: list[Any]
) -> None:
    for isa in _core.supported_isas():
        done = subprocess.run(
            [sys.executable, "-c", RUN, str(path), *(str(item.lora_path) for item in adapters)],
            env={**os.environ, "FASTLLM_ISA": isa, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=True,
        )
        used, answers = json.loads(done.stdout)
        assert used == isa
        assert answers == json.loads(json.dumps(alone[:8]))


def test_bad_adapters_and_the_engine_goes_on(
    model: Any, path: Path, adapters: list[LoRARequest], alone: list[Any], tmp_path: Path
) -> None:
    small = tiny.make_model("llama")
    dora = save_adapter(tmp_path / "dora", model).path
    edit_config(dora, use_dora=True)
    with LLM(path, max_model_len=128, max_loras=1) as llm:
        with pytest.raises(ModelFileError, match=r"expected shape \(r = 4, inputs = 512\), found \(4, 96\)"):
            llm.add_lora(LoRARequest("small", save_adapter(tmp_path / "small", small).path))
        with pytest.raises(UnsupportedModelError, match="DoRA"):
            llm.generate("text", lora_request=LoRARequest("dora", dora))
        with pytest.raises(RequestError, match="lora_path"):
            llm.add_lora(LoRARequest("nowhere", tmp_path / "nowhere"))
        assert llm.list_loras() == []
        output = llm.generate(prompts(2)[1], params(1), lora_request=adapters[0])[0]
        assert fingerprint(output) == alone[1]
        with pytest.raises(CapacityError, match="max_loras"):
            llm.add_lora(adapters[1])
        assert llm.remove_lora("all")
        assert llm.add_lora(adapters[1])
        output = llm.generate(prompts(3)[2], params(2), lora_request=LoRARequest("attention"))[0]
        assert fingerprint(output) == alone[2]
    for value in (-1, 257, True, "8"):
        with pytest.raises(RequestError, match="max_loras"):
            LLM(path, max_loras=value)  # type: ignore[arg-type]
