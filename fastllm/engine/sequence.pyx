# cython: auto_pickle=False, autotestdict=False, boundscheck=False, wraparound=False
# distutils: language = c++
"""One sequence as the scheduler sees it: its tokens, its block table, its limits, its sampling parameters.

A request with n > 1 is n sequences with one prompt. Everything that a step reads is kept in C fields, so
that scheduling a sequence touches no Python object. Only the scheduler changes one after it was made.
"""

from libc.math cimport NAN
from libc.stdint cimport INT32_MAX, int32_t, uint32_t
from libcpp.algorithm cimport sort, unique
from libcpp.vector cimport vector
from cpython.bytes cimport PyBytes_FromStringAndSize

import operator
from hashlib import sha256

import numpy as np

from fastllm.errors import RequestError
from fastllm.pooling_params import PoolingParams

cdef float[MATCH_KINDS] FIRST_ACCEPTANCE = [0.3, 0.5, 0.8]
cdef tuple STATE_NAMES = ("new", "waiting", "running", "preempted", "finished", "aborted", "following")
cdef tuple FINISH_REASONS = (None, "stop", "length", "abort", "error")


cdef class Sequence:
    """One sequence.

    Args:
        request_id: the request it belongs to.
        prompt: token ids, int32 (prompt_len,), prompt_len >= 1 (see `pack_token_ids`).
        params: `SamplingParams`, already validated; or `PoolingParams`: it ends with its prompt.
        index: which of the request's n it is; part of its random key.
        seed: the rest of its random key, uint64.
        eos_token_ids: ids that end it unless `params.ignore_eos`.
        report_prompt: whether it is the one of its request that reports `params.prompt_logprobs`.
        priority: lower is more important.
        root: 32 bytes that stand for all that K and V depend on besides the tokens (`prefix_root`); None:
            its blocks are never shared with other requests.
        bad_words: token ids of words, each at least one: the last of a word's tokens is not sampled where the
            output ends with those before it.
        adapter: index of its LoRA adapter in the executor, which `root` must stand for too; -1: none.
        owner: an object to find again from the sequence.
    """

    def __init__(
        self, str request_id not None, const int32_t[::1] prompt not None, params, *, Py_ssize_t index=0,
        seed=0, eos_token_ids=(), bint report_prompt=True, owner=None, Py_ssize_t priority=0,
        bytes root=None, int32_t adapter=-1, bad_words=(),
    ):
        if prompt.shape[0] == 0:
            raise RequestError("prompt_token_ids", [], "at least one token id")
        self.request_id = request_id
        self.index = index
        self.owner = owner
        self.arrival = -1
        self.priority = priority
        self.guess = -1
        self.acceptance = FIRST_ACCEPTANCE
        self.hit_rate = -1.0
        self.last_token_time = NAN
        self.root = root
        self.hashes = []
        self.followers = []
        self.num_prompt = prompt.shape[0]
        self.tokens.assign(&prompt[0], &prompt[0] + prompt.shape[0])

        self.repetition = 1.0
        self.top_p = 1.0
        self.seed = seed
        self.adapter = adapter
        self.num_logprobs = -1
        self.num_prompt_logprobs = -1
        if isinstance(params, PoolingParams):
            self.pooling = POOL_MEAN if params.pooling == "mean" else POOL_LAST
        else:
            self._sample_with(params, eos_token_ids, report_prompt)
            for word in bad_words:
                for token in word:
                    self.bad_words.push_back(token)
                self.bad_ends.push_back(<Py_ssize_t> self.bad_words.size())

    cdef int _sample_with(self, params, eos_token_ids, bint report_prompt) except -1:
        self.max_tokens = -1 if params.max_tokens is None else params.max_tokens
        self.min_tokens = params.min_tokens
        if not params.ignore_eos:
            self.eos_ids = eos_token_ids
        self.stop_ids = params.stop_ids
        self.banned_ids = self.eos_ids
        self.banned_ids.insert(self.banned_ids.end(), self.stop_ids.begin(), self.stop_ids.end())
        _sort_unique(self.eos_ids)
        _sort_unique(self.stop_ids)
        _sort_unique(self.banned_ids)

        self.repetition = params.repetition_penalty
        self.presence = params.presence_penalty
        self.frequency = params.frequency_penalty
        self.penalized = self.repetition != 1.0 or self.presence != 0.0 or self.frequency != 0.0
        if not params.greedy:  # else all stay neutral: the most likely token survives every filter anyway
            self.temperature = params.temperature
            self.top_p = params.top_p
            self.top_k = max(params.top_k, 0)
            self.min_p = params.min_p
        self.num_logprobs = -1 if params.logprobs is None else params.logprobs
        if report_prompt and params.prompt_logprobs is not None:
            self.num_prompt_logprobs = params.prompt_logprobs
        if params.logit_bias:
            for token, bias in params.logit_bias.items():
                self.bias_ids.push_back(token)
                self.bias_values.push_back(bias)
        return 0

    cpdef int set_mask(self, const uint32_t[::1] mask, bint ends=False) except -1:
        """Say what it may sample next, and that it is held no longer. Only between update and schedule.

        Args:
            mask: uint32 (ceil(V / 32),); token i is allowed if bit i % 32 of word i // 32 is 1. It is not
                copied, and must not change. None: anything.
            ends: nothing but the end is allowed: min_tokens counts as reached.
        """
        if mask is not None and mask.shape[0] == 0:
            raise RequestError("mask", "no words", "one bit for each token of the vocabulary")
        self.mask = mask
        self.mask_words = NULL
        self.mask_width = 0
        if mask is not None:
            self.mask_words = &mask[0]
            self.mask_width = mask.shape[0]
        self.held = False
        if ends:
            self.min_tokens = min(self.min_tokens, <Py_ssize_t> self.tokens.size() - self.num_prompt)
        return 0

    cpdef int hold(self) except -1:
        """What may follow its newest token is being worked out: it is not sampled before set_mask. Only
        between update and schedule."""
        self.held = True
        return 0

    cdef int extend_hashes(self, Py_ssize_t count, Py_ssize_t block_size) except -1:
        """Make `hashes` cover the first `count` blocks, which are full: a chain of SHA-256 over the hash of
        the block before (`root` at first) and the block's token ids, little-endian int32."""
        cdef Py_ssize_t i
        cdef Py_ssize_t known = len(self.hashes)
        before = self.hashes[known - 1] if known else self.root
        for i in range(known, count):
            text = PyBytes_FromStringAndSize(
                <const char*> &self.tokens[i * block_size], block_size * sizeof(int32_t)
            )
            before = sha256(before + text).digest()
            self.hashes.append(before)
        return 0

    @property
    def state(self):
        """"new", "following", "waiting", "running", "preempted", "finished" or "aborted"."""
        return STATE_NAMES[<int> self.state_code]

    @property
    def finish_reason(self):
        """"stop", "length", "abort", or None while it is alive."""
        return FINISH_REASONS[<int> self.finish_code]

    @property
    def pools(self):
        """Whether it yields hidden states of its prompt instead of tokens."""
        return self.pooling != POOL_NONE

    @property
    def num_tokens(self):
        """Tokens known so far, prompt included."""
        return <Py_ssize_t> self.tokens.size()

    @property
    def num_output(self):
        """Tokens generated so far."""
        return <Py_ssize_t> self.tokens.size() - self.num_prompt

    @property
    def token_ids(self):
        """Prompt and output, list[int]."""
        return self.tokens

    @property
    def output_token_ids(self):
        """The generated tokens, list[int]."""
        cdef Py_ssize_t i
        return [self.tokens[i] for i in range(self.num_prompt, <Py_ssize_t> self.tokens.size())]

    @property
    def new_token_ids(self):
        """The tokens that the last update brought, list[int] of length num_new."""
        cdef Py_ssize_t i
        cdef Py_ssize_t size = <Py_ssize_t> self.tokens.size()
        return [self.tokens[i] for i in range(size - self.num_new, size)]

    @property
    def block_ids(self):
        """The block table, list[int]."""
        return self.blocks

    def __repr__(self):
        return (
            f"Sequence({self.request_id!r}, index={self.index}, {self.state}, {self.num_prompt} prompt + "
            f"{self.num_output} output tokens, {self.num_computed} computed, {self.blocks.size()} blocks)"
        )


def prefix_root(*parts):
    """The hash before the first token of a sequence, `Sequence`'s root.

    Args:
        parts: str or bytes, everything that K and V depend on besides the tokens (model, adapter, type of the
            KV cache, size of its blocks), and whatever else is to keep requests from sharing blocks.

    Returns:
        32 bytes: SHA-256 over the parts, each with its length before it.
    """
    digest = sha256()
    for part in parts:
        text = part if isinstance(part, bytes) else str(part).encode()
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(text)
    return digest.digest()


def pack_token_ids(token_ids, Py_ssize_t vocab_size):
    """Token ids of a prompt as an array of its own.

    Args:
        token_ids: an iterable of integers (no bools), or a one-dimensional integer array.
        vocab_size: ids must be in 0..vocab_size-1.

    Returns:
        int32 (len,), C-contiguous.

    Raises:
        RequestError: no ids, an id out of range, or something that is no integer.
    """
    limit = f"a list of token ids in 0..{vocab_size - 1}"
    if isinstance(token_ids, np.ndarray):
        if token_ids.ndim != 1 or token_ids.dtype.kind not in "iu":
            raise RequestError("prompt_token_ids", token_ids, limit)
        token_ids = token_ids.tolist()
    elif isinstance(token_ids, (str, bytes)):
        raise RequestError("prompt_token_ids", token_ids, limit)
    elif not isinstance(token_ids, (list, tuple)):
        try:
            token_ids = list(token_ids)
        except TypeError:
            raise RequestError("prompt_token_ids", token_ids, limit) from None
    cdef Py_ssize_t size = len(token_ids)
    if size == 0:
        raise RequestError("prompt_token_ids", token_ids, "at least one token id")
    if size > INT32_MAX:
        raise RequestError("prompt_token_ids", f"{size} ids", "at most 2**31-1 ids")
    result = np.empty(size, dtype=np.int32)
    cdef int32_t[::1] packed = result
    cdef Py_ssize_t i = 0
    cdef Py_ssize_t token
    for item in token_ids:
        if type(item) is bool:
            raise RequestError("prompt_token_ids", item, limit)
        try:
            token = item if type(item) is int else operator.index(item)
        except (TypeError, OverflowError):
            raise RequestError("prompt_token_ids", item, limit) from None
        if token < 0 or token >= vocab_size:
            raise RequestError("prompt_token_ids", item, limit)
        packed[i] = <int32_t> token
        i += 1
    return result


cdef int _sort_unique(vector[int32_t]& ids) except -1:
    sort(ids.begin(), ids.end())
    ids.erase(unique(ids.begin(), ids.end()), ids.end())
    return 0
