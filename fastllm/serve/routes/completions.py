"""/v1/completions."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from fastllm.formats.tokenizer import Tokenizer
from fastllm.outputs import CompletionOutput, RequestOutput
from fastllm.serve import logprobs
from fastllm.serve.answers import EventStream, JsonAnswer, to_json
from fastllm.serve.call import Call
from fastllm.serve.errors import HTTPError
from fastllm.serve.generation import Asked, Generation, render_text
from fastllm.serve.protocol.completion import PROMPTS, CompletionRequest
from fastllm.serve.protocol.sampling import form_of, to_params
from fastllm.serve.routes.chat import DONE
from fastllm.serve.routes.common import FINGERPRINT, RESPONSES, begin, now, takes
from fastllm.serve.state import ServerState

router = APIRouter()
DEFAULT_TOKENS = 16  # OpenAI's, where max_tokens is not said


@router.post("/v1/completions", responses=RESPONSES, openapi_extra=takes(CompletionRequest))
async def completions(request: Request) -> Response:
    """Continue prompts. With `stream`, server-sent events."""
    state, call, body = await begin(request, CompletionRequest)
    answer = CompletionAnswer(state, call, body)
    seconds = state.config.limits.request_seconds
    return EventStream(answer.events(), seconds) if body.stream else JsonAnswer(answer.body(), seconds)


class CompletionAnswer:
    """One answer in the making. With `echo` and no tokens to generate, one is computed and left out."""

    def __init__(self, state: ServerState, call: Call, body: CompletionRequest) -> None:
        prompts = body.prompts()
        if not 0 < len(prompts) <= PROMPTS:
            raise HTTPError(400, f"prompt: 1..{PROMPTS} prompts", param="prompt", code="invalid_value")
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise HTTPError(400, "best_of: not supported beyond n", param="best_of", code="unknown_parameter")
        self._body = body
        self._echo = bool(body.echo)
        self._scores_only = self._echo and body.max_tokens == 0
        self._created = now()
        self._wants_prompt = body.logprobs if self._echo else body.prompt_logprobs
        field, form = form_of(body)
        params = to_params(
            body,
            max_tokens=1
            if self._scores_only
            else DEFAULT_TOKENS
            if body.max_tokens is None
            else body.max_tokens,
            logprobs=body.logprobs,
            prompt_logprobs=self._wants_prompt,
            structured_outputs=form,
        )
        self._n = params.n
        self._prompt_entries: dict[int, Any] = {}  # by prompt; a stream has them in its first output alone
        renders = [
            render_text(prompt, f"prompt[{index}]" if len(prompts) > 1 else "prompt")
            for index, prompt in enumerate(prompts)
        ]
        asked = Asked(body.model, renders, params, body.cache_salt, body.priority or 0, form=field)
        self._generation = Generation(state, call, asked, "cmpl")

    # ---- all at once -------------------------------------------------------------------------------------

    async def body(self) -> dict[str, Any]:
        """The answer as JSON."""
        found: dict[int, RequestOutput] = {}
        async with contextlib.aclosing(self._generation.outputs()) as outputs:
            async for index, output in outputs:
                found[index] = output
        tokenizer = await self._generation.served.llm.get_tokenizer()
        choices = [
            self._choice(tokenizer, index, found[index], item)
            for index in sorted(found)
            for item in found[index].outputs
        ]
        if self._scores_only:
            self._generation.usage.generated = 0
        return {**self._head(), "choices": choices, "usage": self._generation.usage.body()}

    def _choice(
        self, tokenizer: Tokenizer, prompt: int, output: RequestOutput, item: CompletionOutput
    ) -> dict[str, Any]:
        before = self._echoed(tokenizer, output)
        prompt_entries = self._prompt_entries.setdefault(prompt, output.prompt_logprobs or [])
        if self._scores_only:
            text, ids, entries = before, [], []
        else:
            text, ids, entries = before + item.text, list(item.token_ids), list(item.logprobs or [])
        found = None
        if self._body.logprobs is not None:
            if self._echo:
                ids = [*output.prompt_token_ids, *ids]
                entries = [*prompt_entries, *entries]
            found = logprobs.of_completion(tokenizer, ids, entries, self._body.logprobs, 0)
        choice = {
            "index": prompt * self._n + item.index,
            "text": text,
            "logprobs": found,
            "finish_reason": "length" if self._scores_only else item.finish_reason,
        }
        if self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = _prompt_logprobs(prompt_entries)
        return choice

    def _echoed(self, tokenizer: Tokenizer, output: RequestOutput) -> str:
        return tokenizer.decode(output.prompt_token_ids) if self._echo else ""

    # ---- in pieces ---------------------------------------------------------------------------------------

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events."""
        generation = self._generation
        begun: dict[int, int] = {}  # choice -> characters so far
        head = b""
        async with contextlib.aclosing(generation.outputs()) as outputs:
            async for prompt, output in outputs:
                if not head:
                    head = b"data: " + to_json(self._head())[:-1] + b',"choices":['
                    tokenizer = await generation.served.llm.get_tokenizer()
                for item in output.outputs:
                    index = prompt * self._n + item.index
                    choice = self._piece(tokenizer, index, output, item, begun)
                    if choice is not None:
                        yield head + to_json(choice) + b"]}\n\n"
        options = self._body.stream_options
        if options is not None and options.include_usage:
            if self._scores_only:
                generation.usage.generated = 0
            yield head + b'],"usage":' + to_json(generation.usage.body()) + b"}\n\n"
        yield DONE

    def _piece(
        self,
        tokenizer: Tokenizer,
        index: int,
        output: RequestOutput,
        item: CompletionOutput,
        begun: dict[int, int],
    ) -> dict[str, Any] | None:
        """A chunk's choice; None where there is nothing new."""
        if self._echo and index not in begun:
            return self._with_prompt(tokenizer, index, output, item, begun)
        if self._scores_only:
            return None
        offset = begun.get(index, 0)
        begun[index] = offset + len(item.text)
        if not (item.text or item.logprobs or item.finish_reason):
            return None
        found = None
        if item.logprobs is not None and self._body.logprobs is not None:
            found = logprobs.of_completion(
                tokenizer, item.token_ids, item.logprobs, self._body.logprobs, offset
            )
        return {"index": index, "text": item.text, "logprobs": found, "finish_reason": item.finish_reason}

    def _with_prompt(
        self,
        tokenizer: Tokenizer,
        index: int,
        output: RequestOutput,
        item: CompletionOutput,
        begun: dict[int, int],
    ) -> dict[str, Any]:
        """A choice's first chunk with echo: the prompt too."""
        choice = self._choice(tokenizer, index // self._n, output, item)
        begun[index] = len(choice["text"])
        return {**choice, "index": index}

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._generation.id,
            "object": "text_completion",
            "created": self._created,
            "model": self._generation.model,
            "system_fingerprint": FINGERPRINT,
        }


def _prompt_logprobs(entries: list[Any]) -> list[Any]:
    """vLLM's shape: of each token of the prompt, its candidates by id."""
    return [
        None
        if entry is None
        else {
            str(token): {"logprob": found.logprob, "rank": found.rank, "decoded_token": found.decoded_token}
            for token, found in entry.items()
        }
        for entry in entries
    ]
