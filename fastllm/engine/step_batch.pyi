from typing_extensions import disjoint_base

from fastllm.executor.base import Float32Array, Int32Array, UInt32Array, UInt64Array

@disjoint_base
class StepBatch:
    token_ids: Int32Array
    positions: Int32Array
    slot_mapping: Int32Array
    query_start: Int32Array
    seq_lens: Int32Array
    block_tables: Int32Array
    copy_blocks: Int32Array
    adapter: Int32Array
    row_seq: Int32Array
    row_token: Int32Array
    row_kind: Int32Array
    row_target: Int32Array
    num_logprobs: Int32Array
    temperature: Float32Array
    top_k: Int32Array
    top_p: Float32Array
    min_p: Float32Array
    presence: Float32Array
    frequency: Float32Array
    repetition: Float32Array
    seed: UInt64Array
    sample_index: Int32Array
    bias_start: Int32Array
    bias_ids: Int32Array
    bias_values: Float32Array
    banned_start: Int32Array
    banned_ids: Int32Array
    mask_row: Int32Array
    mask_words: UInt32Array
    history_start: Int32Array
    history: Int32Array
    history_prompt_len: Int32Array
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_seqs(self) -> int: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def num_hidden(self) -> int: ...
    @property
    def num_prefill_tokens(self) -> int: ...
    @property
    def num_draft_tokens(self) -> int: ...
    @property
    def context(self) -> float: ...
    def __init__(self, max_tokens: int, max_seqs: int) -> None: ...

@disjoint_base
class Column:
    def __init__(self, dtype: type, capacity: int) -> None: ...
