"""LoRA adapters and sleep together: adapters stay, and answer with the same bits after waking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from lora_files import save_adapter
from test_one_answer import fingerprint

from fastllm import LLM, LoRARequest, RequestError, SamplingParams

SMALL: dict[str, Any] = {"kv_cache_tokens": 1024, "max_num_seqs": 8, "threads": 2}
LONG = SamplingParams(temperature=0.8, seed=3, max_tokens=16, ignore_eos=True, logprobs=2)


def answers(llm: LLM, loras: list[LoRARequest | None]) -> list[Any]:
    """Bits of what each adapter says to prompts of several lengths, all in one batch."""
    prompts: Any = [{"prompt_token_ids": tiny.tokens(1 + 23 * i, seed=i)} for i in range(3)]
    each = [lora for lora in loras for _ in prompts]
    return [fingerprint(item) for item in llm.generate(prompts * len(loras), LONG, lora_request=each)]


@pytest.mark.parametrize("levels", [(1,), (2,), (1, 2), (2, 2)], ids=str)
def test_adapters_survive_sleep_and_give_the_same_bits(levels: tuple[int, ...], tmp_path: Path) -> None:
    """Level 2 gives the model's weights back, not those of adapters, whose files may be gone by then."""
    model = tiny.make_model("llama")
    path = tiny.save_hf(model, tmp_path / "model")
    saved = [save_adapter(tmp_path / name, model, seed=i).path for i, name in enumerate("xyz")]
    x, y, z = (LoRARequest(place.name, place) for place in saved)
    with LLM(path, max_loras=2, **SMALL) as llm:
        loras = [None, x, y]
        expected = answers(llm, loras)
        assert len({repr(answer) for answer in expected}) == len(expected)
        for level in levels:
            llm.sleep(level)
        assert llm.list_loras() == [x, y]
        for file in saved[0].iterdir():
            file.unlink()
        with pytest.raises(RequestError, match="is_sleeping"):
            llm.generate("abc", LONG, lora_request=LoRARequest("x"))
        llm.wake_up()
        assert llm.list_loras() == [x, y]
        assert answers(llm, [None, LoRARequest("x"), LoRARequest("y")]) == expected

        # The places of adapters can change while it sleeps.
        llm.sleep(levels[-1])
        assert llm.remove_lora("x")
        assert llm.add_lora(z)
        llm.wake_up()
        assert answers(llm, [None, y]) == [*expected[:3], *expected[6:]]
        changed = answers(llm, [z])
        assert not {repr(answer) for answer in changed} & {repr(answer) for answer in expected}
    with LLM(path, **SMALL) as llm:
        assert answers(llm, [z]) == changed
