"""How many blocks a KV cache has: what was asked for, or a share of the memory that is free."""

from __future__ import annotations

from fastllm.errors import CapacityError
from fastllm.executor.memory import format_bytes


def kv_blocks(
    *,
    free: int,
    own: int,
    beside: int,
    weights: int,
    block_size: int,
    asked: int | None,
    share: float | None,
    default_share: float,
    max_model_len: int,
    max_num_seqs: int,
) -> tuple[int, str]:
    """(blocks, where the number comes from, for the log).

    Args:
        free: bytes of memory once the weights are loaded.
        own, beside: bytes of a block in this cache, and in another executor's of as many blocks.
        weights: bytes of them, for messages.
        asked: bytes; None: `share` of `free`, or without one what max_num_seqs sequences of max_model_len
            need, at most `default_share` of `free`.

    Raises:
        CapacityError: more was asked for than is free, or not one block fits.
    """
    per_block = own + beside
    if share is not None:
        blocks = int(free * share) // per_block
        origin = f"{share:g} of {format_bytes(free)} free"
    elif asked is None:
        wanted = -(-max_model_len // block_size) * max_num_seqs
        blocks = min(wanted, max(int(free * default_share) // per_block, 1))
        origin = (
            f"{max_num_seqs} sequences of {max_model_len} tokens or {default_share:g} of "
            f"{format_bytes(free)} free"
        )
    else:
        blocks = asked // per_block
        origin = f"{format_bytes(asked)} asked"
        if asked > free:
            raise CapacityError(
                f"KV cache of {blocks} blocks x {block_size} tokens x {per_block // block_size} bytes/token, "
                f"beside {format_bytes(weights)} of weights",
                asked=asked,
                had=free,
                would_fit=free // per_block * per_block,
                unit="bytes",
            )
    blocks = min(blocks, (2**31 - 1) // block_size - 1)
    if blocks < 1:
        raise CapacityError(
            f"one block of {block_size} tokens in the KV cache",
            asked=per_block,
            had=int(free * share) if share is not None else free if asked is None else asked,
            would_fit=0,
            unit="bytes",
        )
    return blocks, origin
