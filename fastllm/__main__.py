"""`python -m fastllm`: see `fastllm.cli`."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the arguments are those of the process unless given. Returns the exit status."""
    from fastllm.cli import run

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
