"""`python -m fastllm.serve`. Exit status: 0 after a signal; 2 for an error that is explained, in one line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fastllm.errors import FastLLMError

ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the server, or make a key. Returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        import fastapi  # noqa: F401
        import limits  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        return _fail(f"{error.name} is missing: pip install 'fastllm[serve]'")
    try:
        if given[:1] == ["keygen"]:
            return _keygen(given[1:])
        from fastllm.serve.arguments import make_parser, to_config
        from fastllm.serve.server import run

        run(to_config(make_parser().parse_args(given)))
    except FastLLMError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    return 0


def _keygen(arguments: Sequence[str]) -> int:
    from fastllm.serve.keys import make_key

    if len(arguments) != 1 or arguments[0].startswith("-"):
        return _fail("keygen: expected one NAME, which logs call the key's owner")
    key, line = make_key(arguments[0])
    print(f"# the key, which is not kept anywhere: {key}", file=sys.stderr)
    print(line)
    return 0


def _fail(reason: str) -> int:
    print("fastllm.serve: error: " + " ".join(reason.split()), file=sys.stderr)
    return ERROR


if __name__ == "__main__":
    sys.exit(main())
