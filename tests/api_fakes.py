"""What the tests of `LLM`, `AsyncLLM` and the command line share: engines without a model.

The executor is `fake_executor.FakeExecutor`, whose tokens depend on everything that a real one's would; here
it can also be held between two steps, and notes who called it. The tokenizer knows the same tiny vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fake_executor import PIECES, FakeDetokenizer, FakeExecutor, FakeTokenizer, expected_tokens, full_text

from fastllm import LLM
from fastllm.engine.engine import Engine, EngineConfig
from fastllm.errors import RequestError
from fastllm.executor.base import StepBatch, StepResult
from fastllm.outputs import RequestOutput
from fastllm.sampling_params import SamplingParams

MAX_MODEL_LEN = 60
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
WAIT = 20.0  # seconds after which a test that waits has failed


class ApiTokenizer(FakeTokenizer):
    """FakeTokenizer with what the API asks for besides."""

    def __init__(self) -> None:
        template = "{{ messages }}{% if shout %}!{% endif %}{{ tools }}{{ bos_token }}"
        self.chat_templates = {"default": template}
        self.threads: list[str] = []
        self.chats: list[dict[str, Any]] = []
        self.hold: threading.Event | None = None  # encode waits for it

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        self.threads.append(threading.current_thread().name)
        if self.hold is not None:
            assert self.hold.wait(WAIT)
        if not text.isprintable():
            raise RequestError("text", text, "text that can be printed")
        return [PIECES.index(character.encode()) for character in text]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return full_text(ids, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **arguments: Any) -> list[int]:
        self.chats.append(arguments)
        self.threads.append(threading.current_thread().name)
        return [2, *(token for message in messages for token in self.encode(message["content"]))]


class HeldExecutor(FakeExecutor):
    """Waits before each step while `held`; `steps(n)` lets n of them through.

    Attributes:
        before_step: called at the beginning of each step, on the thread that runs the engine.
        thread_names: who called.
    """

    def __init__(self, *, held: bool = False, **arguments: Any) -> None:
        super().__init__(**{"num_blocks": 128, **arguments})
        self.held = held
        self.thread_names: set[str] = set()
        self.before_step: Callable[[int], None] = lambda number: None
        self._permits = threading.Semaphore(0)
        self._waiting = threading.Semaphore(0)

    def steps(self, count: int) -> None:
        """Let `count` steps through and return when the next one waits."""
        for _ in range(count):
            assert self._waiting.acquire(timeout=WAIT)
            self._permits.release()

    def wait_for_step(self) -> None:
        """Return when a step waits to be let through."""
        assert self._waiting.acquire(timeout=WAIT)
        self._waiting.release()

    def let_go(self) -> None:
        """Hold no step any more."""
        self.held = False
        self._permits.release(1000)

    def run(self, batch: StepBatch) -> StepResult:
        self.thread_names.add(threading.current_thread().name)
        if self.held:
            self._waiting.release()
            assert self._permits.acquire(timeout=WAIT)
        self.before_step(self.num_steps)
        return super().run(batch)


def make_engine(executor: FakeExecutor, hooks: Any = (), **config: Any) -> Engine:
    """An engine over the fake vocabulary."""
    return Engine(
        executor,
        ApiTokenizer(),
        EngineConfig(
            **{"max_model_len": MAX_MODEL_LEN, "max_num_batched_tokens": 32, "max_num_seqs": 16, **config}
        ),
        hooks,
        detokenizer_factory=FakeDetokenizer,
    )


def assert_alone(output: RequestOutput, prompt: Sequence[int], params: SamplingParams) -> None:
    """The finished output is what the prompt gets when nobody else is there."""
    assert output.finished
    assert output.prompt_token_ids == list(prompt)
    limit = (
        MAX_MODEL_LEN if params.max_tokens is None else min(MAX_MODEL_LEN, len(prompt) + params.max_tokens)
    )
    assert [item.index for item in output.outputs] == list(range(params.n))
    for item in output.outputs:
        tokens, reason, stop_reason = expected_tokens(
            prompt, params, limit, index=item.index, seed=output.seed
        )
        assert (item.token_ids, item.finish_reason, item.stop_reason) == (tokens, reason, stop_reason)
        shown = tokens[:-1] if reason == "stop" else tokens
        assert item.text == full_text(shown, skip_special_tokens=params.skip_special_tokens)


def engine_threads() -> list[threading.Thread]:
    """Threads of fastllm that are alive."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("fastllm")]


def weight_bytes(llm: LLM) -> int:
    """What the packed weights of a real model take."""

    def look(engine: Any) -> int:
        return int(engine._executor.weight_bytes)

    return llm._thread.call(look).result(WAIT)
