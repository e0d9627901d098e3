"""The C++ decoder: against `transformers` and the float64 oracle, and against itself in every arrangement."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import strategies
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from step_batches import Chunk, step_batch, whole

from fastllm import _core, reference
from fastllm.errors import CapacityError, ModelFileError, RequestError, UnsupportedModelError
from fastllm.executor.cpu import CpuExecutor
from fastllm.formats.checkpoint import open_checkpoint
from fastllm.models.registry import spec_from_checkpoint
from fastllm.models.slots import decoder_slots, sizes
from fastllm.models.spec import DecoderSpec

Floats = npt.NDArray[np.float32]


@contextmanager
def executor(path: Path, **options: Any) -> Iterator[CpuExecutor]:
    defaults: dict[str, Any] = {
        "max_model_len": 256,
        "max_num_seqs": 4,
        "kv_cache_dtype": "fp32",
        "threads": 2,
    }
    with open_checkpoint(path) as checkpoint:
        spec = spec_from_checkpoint(checkpoint)
        made = CpuExecutor(checkpoint, spec, **{**defaults, **options})
    try:
        yield made
    finally:
        made.close()


def all_logits(made: CpuExecutor, tokens: list[int]) -> Floats:
    table = list(range(made.kv_capacity()))
    _, logits = made.run(step_batch([whole(tokens, table)], made.block_size), logits=True)
    assert logits is not None
    return logits


def assert_close(got: Floats, expected: npt.NDArray[Any], tolerance: float) -> None:
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


VARIANTS = [("hf", v) for v in tiny.VARIANTS] + [("gguf", v) for v in tiny.GGUF_VARIANTS]


@pytest.mark.parametrize(("kind", "variant"), VARIANTS)
def test_agrees_with_transformers(kind: str, variant: str, tmp_path: Path) -> None:
    model = tiny.make_model(variant)
    path = tiny.save_hf(model, tmp_path) if kind == "hf" else tiny.save_gguf(model, tmp_path / "model.gguf")
    tokens = tiny.tokens(90)  # more than one tile of the attention fold
    with executor(path) as made:
        assert_close(all_logits(made, tokens), tiny.logits(model, tokens), 1e-4)


@pytest.mark.parametrize("dtype", [*strategies.QUANTIZED_TYPES, "F16", "BF16"])
def test_quantized_files_stay_near_their_dequantized_weights(dtype: str, tmp_path: Path) -> None:
    """What is lost is the rounding of activations to 8 bits, nothing of the file's precision.

    That rounding is 0.6 % of a row's root mean square per product (normal values, 32 to a group); these
    random layers add up and amplify it to 2 or 3 % of the logits. A code, scale or minimum in the wrong place
    gives 100 %; that the products themselves are exact is test_kernels' part.
    """
    model = tiny.make_model("llama", **tiny.WIDE)
    path = tiny.save_gguf(model, tmp_path / "model.gguf", dtype=dtype)
    tokens = tiny.tokens(40)
    with executor(path) as made:
        got = all_logits(made, tokens)
    expected = tiny.logits(model, tokens)
    if dtype in strategies.QUANTIZED_TYPES:
        assert relative_error(got, expected) < 0.05
    else:
        assert_close(got, expected, 1e-4)


def relative_error(got: Floats, expected: npt.NDArray[Any]) -> float:
    return float(np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("fp16", 1e-3), ("int16", 1e-3), ("bf16", 1e-2), ("int8", 3e-2)]
)
def test_kv_cache_types(dtype: str, tolerance: float, tmp_path: Path) -> None:
    """Each type is wired up; that attention reads exactly what is stored is test_attention's part."""
    model = tiny.make_model("llama")
    path = tiny.save_hf(model, tmp_path)
    tokens = tiny.tokens(80)
    with executor(path, kv_cache_dtype=dtype) as made:
        assert relative_error(all_logits(made, tokens), tiny.logits(model, tokens)) < tolerance


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantization_while_loading(quantization: str, tmp_path: Path) -> None:
    """The model computes with the quantized weights: int4 or int8, the embedding and the head in int8."""
    model = tiny.make_model("qwen3")
    path = tiny.save_hf(model, tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                bits = 8 if quantization == "int8" or "embed" in name or "lm_head" in name else 4
                packed = _core.PackedMatrix.quantize(weight.numpy(), bits, 32)
                weight.copy_(torch.from_numpy(packed.unpack()))
    tokens = tiny.tokens(40)
    with executor(path, quantization=quantization) as made, executor(path) as plain:
        assert relative_error(all_logits(made, tokens), tiny.logits(model, tokens)) < 0.05
        assert made.weight_bytes < 0.7 * plain.weight_bytes


def drawn_decoder(spec: DecoderSpec, seed: int) -> tuple[Any, dict[tuple[str, int], npt.NDArray[np.float64]]]:
    """A decoder with random weights set slot by slot, and the same weights for the oracle."""
    rng = np.random.default_rng(seed)
    value = sizes(spec)
    decoder = _core.Decoder(spec.as_dict(), 2)
    weights = {}
    for slot in decoder_slots(spec):
        for layer in range(spec.num_layers) if slot.per_layer else (-1,):
            shape = tuple(value[symbol] for symbol in slot.shape)
            spread = 0.3 if len(shape) == 1 else shape[-1] ** -0.5
            values = (rng.standard_normal(shape) * spread + ("norm" in slot.name)).astype(np.float32)
            weights[slot.name, layer] = values.astype(np.float64)
            packed = values if len(shape) == 1 else _core.PackedMatrix.from_float(values, "f32")
            decoder.set(slot.name, layer, packed)
    decoder.check_complete()
    decoder.allocate_kv(32, 16, "fp32")
    return decoder, weights


@given(strategies.decoder_specs(), strategies.seeds(), strategies.sizes(1, 140))
def test_any_spec_agrees_with_the_oracle(spec: DecoderSpec, seed: int, length: int) -> None:
    decoder, weights = drawn_decoder(spec, seed)
    tokens = np.random.default_rng(seed).integers(0, spec.vocab_size, length).tolist()
    table = np.random.default_rng(seed + 1).permutation(32)[: -(-length // 16)].tolist()
    got = decoder.step(step_batch([whole(tokens, table)], 16), True)["logits"]
    assert_close(got, reference.decoder_forward(spec, weights, tokens), 1e-4)


# One answer


@pytest.fixture(scope="module", params=["Q4_1", "Q6_K", "F16"])
def wide_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.make_model("llama", max_position_embeddings=2048, **tiny.WIDE)
    return tiny.save_gguf(model, tmp_path_factory.mktemp("wide") / "model.gguf", dtype=request.param)


@given(
    st.sampled_from(("fp32", "fp16", "bf16", "int16", "int8")),
    st.sampled_from((1, 2, 3, 8)),
    st.sampled_from((16, 32, 64)),
    strategies.seeds(),
)
def test_any_arrangement_gives_the_same_bits(
    wide_file: Path, kv: str, threads: int, block_size: int, seed: int
) -> None:
    """Alone or in a batch, whole or in chunks, in any blocks, on any number of threads."""
    rng = np.random.default_rng(seed)
    lengths = rng.choice((1, 2, 15, 16, 17, 63, 64, 65, 127, 200, 300), rng.integers(1, 5))
    sequences = [tiny.tokens(int(length), seed=i) for i, length in enumerate(lengths)]
    options: dict[str, Any] = {"kv_cache_dtype": kv, "max_model_len": 512, "max_num_seqs": 5}
    with executor(wide_file, threads=1, block_size=16, **options) as made:
        alone = [all_logits(made, tokens) for tokens in sequences]

    with executor(wide_file, threads=threads, block_size=block_size, **options) as made:
        blocks = rng.permutation(made.kv_capacity()).tolist()
        tables = []
        for tokens in sequences:
            needed = -(-len(tokens) // block_size)
            tables.append(blocks[:needed])
            blocks = blocks[needed:]
        done = [0] * len(sequences)
        while any(d < len(tokens) for d, tokens in zip(done, sequences, strict=True)):
            chunks, which = [], []
            for s, tokens in enumerate(sequences):
                count = min(len(tokens) - done[s], int(rng.choice((0, 1, 2, 17, 64, 100, 400))))
                if count:
                    chunks.append(Chunk(tokens[done[s] : done[s] + count], done[s], tables[s], range(count)))
                    which.append(s)
            if not chunks:
                continue
            _, logits = made.run(step_batch(chunks, block_size), logits=True)
            assert logits is not None
            row = 0
            for s, chunk in zip(which, chunks, strict=True):
                count = len(chunk.tokens)
                expected = alone[s][done[s] : done[s] + count]
                np.testing.assert_array_equal(
                    logits[row : row + count].view(np.int32), expected.view(np.int32)
                )
                row += count
                done[s] += count


@pytest.fixture(scope="module", params=[None, 700], ids=["full", "sliding"])
def long_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.make_model("mistral", sliding_window=request.param, max_position_embeddings=2048)
    return tiny.save_hf(model, tmp_path_factory.mktemp("long") / "model")


@given(
    st.sampled_from(("fp32", "fp16", "bf16", "int16", "int8")),
    st.sampled_from((2, 3, 4, 8)),
    st.lists(st.tuples(st.integers(100, 1500), st.integers(1, 20)), min_size=1, max_size=3),
    strategies.seeds(),
)
def test_long_decodes_and_drafts_split_between_threads(
    long_file: Path, kv: str, threads: int, shapes: list[tuple[int, int]], seed: int
) -> None:
    """A few queries behind a context long enough to be cut into pieces of tiles: what one thread gives."""
    sequences = [tiny.tokens(known + queries, seed=seed + i) for i, (known, queries) in enumerate(shapes)]
    results = []
    for used in (1, threads):
        options: dict[str, Any] = {"kv_cache_dtype": kv, "max_model_len": 2048, "max_num_seqs": 3}
        with executor(long_file, threads=used, **options) as made:
            blocks = list(range(made.kv_capacity()))
            tables = [[blocks.pop() for _ in range(-(-len(tokens) // 16))] for tokens in sequences]
            drawn = list(zip(sequences, shapes, tables, strict=True))
            made.run(step_batch([Chunk(tokens[:known], 0, table) for tokens, (known, _), table in drawn], 16))
            last = [
                Chunk(tokens[known:], known, table, range(queries))
                for tokens, (known, queries), table in drawn
            ]
            _, logits = made.run(step_batch(last, 16), logits=True)
            assert logits is not None
            results.append(logits)
    np.testing.assert_array_equal(results[1].view(np.int32), results[0].view(np.int32))


@given(st.sampled_from((2, 3, 4, 6)), st.integers(32, 70), st.booleans(), strategies.seeds())
def test_batches_cut_into_parts(wide_file: Path, threads: int, count: int, long_one: bool, seed: int) -> None:
    """So many sequences that threads take some of their own: prompts, then steps that decode.

    With a long prompt among them they do not divide evenly, and all threads share the batch.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.integers(17, 20, count)
    if long_one:
        lengths[rng.integers(count)] = 150
    sequences = [tiny.tokens(int(length), seed=i) for i, length in enumerate(lengths)]
    steps: list[list[Floats]] = []
    for used in (1, threads):
        options: dict[str, Any] = {"kv_cache_dtype": "int16", "max_model_len": 256, "max_num_seqs": count}
        with executor(wide_file, threads=used, **options) as made:
            blocks = rng.permutation(made.kv_capacity()).tolist()
            tables = [[blocks.pop() for _ in range(-(-len(tokens) // 16))] for tokens in sequences]
            drawn = list(zip(sequences, tables, strict=True))
            batches = [
                [Chunk(tokens[:-2], 0, table, [len(tokens) - 3]) for tokens, table in drawn],
                [Chunk(tokens[-2:-1], len(tokens) - 2, table, [0]) for tokens, table in drawn],
                [Chunk(tokens[-1:], len(tokens) - 1, table, [0]) for tokens, table in drawn[::-1]],
            ]
            got = []
            for chunks in batches:
                _, logits = made.run(step_batch(chunks, 16), logits=True)
                assert logits is not None
                got.append(logits)
            steps.append(got)
    for one, many in zip(*steps, strict=True):
        np.testing.assert_array_equal(many.view(np.int32), one.view(np.int32))


def test_a_sequence_may_read_what_another_writes_in_the_same_step(wide_file: Path) -> None:
    texts = [tiny.tokens(48, seed=i) for i in range(20)]
    tables = [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(20)]
    drawn = list(zip(texts, tables, strict=True))
    chunks = [Chunk(text[24:], 24, table, [0, 23]) for text, table in drawn]
    chunks += [Chunk(text[:24], 0, table, [23]) for text, table in drawn]
    results = []
    for threads in (1, 2, 4):
        with executor(wide_file, threads=threads, max_model_len=256, max_num_seqs=40) as made:
            _, logits = made.run(step_batch(chunks, 16), logits=True)
            assert logits is not None
            results.append(logits)
    for logits in results[1:]:
        np.testing.assert_array_equal(logits.view(np.int32), results[0].view(np.int32))


def test_copied_blocks(wide_file: Path) -> None:
    tokens = tiny.tokens(40)
    with executor(wide_file, kv_cache_dtype="int8") as made:
        expected = all_logits(made, tokens)[-1]
        made.run(step_batch([Chunk(tokens[:39], 0, [0, 1, 2])], 16))
        copies = np.array([[0, 9], [1, 7], [2, 8]], dtype=np.int32)
        batch = step_batch([Chunk(tokens[39:], 39, [9, 7, 8])], 16, copy_blocks=copies)
        _, logits = made.run(batch, logits=True)
        assert logits is not None
        np.testing.assert_array_equal(logits[0], expected)


def test_a_token_may_stand_for_the_previous_sample(wide_file: Path) -> None:
    tokens = tiny.tokens(20)
    with executor(wide_file) as made:
        first, _ = made.run(step_batch([Chunk(tokens, 0, [0, 1])], 16))
        named, _ = made.run(step_batch([Chunk([int(first.tokens[0])], 20, [0, 1])], 16))
        made.run(step_batch([Chunk(tokens, 0, [0, 1])], 16))
        implied, _ = made.run(step_batch([Chunk([-1], 20, [0, 1])], 16))
    assert named.tokens[0] == implied.tokens[0]


# Errors


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CpuExecutor]:
    path = tiny.write("gguf", tmp_path_factory.mktemp("small"))
    with executor(path, max_model_len=64, max_num_seqs=1) as made:
        yield made


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("token_ids", [3, 4, tiny.VOCAB_SIZE]),
        ("token_ids", [3, 4, -2]),
        ("positions", [0, 1, 3]),
        ("slot_mapping", [0, 1, 64]),
        ("slot_mapping", [0, 1, -1]),
        ("block_tables", [[0, 1, 2, 4]]),
        ("seq_lens", [66]),
        ("query_start", [0, 2]),
        ("row_token", [3]),
        ("copy_blocks", [[0, 4]]),
        ("row_kind", [3]),
        ("num_logprobs", [5000]),
    ],
)
def test_indices_out_of_range(small: CpuExecutor, field: str, value: Any) -> None:
    batch = step_batch([Chunk([3, 4, 5], 0, [0, 1, 2, 3])], 16)
    expected, _ = small.run(batch)
    setattr(batch, field, np.array(value, dtype=np.int32))
    with pytest.raises(RequestError, match=field):
        small.run(batch)
    again, _ = small.run(step_batch([Chunk([3, 4, 5], 0, [0, 1, 2, 3])], 16))
    assert again.tokens[0] == expected.tokens[0]


def test_wrong_dtype(small: CpuExecutor) -> None:
    batch = step_batch([Chunk([3, 4, 5], 0, [0])], 16)
    batch.token_ids = batch.token_ids.astype(np.int64)
    with pytest.raises(RequestError, match="token_ids: expected C-contiguous int32"):
        small.run(batch)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"quantization": "int3"}, RequestError),
        ({"kv_cache_dtype": "fp8"}, RequestError),
        ({"block_size": 17}, RequestError),
        ({"threads": -1}, RequestError),
        ({"kv_cache_bytes": 100}, CapacityError),
        ({"kv_cache_bytes": 1 << 60}, CapacityError),
    ],
)
def test_options_out_of_range(options: dict[str, Any], error: type[Exception], tmp_path: Path) -> None:
    path = tiny.write("gguf", tmp_path)
    with pytest.raises(error), executor(path, **options):
        pass


def test_unsupported_head_width(tmp_path: Path) -> None:
    path = tiny.save_hf(tiny.make_model("llama", head_dim=8), tmp_path)
    with pytest.raises(UnsupportedModelError, match="head_dim"), executor(path):
        pass


def test_damaged_file(tmp_path: Path) -> None:
    path = tiny.write("gguf", tmp_path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelFileError), executor(path):
        pass


def test_closing_twice_and_using_afterwards(tmp_path: Path) -> None:
    path = tiny.write("gguf", tmp_path)
    with executor(path) as made:
        made.close()
        with pytest.raises(RequestError):
            made.run(step_batch([Chunk([3], 0, [0])], 16))
