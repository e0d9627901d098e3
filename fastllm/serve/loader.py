"""Makes the engines of a server's models: `AsyncLLM`, with the hooks that the server has."""

from __future__ import annotations

from typing import Any

from fastllm.async_llm import AsyncLLM
from fastllm.serve.chat_format import ChatFormat
from fastllm.serve.config import ServeConfig
from fastllm.serve.models import Loaded, Source


class EngineLoader:
    """See `models.Loader`."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config

    def __call__(self, source: Source) -> Loaded:
        """Load a model. Called in a thread.

        Raises:
            FastLLMError: it cannot be loaded.
        """
        options: dict[str, Any] = {"progress": False, **source.engine}
        llm = AsyncLLM(source.reference, **options)
        try:
            config = self._config
            chat = ChatFormat.of(
                llm.tokenizer, config.chat_template, config.tool_parser, config.reasoning_parser
            )
        except BaseException:
            llm.close()
            raise
        return Loaded(llm, chat)
