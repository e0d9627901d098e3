"""A conversation and its answer, before they have the shape of any API.

/v1/chat/completions, /v1/responses and /v1/messages each turn their body into a `Conversation`, and the
answer's events into their own. In between it is the same for all:

    messages ──normalize──► chat template ──► token ids + lead ──► Generation ──► AnswerParser ──► events
                                  └── plan_answer: grammar of tool calls, control tokens kept or not
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastllm.errors import RequestError
from fastllm.formats.detokenizer import IncrementalDetokenizer
from fastllm.formats.tokenizer import Tokenizer
from fastllm.outputs import CompletionOutput
from fastllm.prompts import render_chat
from fastllm.sampling_params import SamplingParams
from fastllm.serve.call import Call
from fastllm.serve.errors import HTTPError
from fastllm.serve.generation import Asked, Generation
from fastllm.serve.models import Served
from fastllm.serve.parsers import (
    AnswerParser,
    AnswerPlan,
    ArgumentsDelta,
    CallBegun,
    Content,
    Event,
    Finished,
    Reasoning,
    ToolChoice,
    normalize_messages,
    plan_answer,
)
from fastllm.serve.state import ServerState

END_TOKENS = 32  # of a prompt, which say whether it leaves reasoning open


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What an answer is wanted to.

    Attributes:
        model: as the request calls it.
        messages: in OpenAI's form.
        params: for the answer; what tool calls need is added.
        choice: tools that may be called.
        template_kwargs: further values for the chat template, which must read them.
        template_hints: the same where it does not matter whether it does.
        template_fields: the same with the request's field that says so, which is what an error names.
        add_generation_prompt: whether the prompt ends with the opening of the answer.
        form: the field that asks for the answer's form, if one does.
        cache_salt, priority: as the request has them.
        thinking_tokens: the budget for reasoning; None: none.
    """

    model: str | None
    messages: Sequence[Mapping[str, Any]]
    params: SamplingParams
    choice: ToolChoice = field(default_factory=ToolChoice)
    template_kwargs: Mapping[str, Any] | None = None
    template_hints: Mapping[str, Any] = field(default_factory=dict)
    template_fields: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    add_generation_prompt: bool = True
    form: str = ""
    cache_salt: str | None = None
    priority: int = 0
    thinking_tokens: int | None = None


@dataclass(slots=True)
class ToolCall:
    """A call in an answer; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class Choice:
    """One of the n answers, read to its end.

    Attributes:
        item: what the engine gave.
        content, reasoning: texts.
        calls: in order.
        finish_reason: "stop", "length" or "tool_calls".
    """

    item: CompletionOutput
    content: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    finish_reason: str = ""


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new of one of the n answers.

    Attributes:
        index: which.
        events: as the parsers have them, `Finished` left out.
        item: what the engine gave.
        finish_reason: as of `Choice`; None while it goes on.
    """

    index: int
    events: list[Event]
    item: CompletionOutput
    finish_reason: str | None


class Answer:
    """The answer to one conversation: `choices` at once or `pieces` as they come.

    Attributes:
        generation: has the answer's id, the model's name and the usage.
    """

    def __init__(self, state: ServerState, call: Call, conversation: Conversation, prefix: str) -> None:
        self._state = state
        self._conversation = conversation
        self._plan: AnswerPlan
        asked = Asked(
            conversation.model,
            [self._render],
            conversation.params,
            conversation.cache_salt,
            conversation.priority,
            "messages",
            conversation.form,
            self._settle,
        )
        self.generation = Generation(state, call, asked, prefix)

    async def choices(self) -> list[Choice]:
        """All n answers."""
        async with contextlib.aclosing(self.generation.outputs()) as outputs:
            async for _, output in outputs:
                last = output
        return [self._choice(item) for item in last.outputs]

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """What is new, as it comes; for parameters whose outputs are deltas."""
        parsers: dict[int, AnswerParser] = {}
        counters: dict[int, _ReasoningCounter | None] = {}
        alone = self._conversation.params.n == 1
        async with contextlib.aclosing(self.generation.outputs()) as outputs:
            async for _, output in outputs:
                for item in output.outputs:
                    parser = parsers.get(item.index)
                    if parser is None:
                        parser = parsers[item.index] = self._plan.parser(stream_arguments=True)
                        counters[item.index] = self._counter(parser)
                    events = parser.feed(item.text)
                    counter = counters[item.index]
                    if counter is not None:
                        self.generation.usage.reasoning += counter.read(item.token_ids)
                    ended = item.finish_reason is not None or (alone and parser.done)
                    reason = None
                    if ended:
                        *rest, finished = parser.finish()
                        assert isinstance(finished, Finished)
                        events += rest
                        reason = _reason(item, finished)
                    yield Piece(item.index, events, item, reason)
                    if ended and item.finish_reason is None:  # what would follow the call matters to nobody
                        return

    def _choice(self, item: CompletionOutput) -> Choice:
        choice = Choice(item)
        parser = self._plan.parser()
        counter = self._counter(parser)
        *events, finished = [*parser.feed(item.text), *parser.finish()]
        assert isinstance(finished, Finished)
        for event in events:
            if isinstance(event, Content):
                choice.content += event.text
            elif isinstance(event, Reasoning):
                choice.reasoning += event.text
            elif isinstance(event, CallBegun):
                choice.calls.append(ToolCall(event.id, event.name))
            elif isinstance(event, ArgumentsDelta):
                choice.calls[event.index].arguments += event.text
        choice.finish_reason = _reason(item, finished)
        if counter is not None:
            self.generation.usage.reasoning += counter.read(item.token_ids)
        return choice

    def _counter(self, parser: AnswerParser) -> _ReasoningCounter | None:
        """For an answer whose parser has not begun; None where it cannot reason."""
        if not parser.counts:
            return None
        skip = self._conversation.params.skip_special_tokens and self._plan.skip_special_tokens
        return _ReasoningCounter(
            self._plan.parser(),
            IncrementalDetokenizer(self.generation.served.llm.tokenizer, skip_special_tokens=skip),
        )

    def _render(self, tokenizer: Tokenizer) -> list[int]:
        ids, self._plan = prompt_of(self._state, self.generation.served, self._conversation, tokenizer)
        return ids

    def _settle(self) -> SamplingParams:
        """The parameters with what the plan asks for."""
        params, plan = self._conversation.params, self._plan
        changes: dict[str, Any] = {}
        if plan.structured_outputs is not None:
            if params.structured_outputs is not None:
                raise HTTPError(
                    400, f"{self._conversation.form}: not with tools that have to be called or are strict",
                    param=self._conversation.form, code="invalid_value",
                )  # fmt: skip
            if params.allowed_token_ids is not None or params.ignore_eos:
                raise RequestError(
                    "tools", "calls in a form", "neither allowed_token_ids nor ignore_eos with them"
                )
            changes["structured_outputs"] = plan.structured_outputs
            self.generation.form = "tools"  # where the schemas came from
        if not plan.skip_special_tokens:
            changes["skip_special_tokens"] = False
        wanted = self._conversation.thinking_tokens
        budget = plan.thinking_budget(wanted, before_form=params.structured_outputs is not None)
        if budget is not None:
            changes["thinking_budget"] = budget
        return dataclasses.replace(params, **changes) if changes else params


class _ReasoningCounter:
    """Reads an answer once more, token by token, up to the end of its reasoning: what comes in one piece may
    be several tokens."""

    def __init__(self, parser: AnswerParser, text: IncrementalDetokenizer) -> None:
        self._parser = parser
        self._text = text

    def read(self, token_ids: Sequence[int]) -> int:
        """How many tokens of reasoning there are more than before."""
        parser, before = self._parser, self._parser.num_reasoning_tokens
        for token in token_ids:
            if not parser.counts:
                break
            parser.feed(self._text.push([token]))
            parser.count(1)
        return parser.num_reasoning_tokens - before


def prompt_of(
    state: ServerState, served: Served, wanted: Conversation, tokenizer: Tokenizer
) -> tuple[list[int], AnswerPlan]:
    """The token ids of a conversation's prompt, and how it is answered. Takes a while: for a thread.

    Raises:
        RequestError, UnsupportedModelError: as `render_chat`, `normalize_messages` and `plan_answer`.
    """
    chat = served.chat
    offered = bool(wanted.choice.offered)
    template = chat.tool_template if offered else chat.template
    formats = chat.tool_formats if offered else chat.formats
    values = {name: value for name, value in wanted.template_hints.items() if name in (template or "")}
    for name, (field_name, value) in wanted.template_fields.items():
        if name in (template or ""):
            values[name] = value
        elif field_name != "thinking" or formats.reasoning is not None:
            raise RequestError(field_name, value, f"nothing: this model's chat template reads no {name}")
    ids = render_chat(
        tokenizer,
        normalize_messages(wanted.messages, template or ""),
        add_generation_prompt=wanted.add_generation_prompt,
        chat_template=state.config.chat_template,
        chat_template_kwargs={**values, **(wanted.template_kwargs or {})} or None,
        tools=wanted.choice.for_template(),
    )
    end = tokenizer.decode(ids[-END_TOKENS:], skip_special_tokens=False)
    plan = plan_answer(wanted.choice, formats, prompt_end=end)
    if plan.lead:
        ids += tokenizer.encode(plan.lead, add_special_tokens=False, parse_special=True)
    return ids, plan


def _reason(item: CompletionOutput, finished: Finished) -> str:
    """OpenAI's word for the end."""
    if finished.tools_called and item.finish_reason != "length":
        return "tool_calls"
    return item.finish_reason or "stop"
