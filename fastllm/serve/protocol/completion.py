"""/v1/completions: OpenAI's body with vLLM's additions."""

from __future__ import annotations

from pydantic import Field

from fastllm.serve.protocol.sampling import Sampling

PROMPTS = 1024  # of one request


class CompletionRequest(Sampling):
    """Prompts to continue: a text, several, token ids, or several lists of those."""

    prompt: str | list[str] | list[int] | list[list[int]] = Field()
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    prompt_logprobs: int | None = None

    def prompts(self) -> list[str | list[int]]:
        """One entry for each."""
        given = self.prompt
        if isinstance(given, str):
            return [given]
        if given and all(isinstance(item, int) for item in given):
            return [given]  # type: ignore[list-item]
        return list(given)  # type: ignore[arg-type]
