"""Which token of a row: exact cuts in a row of logits, by count and by mass, and draws.

Three representations make every result a pure function of the row, whatever the order of additions:

    mass    exp((x - highest) / temperature) in units of 2^-43, rounded down, int64: sums are exact. Nothing
            is left of a token below e^-29.8; a million of them have less than 2^-23 of the likeliest's mass.
    key     x as an integer, then the id, in 63 bits of an int64: greater means likelier, the lower id first
            among equals. Of no two tokens the same; -1 where there is no token.
    cut     the greatest key with which the weights of all keys not below it reach a goal. Counts give the
            k-th highest token, masses the end of a nucleus, masses by falling id the token that is drawn.

A cut is found by halving an interval of keys whose ends are keys that occur: about 15 steps for a thousand.
That is cheap for tokens in registers, so first a bound is found that just enough tokens reach: the m-th
highest of the maximums of blocks of 64 logits. The tokens that reach it are gathered as candidates. What
those do not settle, mostly a nucleus of more than some hundred tokens, is left to sift_kernel.

Arrays with two entries for a row, [r, 0] and [r, 1], are of its raw logits and of those that it is sampled
from, which are the same where nothing is edited.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastllm.kernels.philox import sample_uniform

# What a row is, in `flags`; 0: nothing to do.
ACTIVE = tl.constexpr(1)  # a token is sampled or given
EDITED = tl.constexpr(2)  # bias, bans, mask or penalties
PENALTY = tl.constexpr(4)
RANDOM = tl.constexpr(8)
FILTERED = tl.constexpr(16)  # min_p, top_k or top_p

RAW = tl.constexpr(0)
SAMPLED = tl.constexpr(1)
UNDECIDED = tl.constexpr(-2)  # in tokens, between choose_kernel and sift_kernel

ONE = tl.constexpr(1 << 43)  # the mass of the likeliest token
LAST_ID = tl.constexpr(0x7FFFFFFF)
LAST_KEY = tl.constexpr(0x7FFFFFFFFFFFFFFF)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the lowest finite number
INFINITY = tl.constexpr(float("inf"))

# Arguments that are read one by one, often slices of greater arrays: no kernel is compiled again for where
# such a slice begins.
ROW_ARRAYS = (
    "row_kind", "row_target", "num_logprobs", "temperature", "top_k", "top_p", "min_p", "presence",
    "frequency", "repetition", "seed", "sample_index", "position", "bias_start", "bias_ids", "bias_values",
    "banned_start", "banned_ids", "mask_row", "mask_words", "history_start", "history", "history_prompt_len",
    "tokens", "logprob", "rank", "top_ids", "top_logprobs", "top_stride",
)  # fmt: skip


# ---- logits, masses, keys ----------------------------------------------------------------------------------


@triton.jit
def is_finite(x):
    return tl.abs(x) < INFINITY


@triton.jit
def logits_of(which, flags, logits, row_stride, edited, V, r):
    """Where row r's raw logits are, or those that it is sampled from."""
    row = logits + r.to(tl.int64) * row_stride
    if (which == SAMPLED) & ((flags & EDITED) != 0):
        row = edited + r.to(tl.int64) * V
    return row


@triton.jit
def load_logits(row, ids, V):
    """-infinity past the end; for NaN +infinity, which fails a row as well."""
    x = tl.load(row + ids, mask=ids < V, other=-INFINITY)
    return tl.where(x == x, x, INFINITY)


@triton.jit
def y_of(x, top, inverse):
    """(x - top) / temperature, rounded as the CPU's; does not overflow, as inverse is at most 1e5."""
    return tl.maximum(x - top, -1e33) * inverse


@triton.jit
def load_there(row, ids, V, top, inverse, min_y, floor):
    """Logits, and whether a token is there: x >= floor and, by min_p, y >= min_y."""
    x = load_logits(row, ids, V)
    return x, (ids < V) & (x >= floor) & (y_of(x, top, inverse) >= min_y)


@triton.jit
def mass_of(x, top, inverse):
    """e^y; of -infinity 0, also where top is -infinity."""
    center = tl.where(is_finite(top), top, 0.0)
    y = tl.minimum(tl.maximum(x - center, -32.0 / inverse) * inverse, 0.0)
    # e^y = 2^n e^r with |r| < 0.35: a relative error of 2^-22, however small it is
    magic = tl.fma(y, 1.4426950408889634, 12582912.0)
    n = magic - 12582912.0
    r = tl.fma(n, 2.12194440e-4, tl.fma(n, -0.693359375, y))
    scale = ((magic.to(tl.int32, bitcast=True) << 23) + ((127 + 43) << 23)).to(tl.float32, bitcast=True)
    return (tl.exp2(r * 1.4426950408889634) * scale).to(tl.int64)


@triton.jit
def key_of(x, ids):
    """Zeros of both signs are equal."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    rising = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 2147483648
    return (rising << 31) | (ids ^ LAST_ID).to(tl.int64)


@triton.jit
def value_of(key):
    rising = ((key >> 31) - 2147483648).to(tl.int32)
    return tl.where(rising < 0, rising ^ 0x7FFFFFFF, rising).to(tl.float32, bitcast=True)


@triton.jit
def id_of(key):
    return (key & LAST_ID).to(tl.int32) ^ LAST_ID


@triton.jit
def find_cut(keys, weights, goal, spare):
    """The greatest key from which on the weights reach goal >= 1; 0 where all together do not.

    With spare > 0 it may be a lower one, from which on they are at most goal + spare.
    """
    low = tl.cast(0, tl.int64)
    high = tl.max(keys, 0)
    over = tl.cast(LAST_KEY, tl.int64)
    while (low < high) & (over > spare):
        middle = high - ((high - low) >> 1)
        above = keys >= middle
        reached = tl.sum(tl.where(above, weights, 0), 0)
        if reached >= goal:
            low = tl.min(tl.where(above, keys, LAST_KEY), 0)
            over = reached - goal
        else:
            high = tl.max(tl.where(above, -1, keys), 0)
    return low


@triton.jit
def portion(part, total):
    """Of a mass > 0, in 0..total - 1; a token is drawn by how many have no more up to them."""
    return tl.minimum((part * total.to(tl.float64)).to(tl.int64), total - 1)


@triton.jit
def nucleus_goal(p, total):
    """The mass with which a nucleus ends."""
    return tl.maximum((p.to(tl.float64) * total.to(tl.float64)).to(tl.int64), 1)


# ---- rows by their chunks ----------------------------------------------------------------------------------


@triton.jit
def row_highest(at, highest, C, CHUNKS: tl.constexpr):
    c = tl.arange(0, CHUNKS)
    return tl.max(tl.load(highest + at * C + c, mask=c < C, other=-INFINITY), 0)


@triton.jit
def chunk_masses(at, top, inverse, highest, mass, C, CHUNKS: tl.constexpr):
    """(CHUNKS,) the chunks' masses, relative to the row's highest logit and to their own."""
    c = tl.arange(0, CHUNKS)
    own = tl.load(mass + at * C + c, mask=c < C, other=0)
    scale = mass_of(tl.load(highest + at * C + c, mask=c < C, other=-INFINITY), top, inverse)
    scaled = (own.to(tl.float64) * scale.to(tl.float64) * (1.0 / ONE)).to(tl.int64)
    return tl.where(scale == ONE, own, scaled), own


@triton.jit
def row_total(at, top, inverse, highest, mass, C, CHUNKS: tl.constexpr):
    masses, _ = chunk_masses(at, top, inverse, highest, mass, C, CHUNKS)
    return tl.sum(masses, 0)


@triton.jit
def log_sum(at, top, highest, mass, C, CHUNKS: tl.constexpr):
    """The logarithm of the sum of exp(x - top), float64."""
    return tl.log(row_total(at, top, 1.0, highest, mass, C, CHUNKS).to(tl.float64) * (1.0 / ONE))


# ---- candidates --------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize_on_alignment=ROW_ARRAYS)
def bound_kernel(
    V, C, B, num_logprobs, top_k, min_p, flags, highest, block_highest, limits, found,
    CHUNKS: tl.constexpr, BLOCKS: tl.constexpr, CANDIDATES: tl.constexpr, NUCLEUS: tl.constexpr,
):  # fmt: skip
    """A logit that enough tokens reach, but not many more.

    limits (R, 2, 3): that bound, the row's highest logit, and the least y by min_p. found (R, 2): 0. Where
    nothing is to be gathered, the bound is infinite and found is CANDIDATES + 1. Grid: (R, 2), the first for
    the top n.
    """
    r = tl.program_id(0)
    which = tl.program_id(1)
    at = r * 2 + which
    what = tl.load(flags + r)
    n = tl.minimum(tl.load(num_logprobs + r), V)
    wanted = n
    needed = ((what & ACTIVE) != 0) & (n > 0)
    floor = tl.cast(-INFINITY, tl.float32)
    min_y = floor
    if which == SAMPLED:
        needed = (what & FILTERED) != 0
        floor = tl.cast(LOWEST, tl.float32)
        p = tl.load(min_p + r)
        k = tl.load(top_k + r)
        if p > 0.0:
            min_y = tl.log(p.to(tl.float64)).to(tl.float32)  # as the CPU has it
        wanted = tl.minimum(NUCLEUS, B // 2)
        if (k > 0) & (k < V):
            wanted = k
        elif p > 0.0:
            wanted = 0  # just what min_p leaves
    if V <= CANDIDATES:
        wanted = 0
    start = CANDIDATES + 1
    bound = tl.cast(INFINITY, tl.float32)
    if needed:
        top = row_highest(at, highest, C, CHUNKS)
        tl.store(limits + at * 3 + 1, top)
        tl.store(limits + at * 3 + 2, min_y)
        if is_finite(top) & (wanted <= B):
            start = 0
            bound = floor
            if wanted > 0:
                b = tl.arange(0, BLOCKS)
                x = tl.load(block_highest + at * B + b, mask=b < B, other=-INFINITY)
                keys = tl.where(b < B, key_of(x, b), -1)
                bound = tl.maximum(floor, value_of(find_cut(keys, (b < B).to(tl.int64), wanted, wanted // 4)))
    tl.store(limits + at * 3, bound)
    tl.store(found + at, start)


@triton.jit(do_not_specialize_on_alignment=ROW_ARRAYS)
def gather_kernel(
    logits, row_stride, V, C, flags, temperature, edited, highest, limits, found, values, places,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """The tokens that reach the bound, in any order, to values and places (R, 2, CANDIDATES).

    found counts them, more than are stored where there are too many. Grid: (R, parts of a row, 2). Reads
    blocks of chunks that have some.
    """
    r = tl.program_id(0)
    which = tl.program_id(2)
    at = r * 2 + which
    bound = tl.load(limits + at * 3)
    if bound < INFINITY:
        top = tl.load(limits + at * 3 + 1)
        min_y = tl.load(limits + at * 3 + 2)
        inverse = tl.cast(1.0, tl.float32)
        if which == SAMPLED:
            inverse = tl.div_rn(1.0, tl.load(temperature + r))
        row = logits_of(which, tl.load(flags + r), logits, row_stride, edited, V, r)
        before = 0
        for start in range(tl.program_id(1) * BLOCK, V, tl.num_programs(1) * BLOCK):
            own = tl.load(highest + at * C + start // CHUNK)
            if (own >= bound) & (y_of(own, top, inverse) >= min_y) & (before < CANDIDATES):
                ids = start + tl.arange(0, BLOCK)
                x, there = load_there(row, ids, V, top, inverse, min_y, bound)
                place = tl.cumsum(there.to(tl.int32), 0)
                # Only what this returns may end the loop: loaded, it could differ from thread to thread.
                before = tl.atomic_add(found + at, tl.max(place, 0), sem="relaxed")
                place += before - 1
                there = there & (place < CANDIDATES)
                tl.store(values + at.to(tl.int64) * CANDIDATES + place, x, mask=there)
                tl.store(places + at.to(tl.int64) * CANDIDATES + place, ids, mask=there)


@triton.jit
def load_candidates(values, places, count, CANDIDATES: tl.constexpr):
    """Logits, ids, and whether they are there."""
    i = tl.arange(0, CANDIDATES)
    x = tl.load(values + i, mask=i < count, other=-INFINITY)
    return x, tl.load(places + i, mask=i < count, other=0), i < count


# ---- the choice --------------------------------------------------------------------------------------------


@triton.jit
def draw_plain(
    at, row, V, C, top, inverse, uniform, highest, mass, CHUNK: tl.constexpr, CHUNKS: tl.constexpr
):
    """A token of all: first its chunk, by the chunks' masses, then the token in it."""
    parts, own = chunk_masses(at, top, inverse, highest, mass, C, CHUNKS)
    upto = tl.cumsum(parts, 0)
    goal = portion(uniform, tl.sum(parts, 0))
    c = tl.sum((upto <= goal).to(tl.int32), 0)
    here = tl.arange(0, CHUNKS) == c
    part = tl.sum(tl.where(here, parts, 0), 0)
    rest = goal - tl.sum(tl.where(here, upto - parts, 0), 0)
    goal = portion(rest.to(tl.float64) / part.to(tl.float64), tl.sum(tl.where(here, own, 0), 0))
    ids = c * CHUNK + tl.arange(0, CHUNK)
    masses = mass_of(load_logits(row, ids, V), tl.load(highest + at * C + c), inverse)
    return c * CHUNK + tl.sum((tl.cumsum(masses, 0) <= goal).to(tl.int32), 0)


@triton.jit
def draw_candidate(
    at, V, C, top, inverse, uniform, k, p, min_p, highest, mass, count, values, places,
    CHUNKS: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """A token of the candidates that top_k and top_p leave; UNDECIDED when the nucleus goes beyond them."""
    x, ids, there = load_candidates(values, places, count, CANDIDATES)
    keys = tl.where(there, key_of(x, ids), -1)
    weights = tl.where(there, mass_of(x, top, inverse), 0)
    by_count = (k > 0) & (k < V)
    if by_count & (k < count):
        cut = find_cut(keys, there.to(tl.int64), k, 0)
        weights = tl.where((keys >> 31) >= (cut >> 31), weights, 0)  # with all that equal the last
    total = tl.sum(weights, 0)
    decided = True
    if p < 1.0:
        whole = total
        if not (by_count | (min_p > 0.0)):  # else the candidates are all that is left
            whole = row_total(at, top, inverse, highest, mass, C, CHUNKS)
        goal = nucleus_goal(p, whole)
        decided = goal <= total
        if decided:
            weights = tl.where(keys >= find_cut(keys, weights, goal, 0), weights, 0)
            total = tl.sum(weights, 0)
    token = tl.cast(UNDECIDED, tl.int32)
    if decided:
        falling = tl.where(weights > 0, (ids ^ LAST_ID).to(tl.int64), -1)
        token = id_of(find_cut(falling, weights, portion(uniform, total) + 1, 0))
    return token


@triton.jit(do_not_specialize_on_alignment=ROW_ARRAYS)
def choose_kernel(
    logits, row_stride, V, C, row_kind, row_target, num_logprobs, temperature, top_k, top_p, min_p, seed,
    sample_index, position, flags, edited, highest, first, mass, found, values, places,
    tokens, logprob, rank, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """The token; logprob and rank where they are not asked for, and where they are a rank of 1. Grid: (R,)"""
    r = tl.program_id(0)
    kind = tl.load(row_kind + r)
    if kind >= 0:
        at = r * 2 + SAMPLED
        what = tl.load(flags + r)
        token = tl.cast(-1, tl.int32)
        raw_top = tl.cast(-INFINITY, tl.float32)
        if (what & ACTIVE) != 0:
            raw_top = row_highest(r * 2 + RAW, highest, C, CHUNKS)
        if kind == 2:
            token = tl.cast(0, tl.int32)
        elif is_finite(raw_top):
            if kind == 1:
                token = tl.load(row_target + r)
            else:
                c = tl.arange(0, CHUNKS)
                tops = tl.load(highest + at * C + c, mask=c < C, other=-INFINITY)
                top = tl.max(tops, 0)
                if is_finite(top):
                    if (what & RANDOM) == 0:
                        ids = tl.load(first + at * C + c, mask=c < C, other=LAST_ID)
                        token = tl.min(tl.where(tops == top, ids, LAST_ID), 0)
                    else:
                        inverse = tl.div_rn(1.0, tl.load(temperature + r))
                        uniform = sample_uniform(
                            tl.load(seed + r), tl.load(sample_index + r), tl.load(position + r)
                        )
                        if (what & FILTERED) == 0:
                            row = logits_of(SAMPLED, what, logits, row_stride, edited, V, r)
                            token = draw_plain(
                                at, row, V, C, top, inverse, uniform, highest, mass, CHUNK, CHUNKS
                            )
                        else:
                            token = tl.cast(UNDECIDED, tl.int32)
                            count = tl.load(found + at)
                            if count <= CANDIDATES:
                                token = draw_candidate(
                                    at, V, C, top, inverse, uniform, tl.load(top_k + r), tl.load(top_p + r),
                                    tl.load(min_p + r), highest, mass, count,
                                    values + at.to(tl.int64) * CANDIDATES,
                                    places + at.to(tl.int64) * CANDIDATES, CHUNKS, CANDIDATES,
                                )  # fmt: skip
        tl.store(tokens + r, token)
        tl.store(logprob + r, float("nan"))
        asked = ((what & ACTIVE) != 0) & (tl.load(num_logprobs + r) >= 0)
        tl.store(rank + r, tl.where(asked & (token != -1), 1, 0))


# ---- rows whose candidates do not suffice ------------------------------------------------------------------


@triton.jit
def load_weights(row, ids, V, top, inverse, min_y, low, high, cut, by_count):
    """Of tokens there with low <= x <= high and keys not below the cut 1, or their masses; of others 0."""
    x, there = load_there(row, ids, V, top, inverse, min_y, low)
    there = there & (x <= high) & (key_of(x, ids) >= cut)
    return tl.where(there, tl.where(by_count, 1, mass_of(x, top, inverse)), 0)


@triton.jit
def row_mass(row, V, top, inverse, min_y, floor, BLOCK: tl.constexpr):
    sums = tl.zeros((BLOCK,), tl.int64)
    for start in tl.range(0, V, BLOCK, num_stages=3):
        ids = start + tl.arange(0, BLOCK)
        sums += load_weights(row, ids, V, top, inverse, min_y, floor, INFINITY, 0, False)
    return tl.sum(sums, 0)


@triton.jit
def walk_row(row, V, top, inverse, min_y, low, high, cut, goal, by_count, BLOCK: tl.constexpr):
    """The first id up to which the sum of load_weights exceeds goal, as that of all does, and that sum."""
    before = tl.cast(0, tl.int64)
    chosen = 0
    passed = before
    for start in tl.range(0, V, BLOCK, num_stages=3):
        ids = start + tl.arange(0, BLOCK)
        weights = load_weights(row, ids, V, top, inverse, min_y, low, high, cut, by_count)
        after = before + tl.sum(weights, 0)
        here = (before <= goal) & (goal < after)
        chosen = tl.where(here, start, chosen)
        passed = tl.where(here, before, passed)
        before = after
    ids = chosen + tl.arange(0, BLOCK)
    upto = passed + tl.cumsum(load_weights(row, ids, V, top, inverse, min_y, low, high, cut, by_count), 0)
    reached = tl.min(tl.where(upto > goal, upto, LAST_KEY), 0)
    return chosen + tl.sum((upto <= goal).to(tl.int32), 0), reached


@triton.jit
def gather_row(
    row, V, top, inverse, min_y, low, high, cut, values, places,
    BLOCK: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Stores, by id, the tokens there with low <= x <= high and keys not below the cut; how many."""
    count = 0
    for start in tl.range(0, V, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x, there = load_there(row, ids, V, top, inverse, min_y, low)
        there = there & (x <= high) & (key_of(x, ids) >= cut)
        place = count + tl.cumsum(there.to(tl.int32), 0)
        count = tl.max(place, 0)
        there = there & (place <= CANDIDATES)
        tl.store(values + place - 1, x, mask=there)
        tl.store(places + place - 1, ids, mask=there)
    tl.debug_barrier()
    return count


@triton.jit
def find_row_cut(
    row, V, top, inverse, min_y, floor, goal, by_count, values, places,
    BLOCK: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """As find_cut, among the tokens of a row that are there, by count or by mass; and what is reached there.

    Halves an interval of logits until few enough are in it to be gathered: about 10 reads of the row. Where
    that ends with one logit that too many have, the cut is among their ids.
    """
    low = tl.where(by_count, floor, tl.maximum(floor, top - 32.0 / inverse))  # below, nothing has a mass
    high = top
    from_low = V  # tokens with x >= low, at most
    beyond = 0  # tokens with x > high
    passed = tl.cast(0, tl.int64)  # their weights
    while (low < high) & (from_low - beyond > CANDIDATES):
        middle = tl.maximum(low, LOWEST) * 0.5 + high * 0.5
        middle = tl.where(middle > low, middle, high)
        sums = tl.zeros((BLOCK,), tl.int64)
        counts = tl.zeros((BLOCK,), tl.int32)
        least = tl.full((BLOCK,), INFINITY, tl.float32)
        most = tl.full((BLOCK,), -INFINITY, tl.float32)
        for start in tl.range(0, V, BLOCK, num_stages=3):
            x, there = load_there(row, start + tl.arange(0, BLOCK), V, top, inverse, min_y, floor)
            above = there & (x >= middle)
            counts += above.to(tl.int32)
            sums += tl.where(above, mass_of(x, top, inverse), 0)
            least = tl.minimum(least, tl.where(above, x, INFINITY))
            most = tl.maximum(most, tl.where(there & (x < middle), x, -INFINITY))
        count = tl.sum(counts, 0)
        reached = tl.where(by_count, count, tl.sum(sums, 0))
        if reached >= goal:
            low = tl.min(least, 0)
            from_low = count
        else:
            high = tl.max(most, 0)
            beyond = count
            passed = reached
    goal -= passed
    if from_low - beyond <= CANDIDATES:
        count = gather_row(row, V, top, inverse, min_y, low, high, 0, values, places, BLOCK, CANDIDATES)
        x, ids, there = load_candidates(values, places, count, CANDIDATES)
        keys = tl.where(there, key_of(x, ids), -1)
        weights = tl.where(there, tl.where(by_count, 1, mass_of(x, top, inverse)), 0)
        cut = find_cut(keys, weights, goal, 0)
        passed += tl.sum(tl.where(keys >= cut, weights, 0), 0)
    else:
        last, reached = walk_row(row, V, top, inverse, min_y, high, high, 0, goal - 1, by_count, BLOCK)
        cut = key_of(high, last)
        passed += reached
    return cut, passed


@triton.jit(do_not_specialize_on_alignment=ROW_ARRAYS)
def sift_kernel(
    logits, row_stride, V, num_logprobs, temperature, top_k, top_p, seed, sample_index, position,
    flags, edited, limits, found, values, places, tokens, CANDIDATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The tokens that choose_kernel left undecided, and n candidates for a top n where there were too many.

    One program reads the whole row, about 15 times. Grid: (R, 2), the first for the top n.
    """
    r = tl.program_id(0)
    which = tl.program_id(1)
    at = r * 2 + which
    what = tl.load(flags + r)
    n = tl.minimum(tl.load(num_logprobs + r), V)
    if which == RAW:
        left = ((what & ACTIVE) != 0) & (n > 0) & (tl.load(found + at) > CANDIDATES)
    else:
        left = ((what & FILTERED) != 0) & (tl.load(tokens + r) == UNDECIDED)
    top = tl.load(limits + at * 3 + 1)
    if left & is_finite(top):
        values += at.to(tl.int64) * CANDIDATES
        places += at.to(tl.int64) * CANDIDATES
        row = logits_of(which, what, logits, row_stride, edited, V, r)
        inverse = tl.cast(1.0, tl.float32)
        floor = tl.cast(-INFINITY, tl.float32)
        min_y = tl.load(limits + at * 3 + 2)
        goal = n.to(tl.int64)
        if which == SAMPLED:
            inverse = tl.div_rn(1.0, tl.load(temperature + r))
            floor = tl.cast(LOWEST, tl.float32)
            k = tl.load(top_k + r)
            goal = tl.where(k < V, k, 0).to(tl.int64)
        cut = tl.cast(0, tl.int64)
        total = cut
        for stage in range(2):  # by count, then by mass
            by_count = stage == 0
            if (which == SAMPLED) & (stage == 1):
                floor = tl.where(cut > 0, tl.maximum(floor, value_of(cut)), floor)  # with its equals
                cut = tl.cast(0, tl.int64)
                total = row_mass(row, V, top, inverse, min_y, floor, BLOCK)
                p = tl.load(top_p + r)
                goal = tl.where(p < 1.0, nucleus_goal(p, total), 0)
            if (goal > 0) & (by_count | (which == SAMPLED)):
                cut, total = find_row_cut(
                    row, V, top, inverse, min_y, floor, goal, by_count, values, places, BLOCK, CANDIDATES
                )
        if which == RAW:
            gather_row(row, V, top, inverse, min_y, floor, INFINITY, cut, values, places, BLOCK, CANDIDATES)
            tl.store(found + at, n)
        else:
            uniform = sample_uniform(tl.load(seed + r), tl.load(sample_index + r), tl.load(position + r))
            goal = portion(uniform, total)
            token, _ = walk_row(row, V, top, inverse, min_y, floor, INFINITY, cut, goal, False, BLOCK)
            tl.store(tokens + r, token)
