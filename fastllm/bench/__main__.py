"""`python -m fastllm.bench serve`: puts load on an OpenAI-compatible server and says how it bore it.

Tables go to stdout, everything else to stderr. Exit status: 0; 1 if no request succeeded; 2 for an error that
is explained, in one line; 130 after Ctrl-C, with the figures so far.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fastllm.errors import FastLLMError, RequestError

NOTHING_DONE = 1
ERROR = 2
INTERRUPTED = 130
EXTRA = "bench"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the arguments are those of the process unless given. Returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
    try:
        from fastllm.bench.arguments import make_parser

        return _serve(make_parser().parse_args(given), given[1:])
    except FastLLMError as error:
        shown = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(str(error).split()))
        print(f"fastllm.bench: error: {shown}", file=sys.stderr)
        return ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"fastllm.bench: error: {reason}", file=sys.stderr)
        return ERROR


def _serve(options: object, given: Sequence[str]) -> int:
    try:
        from fastllm.bench import serve
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "fastllm":
            raise
        limit = f"the package {error.name} (pip install 'fastllm[{EXTRA}]')"
        raise RequestError("serve", None, limit) from error
    return serve.command(options, given)


if __name__ == "__main__":
    sys.exit(main())
