"""Makes the engines of a server's models: `AsyncLLM`, with the hooks that the server has."""

from __future__ import annotations

from typing import Any

from fastllm.async_llm import AsyncLLM
from fastllm.serve.chat_format import ChatFormat
from fastllm.serve.config import ServeConfig
from fastllm.serve.models import Loaded, Source
from fastllm.serve.telemetry import Telemetry


class EngineLoader:
    """See `models.Loader`."""

    def __init__(self, config: ServeConfig, telemetry: Telemetry) -> None:
        self._config = config
        self._telemetry = telemetry

    def __call__(self, source: Source) -> Loaded:
        """Load a model. Called in a thread.

        Raises:
            FastLLMError: it cannot be loaded.
        """
        options: dict[str, Any] = {"progress": False, **source.engine}
        telemetry = self._telemetry.of_engine(source.name, source.version)
        try:
            llm = AsyncLLM(source.reference, hooks=telemetry.hooks, **options)
        except BaseException:
            telemetry.close()
            raise
        try:
            config = self._config
            chat = ChatFormat.of(
                llm.tokenizer, config.chat_template, config.tool_parser, config.reasoning_parser
            )
        except BaseException:
            llm.close()
            telemetry.close()
            raise
        return Loaded(llm, chat, telemetry.tracing, telemetry.close)
