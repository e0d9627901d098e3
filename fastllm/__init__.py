"""fastllm: an inference core for large language models.

    from fastllm import LLM, SamplingParams

    with LLM() as llm:
        print(llm.generate("The capital of France is", SamplingParams(temperature=0))[0].outputs[0].text)

Names are imported when they are first used, so that `import fastllm` costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastllm import errors, ops
    from fastllm.async_llm import AsyncLLM
    from fastllm.engine.hooks import EngineHook
    from fastllm.errors import (
        CapacityError,
        EngineDeadError,
        FastLLMError,
        ModelFileError,
        ModelSourceError,
        RequestError,
        UnsupportedModelError,
    )
    from fastllm.llm import LLM
    from fastllm.lora import LoRARequest
    from fastllm.outputs import (
        CompletionOutput,
        EmbeddingOutput,
        Logprob,
        RequestMetrics,
        RequestOutput,
        ScoringOutput,
    )
    from fastllm.pooling_params import PoolingParams
    from fastllm.sampling_params import RequestOutputKind, SamplingParams, ThinkingBudget
    from fastllm.structured_outputs import StructuredOutputsParams

    __version__: str

__all__ = [
    "LLM",
    "AsyncLLM",
    "CapacityError",
    "CompletionOutput",
    "EmbeddingOutput",
    "EngineDeadError",
    "EngineHook",
    "FastLLMError",
    "LoRARequest",
    "Logprob",
    "ModelFileError",
    "ModelSourceError",
    "PoolingParams",
    "RequestError",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "ScoringOutput",
    "StructuredOutputsParams",
    "ThinkingBudget",
    "UnsupportedModelError",
    "__version__",
    "errors",
    "ops",
]

_HOMES = {
    "LLM": "fastllm.llm",
    "AsyncLLM": "fastllm.async_llm",
    "EngineHook": "fastllm.engine.hooks",
    "LoRARequest": "fastllm.lora",
    **dict.fromkeys(
        (
            "CompletionOutput",
            "EmbeddingOutput",
            "Logprob",
            "RequestMetrics",
            "RequestOutput",
            "ScoringOutput",
        ),
        "fastllm.outputs",
    ),
    "PoolingParams": "fastllm.pooling_params",
    "StructuredOutputsParams": "fastllm.structured_outputs",
    **dict.fromkeys(("RequestOutputKind", "SamplingParams", "ThinkingBudget"), "fastllm.sampling_params"),
    **dict.fromkeys((name for name in __all__ if name.endswith("Error")), "fastllm.errors"),
}

# Type checkers read the imports above; for them there is no __getattr__, which would allow any name.
if not TYPE_CHECKING:

    def __getattr__(name):
        import importlib

        if name in _HOMES:
            value = getattr(importlib.import_module(_HOMES[name]), name)
        elif name in ("errors", "ops"):
            value = importlib.import_module(f"fastllm.{name}")
        elif name == "__version__":
            value = _version()
        else:
            raise AttributeError(f"module 'fastllm' has no attribute {name!r}")
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("fastllm")
    except metadata.PackageNotFoundError:  # run from a source tree
        return "0+unknown"
