"""Tool calls and reasoning in answers: what models write, in what format, and how it becomes events.

`plan_answer` is the way in for a server; `make` and `ReasoningParser` stand for themselves. Nothing here
knows of HTTP. See docs/tools.md.
"""

from __future__ import annotations

from fastllm.serve.parsers.answer import AnswerParser
from fastllm.serve.parsers.events import (
    ArgumentsDelta,
    CallBegun,
    CallEnded,
    Content,
    Event,
    Finished,
    Reasoning,
    merge_events,
)
from fastllm.serve.parsers.messages import normalize_messages
from fastllm.serve.parsers.plan import AnswerPlan, Formats, plan_answer, special_token_texts
from fastllm.serve.parsers.reasoning import (
    REASONING_FORMATS,
    ReasoningParser,
    SpecialTokenFilter,
    Thought,
    detect_reasoning,
    thought_of_prompt,
)
from fastllm.serve.parsers.registry import FORMATS, detect, make, needs_special_tokens
from fastllm.serve.parsers.tool_choice import Tool, ToolChoice, parse_tool_choice, parse_tools
from fastllm.serve.parsers.tool_parser import ToolParser

__all__ = [
    "FORMATS",
    "REASONING_FORMATS",
    "AnswerParser",
    "AnswerPlan",
    "ArgumentsDelta",
    "CallBegun",
    "CallEnded",
    "Content",
    "Event",
    "Finished",
    "Formats",
    "Reasoning",
    "ReasoningParser",
    "SpecialTokenFilter",
    "Thought",
    "Tool",
    "ToolChoice",
    "ToolParser",
    "detect",
    "detect_reasoning",
    "make",
    "merge_events",
    "needs_special_tokens",
    "normalize_messages",
    "parse_tool_choice",
    "parse_tools",
    "plan_answer",
    "special_token_texts",
    "thought_of_prompt",
]
