"""The incremental detokenizer: any split of any tokens gives the text of the whole."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastllm.formats.codec import CHARACTER_BYTES
from fastllm.formats.detokenizer import IncrementalDetokenizer
from fastllm.formats.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
CHARACTERS = {byte: character for character, byte in CHARACTER_BYTES.items()}


def metadata(model: str, types: dict[str, int], **keys: Any) -> dict[str, Any]:
    made = {"model": model, "tokens": list(types), "token_type": list(types.values()), "merges": [], **keys}
    return {f"tokenizer.ggml.{key}": value for key, value in made.items()}


def spelled(data: bytes) -> str:
    return "".join(CHARACTERS[byte] for byte in data)


def byte_level() -> Tokenizer:
    """All bytes, and tokens that end and begin within characters."""
    types = {CHARACTERS[byte]: NORMAL for byte in range(256)}
    for piece in (
        b" a",
        b"\xf0\x9f",
        b"\x98\x80",
        b"\xe2\x82\xac",
        b"a\xc3",
        b"\xa9b",
        b"\x80\x80",
        b"\xff ",
    ):
        types[spelled(piece)] = NORMAL
    types |= {"<s>": CONTROL, "<unk>": UNKNOWN, "<think>": USER_DEFINED, "日本": USER_DEFINED, "gone": UNUSED}
    return Tokenizer.from_gguf(metadata("gpt2", types, bos_token_id=264))


def sentencepiece(**keys: Any) -> Tokenizer:
    types = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL}
    types |= {f"<0x{byte:02X}>": BYTE for byte in range(256)}
    types |= dict.fromkeys(["▁", "▁▁", "▁a", "a", "é", "日本", "▁日"], NORMAL) | {"x y": USER_DEFINED}
    return Tokenizer.from_gguf(metadata("llama", types, **keys))


TOKENIZERS = {
    "byte-level": byte_level(),
    "sentencepiece": sentencepiece(),
    "sentencepiece without prefix": sentencepiece(add_space_prefix=False),
}
kinds = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)

# Ids in groups, so that the groups are the splits; ids past every vocabulary as well.
groups = st.lists(st.lists(st.integers(0, 290), max_size=5), max_size=8)
# Ids whose bytes are mostly parts of characters.
heads = st.sampled_from([0xC3, 0xE2, 0xF0, 0x9F, 0x98, 0x80, 0x82, 0xA9, 0xAC, 0xED, 0xA0, 0xF4, 0x20, 0x61])
broken_groups = st.lists(st.lists(heads, max_size=3), max_size=8)


def stream(tokenizer: Tokenizer, prompt: list[int], split: list[list[int]], *, skip: bool) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip_special_tokens=skip)
    return [*(detokenizer.push(ids) for ids in split), detokenizer.flush()]


@kinds
@given(split=groups | broken_groups, skip=st.booleans(), offset=st.sampled_from([0, 3]))
@example(split=[[0xF0], [0x9F], [0x98], [0x80]], skip=True, offset=0)
@example(split=[[0xF0, 0x9F], [0x41]], skip=True, offset=0)
@example(split=[[0xED], [0xA0], [0x80]], skip=True, offset=3)
def test_joined_pieces_are_the_decoded_whole(
    tokenizer: Tokenizer, split: list[list[int]], skip: bool, offset: int
) -> None:
    split = [[i + offset for i in ids] for ids in split]
    whole = tokenizer.decode([i for ids in split for i in ids], skip_special_tokens=skip)
    assert "".join(stream(tokenizer, [], split, skip=skip)) == whole


@kinds
@given(text=st.text(), sizes=st.lists(st.integers(1, 4)))
def test_never_half_a_character(tokenizer: Tokenizer, text: str, sizes: list[int]) -> None:
    ids = tokenizer.encode(text, parse_special=False)
    split = []
    for size in sizes:
        split.append(ids[:size])
        ids = ids[size:]
    pieces = stream(tokenizer, [], [*split, ids], skip=True)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@kinds
@given(prompt=st.lists(st.integers(0, 290), max_size=6), split=groups | broken_groups, skip=st.booleans())
def test_after_a_prompt(tokenizer: Tokenizer, prompt: list[int], split: list[list[int]], skip: bool) -> None:
    """What is pushed comes out as if decoded alone, but for the first space, which only starts a text."""
    ids = [i for group in split for i in group]
    data = b"".join(tokenizer.visible_bytes(ids, skip))
    if tokenizer.strips_space and not b"".join(tokenizer.visible_bytes(prompt, skip)):
        data = data.removeprefix(b" ")
    joined = "".join(stream(tokenizer, prompt, split, skip=skip))
    assert joined == data.decode("utf-8", "replace")


@kinds
@given(prompt=st.text(), answer=st.text())
def test_prompt_and_answer_join(tokenizer: Tokenizer, prompt: str, answer: str) -> None:
    first = tokenizer.encode(prompt, parse_special=False)
    second = tokenizer.encode(answer, add_special_tokens=False, parse_special=False)
    joined = "".join(stream(tokenizer, first, [[i] for i in second], skip=True))
    assert tokenizer.decode(first) + joined == tokenizer.decode(first + second)


def test_the_space_at_the_start() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    bos, word = 1, tokenizer.encode("a", add_special_tokens=False)
    assert stream(tokenizer, [], [word], skip=True) == ["a", ""]
    assert stream(tokenizer, [bos], [word], skip=True) == ["a", ""]
    assert stream(tokenizer, [bos], [word], skip=False) == [" a", ""]
    assert stream(tokenizer, [bos, *word], [word, word], skip=True) == [" a", " a", ""]
    assert stream(tokenizer, [], [[bos], word, word], skip=True) == ["", "a", " a", ""]


def test_text_of_the_prompt_never_comes_out() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    euro = tokenizer.encode("€")
    halves = [0xE2, 0x82], [0xAC]
    assert stream(tokenizer, euro, [[0x41]], skip=True) == ["A", ""]
    # The prompt ends within a character: its part of it is not shown, and the rest stands alone.
    assert stream(tokenizer, halves[0], [halves[1], [0x41]], skip=True) == ["\ufffd", "A", ""]


def test_flush_says_what_was_held_back() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.push([0x41, 0xF0, 0x9F]) == "A"
    assert detokenizer.push([]) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_special_tokens() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    bos = tokenizer.encode("<s>")
    think = tokenizer.encode("<think>")
    assert stream(tokenizer, [], [bos, think, [0x41]], skip=True) == ["", "<think>", "A", ""]
    assert stream(tokenizer, [], [bos, think, [0x41]], skip=False) == ["<s>", "<think>", "A", ""]
    # A character is held together across a control token that is left out.
    assert stream(tokenizer, [], [[0xC3], bos, [0xA9]], skip=True) == ["", "", "é", ""]
