"""Make tokenizer_vectors.json.gz: what llama.cpp makes of generated Unicode texts.

    python tests/data/make_tokenizer_vectors.py --llama-cpp DIR --model DEFAULT_MODEL.gguf [--texts N]
    [--compare]

DIR is a llama.cpp source tree, built with shared libraries in DIR/build/bin; its models/ggml-vocab-*.gguf are
used. The file holds the texts, and for every vocabulary the ids with control tokens parsed and unparsed.
--compare keeps nothing, and compares fastllm on N fresh texts instead.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import struct
import subprocess
import sys
import tempfile
import unicodedata
from pathlib import Path
from typing import Any

PROGRAM = r"""
#include "llama.h"
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>
int main(int, char ** argv) {
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();
    llama_model_params params = llama_model_default_params();
    params.vocab_only = true;
    llama_model * model = llama_model_load_from_file(argv[1], params);
    if (!model) return 1;
    const llama_vocab * vocab = llama_model_get_vocab(model);
    uint32_t n;
    uint8_t parse;
    while (fread(&n, 4, 1, stdin) == 1 && fread(&parse, 1, 1, stdin) == 1) {
        std::string text(n, 0);
        if (n && fread(&text[0], 1, n, stdin) != n) return 2;
        std::vector<llama_token> ids(4 * n + 16);
        int count = llama_tokenize(vocab, text.data(), n, ids.data(), ids.size(), false, parse);
        for (int i = 0; i < count; i++) printf("%d ", ids[i]);
        printf("\n");
    }
}
"""

# (name, vocabulary file or "" for the default model, value that replaces tokenizer.ggml.pre)
VOCABULARIES = [
    ("default-model", "", None),
    ("gpt-2", "gpt-2", None),
    ("llama-bpe", "llama-bpe", None),
    ("qwen2", "qwen2", None),
    ("llama-spm", "llama-spm", None),
    ("phi-3", "phi-3", None),
    ("gpt-neox", "gpt-neox", None),  # names no pre-tokenizer: default
    ("falcon", "falcon", None),
    ("qwen35", "qwen35", None),
    ("deepseek-coder", "deepseek-coder", None),
    ("refact", "refact", None),
    ("starcoder", "starcoder", None),
    ("command-r", "command-r", None),
    ("mpt", "mpt", None),
    ("aquila", "aquila", None),
    ("baichuan", "baichuan", None),
    ("qwen2 as tekken", "qwen2", "tekken"),
    ("gpt-2 as dbrx", "gpt-2", "dbrx"),
]
COMMITTED = [
    *("default-model", "gpt-2", "llama-bpe", "qwen2", "llama-spm", "phi-3", "gpt-neox", "falcon"),
    *("deepseek-coder", "qwen2 as tekken"),
]

_RANGES = [
    *((0x20, 0x7F), (0x20, 0x7F), (0xA0, 0x180), (0x370, 0x400), (0x400, 0x500), (0x590, 0x700)),
    *((0x900, 0xA00), (0xE00, 0x1000), (0x10A0, 0x1100), (0x1780, 0x1800), (0x1E00, 0x2000)),
    *((0x2000, 0x2070), (0x2070, 0x2C00), (0x3000, 0x3100), (0x4E00, 0x9FA5), (0xAC00, 0xD7A4)),
    *((0xFB00, 0xFE00), (0xFE00, 0x10000), (0x10000, 0x10800), (0x1D400, 0x1D800), (0x1F000, 0x1FA00)),
    *((0x20000, 0x2A000), (0xE0000, 0xE0200), (0, 0x20), (0x300, 0x370)),
]
_WORDS = re.findall(
    r"\S+",
    "the The THE hello Hello world it's IT'S we'Ll they've I'm i'M don't DON'T you're "
    "He'd o'clock 'tis ''s 'S 'ſ naïve façade straße ĳ ǅ ＡＢＣ ｶﾀｶﾅ Привет мир γειά שלום "
    "مرحبا नमस्ते สวัสดี བོད་སྐད བཀྲ་ཤིས 你好 世界 今日は 안녕하세요 0 7 42 123 1234 12345 3.14 1,000 "
    "٣٤٥ ½ Ⅷ ² ①② 𝟘𝟙 x1y22z333 _foo_bar __init__ CamelCaseWord snake_case kebab-case != "
    "== >= -> => // /* */ # ## ... … -- — «» “” ‘’ $9.99 €5 a+b=c ^_^ `code` ```py ~/x "
    "C:\\dir {} [] () <> </s> <b> <0x0A> ▁ ▁▁ 🙂 👍🏽 👨\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 🇩🇪 ❤️ é ñ Z͑ͫ̓ͪ̂ 가 "
    "<|im_start|> <|im_end|> <|endoftext|> <s> <unk> <|user|> <|end|> <|assistant|> "
    "<|eot_id|> <|begin_of_text|> <|im_start <|im_end|>> <<|im_end|> <fim_prefix> "
    "<|fim_prefix|> <think> [INST] <file_sep> <reponame>",
)
_SPACES = [
    " ",
    "  ",
    "   ",
    "     ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    "\t\t",
    " \n",
    "\n ",
    "\v",
    "\f",
    "\xa0",
    "\u2003",
]
_SPACES += ["\u3000", "\x85", "\u2028", "\u200b", "\ufeff", "\u1680", "\r", "\n \n", "  \t ", ""]


def _character(draw: random.Random) -> str:
    """A character that Unicode 13 knows: every table in use agrees on those."""
    while True:
        character = chr(draw.randrange(*draw.choice(_RANGES)))
        if unicodedata.category(character) not in ("Cs", "Cn"):
            return character


def generate(count: int, seed: int) -> list[str]:
    """Texts of words, characters, white space, control tokens and digits in all orders."""
    draw = random.Random(seed)
    texts = ["", " ", "  ", "\n", "\t", "a", " a", "a ", "\x00", "'", "''", "' s"]
    while len(texts) < count:
        parts = []
        for _ in range(draw.randrange(1, 14)):
            kind = draw.randrange(8)
            if kind < 3:
                parts.append(draw.choice(_WORDS))
            elif kind == 3:
                parts.append("".join(_character(draw) for _ in range(draw.randrange(1, 6))))
            elif kind == 4:
                parts.append("".join(draw.choice("0123456789") for _ in range(draw.randrange(1, 9))))
            elif kind == 5:
                parts.append(draw.choice("abeiostz=-. \n'") * draw.randrange(1, 12))
            else:
                parts.append(draw.choice(_SPACES))
            if draw.random() < 0.5:
                parts.append(draw.choice(_SPACES[:6]))
        texts.append("".join(parts))
    return texts[:count]


def read_metadata(path: Path) -> dict[str, Any]:
    """Metadata of a GGUF file, token strings as `str`."""
    import gguf

    reader = gguf.GGUFReader(path)
    return {
        key: field.contents()
        for key, field in reader.fields.items()
        if key.startswith("tokenizer.") or key in ("general.name", "general.architecture")
    }


def with_pre(path: Path, pre: str, target: Path) -> None:
    """A vocabulary file with another pre-tokenizer's name."""
    import gguf

    metadata = read_metadata(path)
    writer = gguf.GGUFWriter(target, metadata["general.architecture"])
    writer.add_name(metadata["general.name"])
    writer.add_tokenizer_model(metadata["tokenizer.ggml.model"])
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(metadata["tokenizer.ggml.tokens"])
    writer.add_token_types(metadata["tokenizer.ggml.token_type"])
    writer.add_token_merges(metadata["tokenizer.ggml.merges"])
    writer.add_bos_token_id(metadata["tokenizer.ggml.bos_token_id"])
    writer.add_eos_token_id(metadata["tokenizer.ggml.eos_token_id"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def reference(program: Path, vocabulary: Path, texts: list[str], parse: bool) -> list[list[int]]:
    """llama.cpp's ids of each text."""
    encoded = [text.encode() for text in texts]
    asked = b"".join(struct.pack("<IB", len(data), parse) + data for data in encoded)
    done = subprocess.run([program, vocabulary], input=asked, stdout=subprocess.PIPE, check=True)
    lines = done.stdout.decode().splitlines()
    assert len(lines) == len(texts), (vocabulary, len(lines))
    return [[int(i) for i in line.split()] for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=220)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    root: Path = arguments.llama_cpp
    texts = generate(arguments.texts, arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "ids.cpp"), Path(folder, "ids")
        source.write_text(PROGRAM)
        flags = [f"-I{root}/include", f"-I{root}/ggml/include", f"-L{root}/build/bin", "-lllama", "-lggml"]
        rpath = f"-Wl,-rpath,{(root / 'build/bin').resolve()}"
        subprocess.run(["g++", "-std=c++17", source, *flags, "-lggml-base", rpath, "-o", program], check=True)
        expected: dict[str, Any] = {}
        for name, file, pre in VOCABULARIES:
            if (not arguments.compare and name not in COMMITTED) or arguments.only not in name:
                continue
            path = root / "models" / f"ggml-vocab-{file}.gguf" if file else arguments.model
            if pre is not None:
                with_pre(path, pre, Path(folder, "changed.gguf"))
                path = Path(folder, "changed.gguf")
            results = [reference(program, path, texts, parse) for parse in (True, False)]
            if arguments.compare:
                compare(name, path, texts, results)
            expected[name] = {"vocabulary": file, "pre": pre, "parsed": results[0], "unparsed": results[1]}
    if not arguments.compare:
        target = Path(__file__).with_name("tokenizer_vectors.json.gz")
        content = json.dumps({"texts": texts, "vocabularies": expected}, separators=(",", ":")).encode()
        target.write_bytes(gzip.compress(content, 9, mtime=0))
        print(f"{target}: {target.stat().st_size} bytes")


def compare(name: str, path: Path, texts: list[str], results: list[list[list[int]]]) -> None:
    """Say how many texts fastllm encodes otherwise, and show a few."""
    from fastllm.formats.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_gguf(read_metadata(path))
    for parse, expected in zip((True, False), results, strict=True):
        wrong = 0
        for text, ids in zip(texts, expected, strict=True):
            ours = tokenizer.encode(text, add_special_tokens=False, parse_special=parse)
            if ours != ids:
                wrong += 1
                if wrong <= 4:
                    print(f"  {text!r}\n    llama.cpp {ids}\n    fastllm   {ours}")
        print(f"{name}: parse_special={parse}: {wrong} of {len(texts)} differ", flush=True)


if __name__ == "__main__":
    sys.exit(main())
