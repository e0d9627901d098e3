"""How a byte-level BPE vocabulary wants its text cut into words: the names of `tokenizer.ggml.pre`.

A GGUF file names its pre-tokenizer, it does not spell it out. Each name stands for a list of regular
expressions; the first cuts the text, the next cuts the pieces of the one before, and merges never cross a
cut. Two names with the same expressions may still differ in their defaults (`ignore_merges`, `add_bos`).

`\\s`, `\\p{L}`, ... are those of the Unicode version of the installed `tokenizers`; a character that Unicode
added since the model was trained may therefore be cut differently than in a program with older tables.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

from fastllm.errors import UnsupportedModelError

_CONTRACTIONS = r"'(?:[sS]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_UPPER, _LOWER = r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]"  # letters that may open, and that may close, a word
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_DEEPSEEK_CJK = r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"


@dataclass(frozen=True)
class PreTokenizer:
    """Cuts, in order, and the defaults that go with the name (a file's own keys come before them)."""

    splits: tuple[str, ...]
    ignore_merges: bool = False  # a whole word that is a token is that token, whatever the merges say
    add_bos: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        """The cuts and the byte-to-character mapping as one object of the `tokenizers` library."""
        cuts = [pre_tokenizers.Split(Regex(split), "isolated") for split in self.splits]
        bytes_to_chars = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([*cuts, bytes_to_chars])


_KINDS: tuple[tuple[PreTokenizer, tuple[str, ...]], ...] = (
    (
        PreTokenizer((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
        ("default",),
    ),
    (
        PreTokenizer((_GPT2,)),
        (
            *("gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "modern-bert", "jina-es", "jina-de"),
            *("jina-v2-es", "jina-v2-de", "exaone4", "mpt", "olmo", "jais", "trillion", "granite-docling"),
        ),
    ),
    (
        PreTokenizer((r"\p{N}", _GPT2)),
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
    ),
    (
        PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
        (
            *("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
            "jina-v5-nano",
        ),
    ),
    (PreTokenizer((_LLAMA3,)), ("dbrx", "smaug-bpe", "chatglm-bpe")),
    (PreTokenizer((_LLAMA3,), ignore_merges=True), ("glm4", "glm5")),
    (
        PreTokenizer((_QWEN2,)),
        (
            *("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan"),
            *("solar-open", "grok-2"),
        ),
    ),
    (PreTokenizer((_QWEN35,)), ("qwen35",)),
    (PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True), ("tekken",)),
    (
        PreTokenizer((r"[\p{P}$+<=>^~|`]+", _GPT2, r"[0-9][0-9][0-9]")),
        ("falcon",),
    ),
    (
        PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}")),
        ("deepseek-coder",),
    ),
)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: kind for kind, names in _KINDS for name in names}


def pre_tokenizer(name: str) -> PreTokenizer:
    """The pre-tokenizer that `tokenizer.ggml.pre` calls `name`; an absent or empty name is `default`.

    Raises:
        UnsupportedModelError: a name that is not in `PRE_TOKENIZERS`.
    """
    try:
        return PRE_TOKENIZERS[name or "default"]
    except KeyError:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise UnsupportedModelError(
            f"pre-tokenizer {name!r} (tokenizer.ggml.pre) is not supported; supported are {known}"
        ) from None
