"""From a request's prompts to the outputs of an engine: name, limits, tokens, order.

    lease on a model ──► token ids, off the event loop ──► a seat in the queue ──► AsyncLLM ──► outputs

Everything is given back when the generator ends, in whatever way: by itself, by an error, or because the
client has left and it was closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastllm.errors import RequestError
from fastllm.formats.tokenizer import Tokenizer
from fastllm.lora import LoRARequest
from fastllm.outputs import RequestOutput
from fastllm.prompts import Prompt, tokenize
from fastllm.sampling_params import SamplingParams
from fastllm.serve.call import Call
from fastllm.serve.errors import HTTPError
from fastllm.serve.models import Served
from fastllm.serve.state import ServerState

if TYPE_CHECKING:
    from fastllm.serve.tracing import TracingHook

Render = Callable[[Tokenizer], Sequence[int]]
"""Makes the token ids of a prompt; called in a thread of its own, unless it is `TokenIds`."""

_renderers = ThreadPoolExecutor(2, thread_name_prefix="fastllm-render")


@dataclass(frozen=True, slots=True)
class TokenIds:
    """A `Render` of token ids: nothing that takes long."""

    prompt: Prompt
    place: str

    def __call__(self, tokenizer: Tokenizer) -> Sequence[int]:
        return tokenize(tokenizer, self.prompt, self.place)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request for text.

    Attributes:
        model: as the request calls it.
        prompts: how each becomes tokens.
        params: for all of them.
        cache_salt, priority: as the request has them.
        place: what an error calls the prompts.
        form: the field that asks for the answer's form, if one does.
        settle: the parameters that are used in the end, once the prompts are tokens; None: `params`.
    """

    model: str | None
    prompts: Sequence[Render]
    params: SamplingParams
    cache_salt: str | None = None
    priority: int = 0
    place: str = "prompt"
    form: str = ""
    settle: Callable[[], SamplingParams] | None = None


@dataclass(slots=True)
class Usage:
    """Tokens of a request so far."""

    prompt: int = 0
    cached: int = 0
    generated: int = 0
    reasoning: int = 0  # of the generated ones

    def body(self) -> dict[str, Any]:
        """OpenAI's `usage`."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.generated,
            "total_tokens": self.prompt + self.generated,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning},
        }


class Generation:
    """One request on its way through an engine.

    Attributes:
        id: of the answer, such as "chatcmpl-...".
        model: what the answer calls the model.
        served: the version that answers, once `outputs` has begun.
        usage: so far.
        form: the field that asks for the answer's form.
    """

    def __init__(self, state: ServerState, call: Call, asked: Asked, prefix: str) -> None:
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self.usage = Usage()
        self.form = asked.form
        self.served: Served
        self.model = ""
        self._state = state
        self._call = call
        self._asked = asked
        self._counted: set[int] = set()  # prompts whose tokens are in usage
        self._reasons: dict[tuple[int, int], str] = {}

    async def outputs(self) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """Outputs with the number of their prompt, as they come.

        Raises (in the iteration):
            HTTPError: no such model, a limit is exceeded, or no next token could be computed.
            FastLLMError: as `AsyncLLM.generate`.
        """
        asked = self._asked
        sequences = len(asked.prompts) * asked.params.n
        most = self._state.config.limits.sequences
        if sequences > most:
            raise HTTPError(
                400, f"{sequences} answers are asked for, at most {most} are allowed", param="n",
                code="invalid_value",
            )  # fmt: skip
        async with self._state.models.lease(asked.model) as (served, lora):
            self.served = served
            self.model = self._call.model = asked.model or served.source.name
            self._call.version = served.source.version
            async with self._state.admission.enter(self._call, served.seats, sequences):
                prompts = await token_ids(self._state, served, asked.prompts, asked.place)
                params = asked.params if asked.settle is None else asked.settle()
                merged = _merged(
                    [self._one(served, lora, params, index, ids) for index, ids in enumerate(prompts)]
                )
                try:
                    async with contextlib.aclosing(merged) as outputs:
                        async for index, output in outputs:
                            self._note(index, output)
                            yield index, output
                except RequestError as error:  # in the engine's words
                    names = {"prompt_token_ids": asked.place, "structured_outputs": self.form}
                    field = names.get(error.field) or error.field
                    raise RequestError(field, error.value, error.limit) from error

    def _one(
        self,
        served: Served,
        lora: LoRARequest | None,
        params: SamplingParams,
        index: int,
        ids: Sequence[int],
    ) -> AsyncGenerator[RequestOutput, None]:
        salt = self._state.cache_salt(self._call, self._asked.cache_salt)
        request_id = f"{self.id}-{index}"
        outputs = served.llm.generate(
            {"prompt_token_ids": ids, "cache_salt": salt},
            params,
            request_id,
            lora_request=lora,
            priority=self._asked.priority,
        )
        if served.tracing is None:
            return outputs
        operation = "text_completion" if self.id.startswith("cmpl") else "chat"
        served.tracing.begin(request_id, self._call.trace, operation=operation)
        return _traced(outputs, served.tracing, request_id)

    def _failed(self) -> HTTPError:
        """A choice has no next token: by what the request restricts, or by the model's fault."""
        if not self._asked.params.constrained and not self.form:
            return HTTPError(500, "no next token could be computed", code="generation_failed")
        message = "what the answer is restricted to leaves no next token, or is too complex"
        return HTTPError(400, message, param=self.form or None, code="generation_failed")

    def _note(self, prompt: int, output: RequestOutput) -> None:
        """Count, and keep what the audit log wants."""
        usage, call = self.usage, self._call
        if prompt not in self._counted:
            self._counted.add(prompt)
            usage.prompt += len(output.prompt_token_ids)
            usage.cached += output.num_cached_tokens
            call.prompt_tokens, call.cached_tokens = usage.prompt, usage.cached
        for choice in output.outputs:
            usage.generated += len(choice.token_ids)
            if choice.finish_reason is not None:
                self._reasons[prompt, choice.index] = choice.finish_reason
                if choice.finish_reason == "error":
                    raise self._failed()
            call.answered(prompt, choice.index, choice.text)
        call.generated_tokens = usage.generated
        call.finish_reasons = [self._reasons[key] for key in sorted(self._reasons)]


async def _traced(
    outputs: AsyncGenerator[RequestOutput, None], tracing: TracingHook, request_id: str
) -> AsyncGenerator[RequestOutput, None]:
    """The same outputs; the trace hears of an end that the engine does not tell it."""
    try:
        async with contextlib.aclosing(outputs) as items:
            async for output in items:
                yield output
    except BaseException as error:
        tracing.fail(request_id, error)
        raise


async def token_ids(
    state: ServerState, served: Served, renders: Sequence[Render], place: str
) -> list[Sequence[int]]:
    """Token ids of prompts, made off the event loop; none has too many.

    Raises:
        HTTPError: one has.
        RequestError: as the renders do.
    """
    tokenizer = await served.llm.get_tokenizer()
    loop = asyncio.get_running_loop()
    most = served.llm.max_model_len - 1
    if state.config.limits.prompt_tokens is not None:
        most = min(most, state.config.limits.prompt_tokens)
    found = []
    for render in renders:
        if isinstance(render, TokenIds):
            ids = render(tokenizer)
        else:
            ids = await loop.run_in_executor(_renderers, render, tokenizer)
        if len(ids) > most:
            message = f"{place}: {len(ids)} tokens, at most {most} are allowed"
            raise HTTPError(400, message, param=place, code="context_length_exceeded")
        found.append(ids)
    return found


async def _merged(
    generators: Sequence[AsyncGenerator[RequestOutput, None]],
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """What several generators yield, with their number, in the order in which it comes."""
    if len(generators) == 1:
        async with contextlib.aclosing(generators[0]) as only:
            async for output in only:
                yield 0, output
        return
    queue: asyncio.Queue[tuple[int, RequestOutput] | Exception | None] = asyncio.Queue(maxsize=1)

    async def pass_on(index: int, generator: AsyncGenerator[RequestOutput, None]) -> None:
        try:
            async with contextlib.aclosing(generator) as items:
                async for output in items:
                    await queue.put((index, output))
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)

    tasks = [asyncio.ensure_future(pass_on(index, item)) for index, item in enumerate(generators)]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if item is None:
                left -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def render_text(prompt: str | Sequence[int], place: str) -> Render:
    """A prompt of /v1/completions: text, which gets the BOS that the model wants, or token ids."""
    if not isinstance(prompt, str):
        return TokenIds(Prompt(None, prompt), place)
    parsed = Prompt(prompt)
    return lambda tokenizer: tokenize(tokenizer, parsed, place)
