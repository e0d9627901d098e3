"""What to do for one request so that its answer is reasoning, content and calls: grammar and parsers.

tools = parse_tools(request.tools)
choice = parse_tool_choice(tools, request.tool_choice, request.parallel_tool_calls)
formats = Formats.of(template)                                  once for a model and a template
prompt = render_chat(..., tools=choice.for_template())
plan = plan_answer(choice, formats, prompt_end=...)             its lead goes to the end of the prompt
parser = plan.parser()                                          one for each sequence of the answer
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastllm.errors import RequestError
from fastllm.sampling_params import ThinkingBudget
from fastllm.serve.parsers.answer import AnswerParser
from fastllm.serve.parsers.lark import Lark
from fastllm.serve.parsers.reasoning import (
    ReasoningParser,
    SpecialTokenFilter,
    Thought,
    detect_reasoning,
    find_reasoning_format,
    thought_of_prompt,
)
from fastllm.serve.parsers.registry import detect, find_format, make
from fastllm.serve.parsers.tool_choice import ToolChoice
from fastllm.structured_outputs import StructuredOutputsParams

if TYPE_CHECKING:
    from fastllm.formats.tokenizer import Tokenizer

MAX_CALLS = 32  # that a grammar asks for in one answer


@dataclass(frozen=True, slots=True)
class Formats:
    """What a model writes, by the names of formats.

    Attributes:
        tools: None: its template knows no calls, or none of ours.
        reasoning: None: it does not reason.
        special_tokens: texts of its control tokens.
    """

    tools: str | None = None
    reasoning: str | None = None
    special_tokens: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        template: str | None,
        special_tokens: Collection[str] = (),
        *,
        tool_parser: str | None = None,
        reasoning_parser: str | None = None,
    ) -> Formats:
        """The formats of a chat template, as far as they are not named.

        Args:
            template: its jinja2 source; None: the model has none.
            special_tokens: see `special_token_texts`.
            tool_parser, reasoning_parser: names; "none" for none; None: found out from the template.

        Raises:
            RequestError: a name that there is not.
        """
        tools, reasoning = tool_parser, reasoning_parser
        if tools is None:
            tools = None if template is None else detect(template)
        elif tools == "none":
            tools = None
        else:
            find_format(tools)
        if reasoning is None:
            reasoning = None if template is None else detect_reasoning(template)
        elif reasoning == "none":
            reasoning = None
        else:
            find_reasoning_format(reasoning)
        return cls(tools, reasoning, frozenset(special_tokens))


@dataclass(frozen=True, slots=True)
class AnswerPlan:
    """How one request is answered.

    Attributes:
        lead: text for the end of the prompt, whose control tokens count as such
            (`encode(lead, add_special_tokens=False, parse_special=True)`); "": nothing.
        structured_outputs: for the sampling parameters; None: the answer is free.
        skip_special_tokens: for the sampling parameters.
    """

    lead: str
    structured_outputs: StructuredOutputsParams | None
    skip_special_tokens: bool
    _choice: ToolChoice = field(repr=False)
    _formats: Formats = field(repr=False)
    _thought: Thought = field(repr=False)

    def thinking_budget(self, tokens: int | None, *, before_form: bool = False) -> ThinkingBudget | None:
        """For the sampling parameters, where there is something to say of the reasoning.

        Args:
            tokens: after which it is ended; None: never.
            before_form: the request wants a form of its own. Where the prompt has opened reasoning that comes
                first, else the form is the whole answer.
        """
        if self._formats.reasoning is None or self.lead or self._thought is Thought.OVER:
            return None
        opened = self._thought is Thought.OPEN
        if (before_form and not opened) or (tokens is None and not before_form):
            return None
        form = find_reasoning_format(self._formats.reasoning)
        return ThinkingBudget(
            tokens=tokens, opening=form.opening, closing=form.closing, opened=opened, end=form.end,
            before_form=before_form,
        )  # fmt: skip

    def parser(
        self, *, stream_arguments: bool = False, new_id: Callable[[], str] | None = None
    ) -> AnswerParser:
        """A parser for one sequence of the answer, which has read the lead already."""
        formats, choice = self._formats, self._choice
        tools = reasoning = special = None
        if formats.tools is not None and choice.tools:
            tools = make(
                formats.tools,
                choice.tools,
                parallel=choice.parallel,
                stream_arguments=stream_arguments,
                new_id=new_id,
            )
        if formats.reasoning is not None and not self.lead:
            reasoning = ReasoningParser(formats.reasoning, opened=self._thought is Thought.OPEN)
        if not self.skip_special_tokens and formats.special_tokens:
            special = SpecialTokenFilter(formats.special_tokens, _markers(formats, choice))
        parser = AnswerParser(tools, reasoning, special)
        events = parser.feed(self.lead)
        assert not events  # a marker alone is nothing yet
        return parser


def plan_answer(choice: ToolChoice, formats: Formats, *, prompt_end: str = "") -> AnswerPlan:
    """The plan for one request.

    Args:
        choice: from `parse_tool_choice`.
        prompt_end: the last characters of the prompt, control tokens included; says whether it leaves
            reasoning open.

    Raises:
        RequestError: calls are asked for and the model's template knows none; a schema that cannot be put
            into the form of its calls, or schemas too large for one grammar.
    """
    if choice.offered and formats.tools is None:
        limit = (
            "no tools: the chat template of this model writes no calls, or in a form that is not known here"
        )
        raise RequestError("tools", [tool.name for tool in choice.offered], limit)
    thought = Thought.COMES
    if formats.reasoning is not None:
        thought = thought_of_prompt(formats.reasoning, prompt_end)
    lead, grammar = "", None
    if choice.required:
        lead, grammar = _required(choice, formats, thought)
    elif any(tool.strict for tool in choice.tools):
        grammar = _obeyed(choice, formats, thought)
    markers = _markers(formats, choice)
    skip = not any(marker in formats.special_tokens for marker in markers)
    params = None if grammar is None else _params(grammar)
    return AnswerPlan(lead, params, skip, choice, formats, thought)


def special_token_texts(tokenizer: Tokenizer) -> frozenset[str]:
    """The texts of a tokenizer's control tokens. Goes through the whole vocabulary: once for a model."""
    ids = filter(tokenizer.is_special, range(tokenizer.vocab_size))
    return frozenset(tokenizer.token_bytes(i).decode("utf-8", "replace") for i in ids) - {""}


def _markers(formats: Formats, choice: ToolChoice) -> tuple[str, ...]:
    markers: tuple[str, ...] = ()
    if formats.tools is not None and choice.tools:
        markers += find_format(formats.tools).markers
    if formats.reasoning is not None:
        markers += find_reasoning_format(formats.reasoning).markers
    return markers


def _required(choice: ToolChoice, formats: Formats, thought: Thought) -> tuple[str, str]:
    """Calls, and nothing else but reasoning before them."""
    assert formats.tools is not None
    form, lark = find_format(formats.tools), Lark(obey_all=True)
    calls = form.calls(lark, choice.tools, MAX_CALLS if choice.parallel else 1)
    if thought is not Thought.OPEN and form.lead:
        return form.lead, lark.grammar(calls)
    if form.lead:  # it would end the reasoning that the prompt has begun: then it comes later, as text
        calls = f"{lark.text(form.lead)} ({calls})"
    return "", lark.grammar(_after_reasoning(lark, formats, thought, calls))


def _obeyed(choice: ToolChoice, formats: Formats, thought: Thought) -> str | None:
    """Free text and calls, whose arguments obey their schema; None where the format cannot be had so."""
    assert formats.tools is not None
    form = find_format(formats.tools)
    if form.free is None or form.begins in formats.special_tokens:
        return None
    # Text that begins as reasoning does is reasoning; else a call could follow it unseen.
    begins = "" if formats.reasoning is None else find_reasoning_format(formats.reasoning).opening
    lark = Lark(obey_all=False, not_first="" if thought is Thought.OPEN else begins)
    answer = form.free(lark, choice.tools, MAX_CALLS if choice.parallel else 1)
    return lark.grammar(_after_reasoning(lark, formats, thought, answer))


def _after_reasoning(lark: Lark, formats: Formats, thought: Thought, body: str) -> str:
    """The body, behind reasoning where the prompt has begun it or the model may."""
    if formats.reasoning is None or thought is Thought.OVER:
        return body
    form = find_reasoning_format(formats.reasoning)
    answer = lark.rule("answer", body)
    reasoning = f"{lark.thought_until(form.closing)} /[ \\t\\r\\n]{{0,8}}/ {answer}"
    if thought is Thought.OPEN:
        return reasoning
    if form.opening in formats.special_tokens:
        return answer
    return f"{lark.text(form.opening)} {reasoning} | {answer}"


def _params(grammar: str) -> StructuredOutputsParams:
    try:
        return StructuredOutputsParams(grammar=grammar)
    except RequestError as error:
        limit = f"schemas that fit into one grammar together ({error.limit})"
        raise RequestError("tools", error.value, limit) from error
