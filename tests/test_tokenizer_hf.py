"""Tokenizers from a directory with tokenizer.json: equal to `transformers`, on tokenizers trained here."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Engine
from transformers import PreTrainedTokenizerFast

from fastllm.errors import ModelFileError, RequestError, UnsupportedModelError
from fastllm.formats.detokenizer import IncrementalDetokenizer
from fastllm.formats.tokenizer import Tokenizer, load_tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 12345 o'clock, don't you think?",
    "def f(x):\n    return x ** 2  # naïve façade\n\n\nÜber straße, déjà vu",
    "Привет мир. 你好，世界。 こんにちは 👋🏽 emoji",
    "user assistant system im_start im_end </s> <s> [INST]",
] * 4
SPECIAL = ["<|begin|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"]
OTHERS = ["<s>", "</s>", "<unk>", "[INST]", "<extra>", "<pad>"]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def save(folder: Path, engine: Engine, config: dict[str, Any], **files: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    engine.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def byte_level(folder: Path, **extra: Any) -> Path:
    """Like Llama 3's: byte-level BPE, BOS from the post-processor, two added words that are not special."""
    engine = Engine(models.BPE(ignore_merges=True))
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    engine.train_from_iterator(CORPUS, trainer)
    engine.add_special_tokens(SPECIAL)
    engine.add_tokens([AddedToken("<think>", normalized=False), AddedToken("<|tool|>", rstrip=True)])
    engine.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|begin|> $A", special_tokens=[("<|begin|>", engine.token_to_id("<|begin|>"))]
            ),
        ]
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": {"__type": "AddedToken", "content": "<|end_of_text|>", "special": True},
        "clean_up_tokenization_spaces": False,
        "chat_template": CHATML,
    }
    return save(folder, engine, config | extra)


def sentencepiece(folder: Path, *, metaspace: bool = False, **extra: Any) -> Path:
    """Like Llama 2's: BPE over text with U+2581 for spaces, byte fallback; with its older or newer spaces."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    trained = Engine(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    for text in sorted(model["vocab"], key=model["vocab"].__getitem__):
        vocab.setdefault(text, len(vocab))
    merges = [tuple(merge) for merge in model["merges"]]
    engine = Engine(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if metaspace:
        engine.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        engine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    engine.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    engine.add_special_tokens([AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    engine.add_special_tokens([AddedToken("[INST]", normalized=False)])
    engine.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "chat_template": "{{ bos_token }}{% for m in messages %}{{ '[INST]' + m['content'] }}{% endfor %}",
    }
    return save(folder, engine, config | extra)


KINDS = ["llama3", "llama2", "llama2-metaspace", "no-bos", "bos-and-eos", "added-by-config"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    added = {"extra_special_tokens": ["<extra>"], "pad_token": "<pad>", "added_tokens_decoder": {}}
    return {
        "llama3": byte_level(root / "llama3"),
        "llama2": sentencepiece(root / "llama2"),
        "llama2-metaspace": sentencepiece(root / "llama2-metaspace", metaspace=True),
        "no-bos": byte_level(root / "no-bos", add_bos_token=False),
        "bos-and-eos": sentencepiece(root / "bos-and-eos", add_bos_token=True, add_eos_token=True),
        "added-by-config": byte_level(root / "added-by-config", **added),
    }


@pytest.fixture(scope="module")
def pairs(folders: dict[str, Path]) -> dict[str, tuple[Tokenizer, Any]]:
    return {
        name: (Tokenizer.from_directory(folder), PreTrainedTokenizerFast.from_pretrained(folder))
        for name, folder in folders.items()
    }


PIECES = st.sampled_from(
    [
        *(
            "The quick",
            " fox",
            "12345",
            "don't",
            "  ",
            "\n",
            "\t",
            "é",
            "naïve",
            "你好",
            "👋🏽",
            " ",
            "▁",
            "x",
        ),
        *("<|begin|>", "<|im_start|>", "<|im_end|>", "<|im_en", "<s>", "</s>", "<unk>", "[INST]", "<think>"),
        *("<|tool|>", " <|tool|> ", "<extra>", "<pad>", "<0x41>", "'S", "|>"),
    ]
)
texts = st.lists(PIECES | st.text(max_size=4), max_size=10).map("".join)


@pytest.mark.parametrize("name", KINDS)
@given(text=texts)
def test_encode_as_transformers(pairs: dict[str, tuple[Tokenizer, Any]], name: str, text: str) -> None:
    ours, theirs = pairs[name]
    assert ours.encode(text) == theirs.encode(text)
    assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", KINDS)
@given(text=texts)
def test_decode_as_transformers(pairs: dict[str, tuple[Tokenizer, Any]], name: str, text: str) -> None:
    ours, theirs = pairs[name]
    ids = ours.encode(text)
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", ["llama3", "no-bos"])
@given(ids=st.lists(st.integers(0, 606), max_size=12))
def test_decode_any_ids_as_transformers(
    pairs: dict[str, tuple[Tokenizer, Any]], name: str, ids: list[int]
) -> None:
    """Byte-level only: of bytes that are not UTF-8, the fallback of the others makes one U+FFFD each."""
    ours, theirs = pairs[name]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", KINDS)
@given(text=texts, size=st.integers(1, 3))
def test_pieces_join(pairs: dict[str, tuple[Tokenizer, Any]], name: str, text: str, size: int) -> None:
    ours, _ = pairs[name]
    ids = ours.encode(text)
    detokenizer = IncrementalDetokenizer(ours)
    pieces = [detokenizer.push(ids[i : i + size]) for i in range(0, len(ids), size)]
    assert "".join(pieces) + detokenizer.flush() == ours.decode(ids)


@pytest.mark.parametrize("name", KINDS)
@given(text=texts)
def test_unparsed_text_has_no_control_tokens(
    pairs: dict[str, tuple[Tokenizer, Any]], name: str, text: str
) -> None:
    ours, _ = pairs[name]
    ids = ours.encode(text, add_special_tokens=False, parse_special=False)
    unknown = ours.encode("<unk>", add_special_tokens=False)
    assert not any(ours.is_special(i) for i in ids if [i] != unknown)
    if not any(
        written in text for written in (*SPECIAL, "<s>", "</s>", "<unk>", "[INST]", "<extra>", "<pad>")
    ):
        assert ids == ours.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", KINDS)
@given(text=texts.filter(bool))
def test_chat_has_the_template_s_control_tokens_only(
    pairs: dict[str, tuple[Tokenizer, Any]], name: str, text: str
) -> None:
    ours, theirs = pairs[name]
    messages = [{"role": "user", "content": text}]
    ids = ours.apply_chat_template(messages)
    rendered = ours.render_chat_template(messages)
    assert rendered == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    plain = ours.apply_chat_template([{"role": "user", "content": "x"}])
    assert [i for i in ids if ours.is_special(i)] == [i for i in plain if ours.is_special(i)]
    written = [ours.token_bytes(i).decode() for i in range(ours.vocab_size) if ours.is_special(i)]
    if not any(token in text for token in [*written, "<|tool|>"]):
        assert ids == ours.encode(rendered, add_special_tokens=False)


def test_chat_begins_with_one_bos(pairs: dict[str, tuple[Tokenizer, Any]]) -> None:
    ours, theirs = pairs["llama2"]
    messages = [{"role": "user", "content": "hello"}]
    ids = ours.apply_chat_template(messages)
    assert ids == theirs.apply_chat_template(messages, tokenize=True)["input_ids"]
    assert ids.count(ours.bos_token_id) == 1


def test_control_tokens_that_normalization_would_make(tmp_path: Path) -> None:
    folder = byte_level(
        tmp_path, chat_template="{{ '<|im_end|>' }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    description = json.loads((folder / "tokenizer.json").read_text())
    description["normalizer"] = {"type": "NFKC"}
    for token in description["added_tokens"]:
        token["normalized"] = True
    (folder / "tokenizer.json").write_text(json.dumps(description))
    tokenizer = Tokenizer.from_directory(folder)
    wide = "＜｜eot_id｜＞"
    assert len(tokenizer.encode(wide, add_special_tokens=False)) == 1
    ids = tokenizer.apply_chat_template([{"role": "user", "content": wide}])
    assert len([i for i in ids if tokenizer.is_special(i)]) == 1
    assert not any(tokenizer.is_special(i) for i in tokenizer.encode(wide, parse_special=False)[1:])


def test_facts(pairs: dict[str, tuple[Tokenizer, Any]]) -> None:
    ours, theirs = pairs["llama3"]
    assert ours.vocab_size == len(theirs)
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_id == theirs.eos_token_id
    assert [i for i in range(len(theirs)) if ours.is_special(i)] == sorted(
        i for i, token in theirs.added_tokens_decoder.items() if token.special
    )


def ends_of(folder: Path) -> set[bytes]:
    tokenizer = Tokenizer.from_directory(folder)
    return {tokenizer.token_bytes(i) for i in tokenizer.eos_token_ids}


def test_ends_of_sequence(tmp_path: Path) -> None:
    folder = byte_level(tmp_path)
    known = {b"<|end_of_text|>", b"<|im_end|>", b"<|eot_id|>"}
    assert ends_of(folder) == known
    begin = Tokenizer.from_directory(folder).bos_token_id
    (folder / "config.json").write_text(json.dumps({"eos_token_id": [begin]}))
    assert ends_of(folder) == known | {b"<|begin|>"}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 10**6]}))
    assert ends_of(folder) == known | {b"!"}


def test_templates_in_files(tmp_path: Path) -> None:
    folder = byte_level(tmp_path)
    (folder / "chat_template.jinja").write_text("from the file")
    more = folder / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("with {{ tools|length }} tools")
    tokenizer = Tokenizer.from_directory(folder)
    messages = [{"role": "user", "content": "x"}]
    assert tokenizer.render_chat_template(messages) == "from the file"
    assert tokenizer.render_chat_template(messages, tools=[{}]) == "with 1 tools"
    assert tokenizer.render_chat_template(messages, chat_template="tool_use", tools=[]) == "with 0 tools"
    listed = [{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}]
    listed_folder = byte_level(tmp_path / "listed", chat_template=listed)
    assert Tokenizer.from_directory(listed_folder).chat_templates == {"default": "a", "rag": "b"}


def test_load_tokenizer(folders: dict[str, Path]) -> None:
    checkpoint: Any = SimpleNamespace(
        kind="hf", path=folders["llama3"], config={}, generation_config={}, keys=None
    )
    assert load_tokenizer(checkpoint).bos_token_id == Tokenizer.from_directory(folders["llama3"]).bos_token_id


def test_no_template(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(byte_level(tmp_path, chat_template=None))
    with pytest.raises(UnsupportedModelError, match="no chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


def test_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"tokenizer\.json: is missing"):
        Tokenizer.from_directory(tmp_path)
    folder = byte_level(tmp_path)
    good = (folder / "tokenizer.json").read_text()
    for bad in ("", "{", "[]", "{}", '{"model": 1}', good[:-100], "[" * 100_000):
        (folder / "tokenizer.json").write_text(bad)
        with pytest.raises(ModelFileError, match=r"tokenizer\.json"):
            Tokenizer.from_directory(folder)
    (folder / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelFileError, match=r"tokenizer\.json"):
        Tokenizer.from_directory(folder)
    (folder / "tokenizer.json").write_text(good)
    (folder / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ModelFileError, match=r"tokenizer_config\.json"):
        Tokenizer.from_directory(folder)


def test_vocabularies_that_are_not_bytes(tmp_path: Path) -> None:
    engine = Engine(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    engine.decoder = decoders.WordPiece()
    with pytest.raises(UnsupportedModelError, match="WordPiece"):
        Tokenizer.from_directory(save(tmp_path, engine, {}))


def test_lone_surrogates(folders: dict[str, Path]) -> None:
    with pytest.raises(RequestError, match="surrogates"):
        Tokenizer.from_directory(folders["llama3"]).encode("a\ud800")
