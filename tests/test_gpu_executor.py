"""The GPU executor: against the CPU's, the float64 oracle and itself, in Triton's interpreter or on a GPU.

Where it is interpreted, weights, cache and activations are float32; a GPU computes in bfloat16 besides. What
an executor must do is the same on both devices, so most of this drives them side by side.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lora_files
import numpy as np
import numpy.typing as npt
import pytest
import strategies
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from step_batches import Chunk, ints, step_batch, whole

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read as the kernels are imported

from fastllm import (  # noqa: E402
    LLM,
    LoRARequest,
    RequestError,
    SamplingParams,
    StructuredOutputsParams,
    UnsupportedModelError,
    reference,
)
from fastllm.executor.base import ROW_LOGPROB, ROW_POOL  # noqa: E402
from fastllm.executor.cpu import CpuExecutor  # noqa: E402
from fastllm.executor.gpu import GpuExecutor  # noqa: E402
from fastllm.formats.checkpoint import CheckpointTensor, open_checkpoint  # noqa: E402
from fastllm.models.registry import spec_from_checkpoint  # noqa: E402
from fastllm.models.slots import decoder_slots, sizes  # noqa: E402
from fastllm.models.spec import DecoderSpec, TensorMap  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

Floats = npt.NDArray[np.float32]
TORCH_DEVICE = "cuda" if GPU else "cpu"
DEVICE = "cuda" if GPU else "interpret"
FEW = settings(max_examples=40 if GPU else 4)


@contextmanager
def executors(path: Path, **options: Any) -> Iterator[tuple[CpuExecutor, GpuExecutor]]:
    """Both with float32 caches, the GPU's with float32 activations, unless told otherwise."""
    shared: dict[str, Any] = {"max_model_len": 128, "max_num_seqs": 4, "kv_cache_dtype": "fp32"}
    own = {"dtype": "fp32", "device": TORCH_DEVICE}
    own |= {name: options.pop(name) for name in ("dtype", "deterministic", "graphs") if name in options}
    with open_checkpoint(path) as checkpoint:
        spec = spec_from_checkpoint(checkpoint)
        cpu = CpuExecutor(checkpoint, spec, **{**shared, **options})
        gpu = GpuExecutor(checkpoint, spec, **{**shared, **options, **own})
    try:
        yield cpu, gpu
    finally:
        cpu.close()
        gpu.close()


def logits_of(made: CpuExecutor | GpuExecutor, chunks: Sequence[Chunk], **arrays: Any) -> Floats:
    _, logits = made.run(step_batch(chunks, made.block_size, **arrays), logits=True)
    assert logits is not None
    return logits


def assert_close(got: Floats, expected: npt.NDArray[Any], tolerance: float) -> None:
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


def relative_error(got: Floats, expected: npt.NDArray[Any]) -> float:
    return float(np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)))


# ---- the decoder -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_a_prompt_and_decodes_give_the_logits_of_the_cpu(variant: str, tmp_path: Path) -> None:
    layers = 2 if "sliding" in variant else 1  # there they differ
    path = tiny.save_hf(tiny.make_model(variant, num_hidden_layers=layers), tmp_path)
    a, b = tiny.tokens(10), tiny.tokens(19, seed=1)
    steps = [
        [Chunk(a[:9], 0, [2])],
        [Chunk(a[9:], 9, [2]), Chunk(b[:14], 0, [1, 7], [0, 6, 13])],
        [Chunk(b[14:18], 14, [1, 7])],
        [Chunk(b[18:], 18, [1, 7])],
    ]
    with executors(path) as (cpu, gpu):
        for chunks in steps:
            assert_close(logits_of(gpu, chunks), logits_of(cpu, chunks), 1e-4)


@pytest.mark.parametrize("dtype", ["Q4_K", "Q6_K", "Q8_0", "IQ4_NL", "F16"])
def test_quantized_files(dtype: str, tmp_path: Path) -> None:
    """Weights as the file has them; activations are not quantized, so this is nearer to the file's numbers
    than a CPU is."""
    model = tiny.make_model("llama", num_hidden_layers=1, **tiny.WIDE)
    path = tiny.save_gguf(model, tmp_path / "model.gguf", dtype=dtype)
    tokens = tiny.tokens(6)
    with executors(path) as (_, gpu):
        got = logits_of(gpu, [Chunk(tokens, 0, [1], [2, 5])])
    assert_close(got, tiny.logits(model, tokens)[[2, 5]], 1e-4)


def drawn_checkpoint(spec: DecoderSpec, seed: int) -> tuple[DecoderSpec, Any, dict[Any, Any]]:
    """A checkpoint of random weights for any spec, and the same weights for the oracle."""
    rng = np.random.default_rng(seed)
    value = sizes(spec)
    weights, tensors, names = {}, {}, {}
    for slot in decoder_slots(spec):
        names[slot.name] = f"{slot.name}.{{i}}"
        for layer in range(spec.num_layers) if slot.per_layer else (-1,):
            shape = tuple(value[symbol] for symbol in slot.shape)
            spread = 0.3 if len(shape) == 1 else shape[-1] ** -0.5
            values = (rng.standard_normal(shape) * spread + ("norm" in slot.name)).astype(np.float32)
            weights[slot.name, layer] = values.astype(np.float64)
            name = f"{slot.name}.{layer}"
            tensors[name] = CheckpointTensor(name, shape, "F32", values.reshape(-1).view(np.uint8))
    spec = replace(spec, tensors=TensorMap(names=names))
    checkpoint = SimpleNamespace(kind="hf", path="drawn", tensors=tensors, release=lambda name: None)
    return spec, checkpoint, weights


@FEW
@given(strategies.decoder_specs(), strategies.seeds(), st.integers(1, 24))
def test_any_spec_agrees_with_the_oracle(spec: DecoderSpec, seed: int, length: int) -> None:
    spec, checkpoint, weights = drawn_checkpoint(spec, seed)
    tokens = np.random.default_rng(seed).integers(0, spec.vocab_size, length).tolist()
    made = GpuExecutor(checkpoint, spec, dtype="fp32", max_model_len=64, max_num_seqs=1, device=TORCH_DEVICE)
    rows = sorted({0, length // 2, length - 1})
    got = logits_of(made, [Chunk(tokens, 0, [2, 0], rows)])
    made.close()
    assert_close(got, reference.decoder_forward(spec, weights, tokens)[rows], 1e-4)


@pytest.mark.parametrize(
    ("dtype", "kv", "tolerance"),
    [("fp32", "int8", 3e-2), ("fp16", "fp16", 1e-2), ("fp16", "int8", 4e-2)]
    + ([("bf16", "bf16", 5e-2), ("bf16", "int8", 6e-2)] if GPU else []),
)
def test_types_of_activations_and_cache(dtype: str, kv: str, tolerance: float, tmp_path: Path) -> None:
    model = tiny.make_model("llama", num_hidden_layers=1)
    path = tiny.save_hf(model, tmp_path)
    tokens = tiny.tokens(18)
    with open_checkpoint(path) as checkpoint:
        made = GpuExecutor(
            checkpoint, spec_from_checkpoint(checkpoint), dtype=dtype, kv_cache_dtype=kv, max_model_len=64,
            max_num_seqs=2, device=TORCH_DEVICE,
        )  # fmt: skip
    rows = [0, 7, 17]
    got = logits_of(made, [Chunk(tokens, 0, [1, 0], rows)])
    made.close()
    assert relative_error(got, tiny.logits(model, tokens)[rows]) < tolerance


# ---- one batch, many ways --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as quick as the interpreter allows, with two KV heads."""
    model = tiny.make_model("llama", num_hidden_layers=1, hidden_size=32, head_dim=16, intermediate_size=48)
    return tiny.save_hf(model, tmp_path_factory.mktemp("small") / "model")


def arrangements(tokens: Sequence[int], others: Sequence[int]) -> list[list[list[Chunk]]]:
    """Steps that compute the same prompt: whole, in chunks, decoded, beside others."""
    n = len(tokens)
    beside = whole(others, [6, 7])
    return [
        [[whole(tokens, [4, 1])]],
        [
            [Chunk(tokens[:9], 0, [4, 1])],
            [Chunk(tokens[9 : n - 1], 9, [4, 1])],
            [Chunk(tokens[-1:], n - 1, [4, 1])],
        ],
        [[beside, Chunk(tokens[:16], 0, [3, 2])], [whole(others, [0, 5]), Chunk(tokens[16:], 16, [3, 2])]],
    ]  # fmt: skip


def test_deterministic_answers_do_not_depend_on_the_batch(small: Path) -> None:
    tokens, others = tiny.tokens(20), tiny.tokens(18, seed=9)
    with executors(small, deterministic=True) as (_, gpu):
        last = [
            [logits_of(gpu, chunks)[-1] for chunks in steps][-1] for steps in arrangements(tokens, others)
        ]
    for row in last[1:]:
        np.testing.assert_array_equal(row.view(np.int32), last[0].view(np.int32))


def test_the_same_batch_gives_the_same_bits(small: Path) -> None:
    chunks = [whole(tiny.tokens(20), [4, 1]), whole(tiny.tokens(5, seed=2), [3])]
    with executors(small) as (_, gpu):
        first, second = logits_of(gpu, chunks), logits_of(gpu, chunks)
    np.testing.assert_array_equal(first.view(np.int32), second.view(np.int32))


def results(made: GpuExecutor | CpuExecutor, chunks: Sequence[Chunk], **arrays: Any) -> Any:
    return made.collect(made.submit(step_batch(chunks, made.block_size, **arrays)))


def test_graphs_give_what_single_kernels_give(small: Path) -> None:
    """Padding, other sizes and features, and a token that the GPU has sampled in the step before."""
    tokens = tiny.tokens(4)
    kinds = {
        "greedy": {},
        "logprobs": {"num_logprobs": ints([2, -1, 0])},
        "drawn": {"temperature": np.full(3, 0.7, np.float32), "top_k": ints([3, 0, 5])},
        "biased": {"bias_start": ints([0, 1, 1, 1]), "bias_ids": ints([7]), "bias_values": np.float32([50])},
    }
    with executors(small) as (_, gpu), executors(small, graphs=False) as (_, plain):
        for made in (gpu, plain):
            results(made, [whole(tokens[:3], [i]) for i in range(3)])
        for count in (3, 2, 1):
            for arrays in kinds.values():
                cut = {
                    name: values[: count + 1] if name.endswith("start") else values[:count]
                    for name, values in arrays.items()
                }
                chunks = [Chunk([-1 - i], 3, [i]) for i in range(count)]
                one, other = results(gpu, chunks, **cut), results(plain, chunks, **cut)
                np.testing.assert_array_equal(one.tokens, other.tokens)
                for r, wanted in enumerate(cut.get("num_logprobs", [])):
                    if wanted >= 0:
                        assert one.logprob[r] == other.logprob[r]
                        assert one.rank[r] == other.rank[r]
                        np.testing.assert_array_equal(one.top_ids[r, :wanted], other.top_ids[r, :wanted])
        assert len(gpu._graphs) >= 6
        assert not plain._graphs


def test_rows_of_every_kind(small: Path) -> None:
    tokens = tiny.tokens(12)
    chunks = [Chunk(tokens, 0, [2], range(12))]
    kinds = [ROW_LOGPROB] * 9 + [ROW_POOL] * 2 + [0]
    arrays = {
        "row_kind": ints(kinds),
        "row_target": ints([*tokens[1:10], -1, -1, -1]),
        "num_logprobs": ints([3] * 9 + [-1] * 3),
    }
    with executors(small) as (cpu, gpu):
        one, other = results(gpu, chunks, **arrays), results(cpu, chunks, **arrays)
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_allclose(one.logprob[:9], other.logprob[:9], rtol=1e-4)
    np.testing.assert_array_equal(one.rank[:9], other.rank[:9])
    np.testing.assert_array_equal(one.top_ids[:9], other.top_ids[:9])
    assert_close(one.hidden, other.hidden, 1e-4)


def test_copied_and_stored_blocks_are_read_as_the_original(small: Path) -> None:
    tokens = tiny.tokens(17)
    for kv in ("fp32", "int8"):
        with executors(small, kv_cache_dtype=kv) as (_, gpu):
            logits_of(gpu, [Chunk(tokens[:16], 0, [3])])
            expected = logits_of(gpu, [Chunk(tokens[16:], 16, [3, 1])])
            copied = logits_of(gpu, [Chunk(tokens[16:], 16, [5, 1])], copy_blocks=ints([[3, 5]]))
            np.testing.assert_array_equal(copied, expected)
            kept = np.zeros((2, gpu.block_bytes), dtype=np.uint8)
            gpu.read_blocks(ints([5, 1]), kept)
            gpu.write_blocks(ints([0, 7]), kept)
            np.testing.assert_array_equal(logits_of(gpu, [Chunk(tokens[16:], 16, [0, 2])]), expected)
            again = np.zeros_like(kept)
            gpu.read_blocks(ints([0, 7]), again)
            np.testing.assert_array_equal(again, kept)
            for blocks, data in (([99], kept[:1]), ([0], kept), ([0], kept[:1, :-1])):
                with pytest.raises(RequestError, match="write_blocks"):
                    gpu.write_blocks(ints(blocks), data)


# ---- the engine ------------------------------------------------------------------------------------------


def both(model: Path, run: Any, **options: Any) -> tuple[Any, Any]:
    """What an LLM gives on the CPU and on the GPU, with float32 caches and activations."""
    given = {"kv_cache_dtype": "fp32", "dtype": "fp32", "max_num_seqs": 4, "kv_cache_tokens": 256, **options}
    found = []
    for device in ("cpu", DEVICE):
        with LLM(model, device=device, progress=False, **given) as llm:
            found.append(run(llm))
    return found[0], found[1]


def told(outputs: Any) -> Any:
    """Token ids, and with them logprobs to four digits."""
    return [
        (
            list(one.token_ids),
            one.finish_reason,
            [
                {token: round(value.logprob, 3) for token, value in place.items()}
                for place in one.logprobs or []
            ],
        )
        for output in outputs
        for one in output.outputs
    ]


GREEDY = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
REQUESTS = {
    "greedy": GREEDY,
    "logprobs": SamplingParams(max_tokens=3, temperature=0, logprobs=3, prompt_logprobs=2, ignore_eos=True),
    "drawn": SamplingParams(max_tokens=4, temperature=0.8, seed=3, top_k=20, ignore_eos=True),
    "several": SamplingParams(n=2, max_tokens=3, temperature=1.1, seed=5, top_p=0.8, ignore_eos=True),
    "min_p": SamplingParams(max_tokens=3, temperature=1.3, seed=7, min_p=0.1, ignore_eos=True),
    "penalties": SamplingParams(
        max_tokens=4, temperature=0, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.3,
        ignore_eos=True,
    ),
    "bias": SamplingParams(max_tokens=3, temperature=0, logit_bias={5: 3.0, 9: 100.0}, min_tokens=2),
    "structured": SamplingParams(
        max_tokens=5, temperature=0, structured_outputs=StructuredOutputsParams(choice=["the", "a"])
    ),
}  # fmt: skip


def test_requests_of_every_kind_together(small: Path) -> None:
    """Small steps and a cache that is too small: prompts in chunks, prefixes shared, sequences preempted."""
    prompts = [{"prompt_token_ids": tiny.tokens(9 + 4 * i, seed=i // 2)} for i in range(len(REQUESTS))]

    def run(llm: LLM) -> Any:
        return told(llm.generate(prompts, list(REQUESTS.values())))

    cpu, gpu = both(small, run, max_num_batched_tokens=24, kv_cache_tokens=112, max_model_len=64)
    assert gpu == cpu


def test_steps_go_ahead_and_answers_stay(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next step is there before the one before is collected; a cache that is too small, and ends that are
    found late."""
    under_way: list[int] = []
    submit = GpuExecutor.submit

    def noted(self: GpuExecutor, batch: Any) -> int:
        ticket = submit(self, batch)
        under_way.append(len(self._pending))
        return ticket

    monkeypatch.setattr(GpuExecutor, "submit", noted)
    count, tokens = (24, 40) if GPU else (6, 7)
    prompts = [{"prompt_token_ids": tiny.tokens(5 + 3 * (i % 5), seed=i)} for i in range(count)]
    plain = [REQUESTS[name] for name in ("greedy", "drawn", "min_p", "bias", "logprobs")]
    params = [replace(plain[i % 5], max_tokens=tokens - i % 4) for i in range(count)]
    found = []
    for ahead in (False, True):
        options: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 24, "kv_cache_tokens": 112}
        with LLM(
            small, device=DEVICE, dtype="fp32", kv_cache_dtype="fp32", progress=False, max_model_len=64,
            async_scheduling=ahead, **options,
        ) as llm:  # fmt: skip
            found.append(told(llm.generate(prompts, params)))
        assert set(under_way) == ({1, 2} if ahead else {1})
        under_way.clear()
    assert found[0] == found[1]


FEATURES = {
    "int8 cache": {"kv_cache_dtype": "int8"},
    "n-gram speculation": {"speculative_config": {"method": "ngram", "prompt_lookup_min": 1}},
    "draft model": {"speculative_config": {"method": "draft_model", "kv_cache_dtype": "fp32"}},
    "offload": {"kv_offload_bytes": 1 << 20, "kv_cache_tokens": 64, "max_model_len": 48},
    "quantization": {"quantization": "int8"},
    "large blocks": {"block_size": 32},
}


@pytest.mark.parametrize("name", FEATURES)
def test_features_of_the_engine(name: str, small: Path) -> None:
    """Where numbers are the CPU's to float32, tokens are; elsewhere the GPU alone is asked twice."""
    options: dict[str, Any] = dict(FEATURES[name])
    if name == "draft model":
        options["speculative_config"] = {**options["speculative_config"], "model": str(small)}
    prompts = [{"prompt_token_ids": [5, 6, 7, 8] * 3 + tiny.tokens(8, seed=i % 2)} for i in range(4)]

    def run(llm: LLM) -> Any:
        return told(llm.generate(prompts[:2], GREEDY)) + told(llm.generate(prompts, GREEDY))

    cpu, gpu = both(small, run, **options)
    if name in ("int8 cache", "quantization"):
        assert [len(tokens) for tokens, *_ in gpu] == [5] * 6
        assert gpu[:2] == gpu[2:4]
    else:
        assert gpu == cpu


def test_adapters(small: Path, tmp_path: Path) -> None:
    model = tiny.make_model("llama", num_hidden_layers=1, hidden_size=32, head_dim=16, intermediate_size=48)
    saved = [
        lora_files.save_adapter(tmp_path / str(i), model, rank=rank, seed=i, targets=targets).path
        for i, (rank, targets) in enumerate(((4, ("q_proj", "down_proj")), (20, lora_files.ALL[1:])))
    ]
    requests = [LoRARequest(str(i), str(path)) for i, path in enumerate(saved)]
    prompts = [{"prompt_token_ids": tiny.tokens(7 + i, seed=i)} for i in range(4)]

    def run(llm: LLM) -> Any:
        chosen = [requests[0], None, requests[1], requests[0]]
        tokens = told(llm.generate(prompts, GREEDY, lora_request=chosen))
        llm.sleep(2)
        llm.wake_up()
        assert told(llm.generate(prompts, GREEDY, lora_request=chosen)) == tokens
        return tokens

    cpu, gpu = both(small, run)
    assert gpu == cpu
    assert cpu != both(small, lambda llm: told(llm.generate(prompts, GREEDY)))[0]


def test_embeddings_and_sleep(small: Path) -> None:
    prompts = [{"prompt_token_ids": tiny.tokens(7 + i, seed=i)} for i in range(3)]

    def run(llm: LLM) -> Any:
        vectors = [one.embedding for one in llm.embed(prompts)]
        tokens = told(llm.generate(prompts, GREEDY))
        for level in (1, 2):
            llm.sleep(level)
            llm.wake_up()
            assert told(llm.generate(prompts, GREEDY)) == tokens
        return vectors, tokens

    cpu, gpu = both(small, run)
    assert gpu[1] == cpu[1]
    for one, other in zip(gpu[0], cpu[0], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


# ---- what cannot be --------------------------------------------------------------------------------------


def test_bad_options_are_named(small: Path) -> None:
    with open_checkpoint(small) as checkpoint:
        spec = spec_from_checkpoint(checkpoint)
        for options, field in (
            ({"dtype": "int8"}, "dtype"),
            ({"kv_cache_dtype": "int16"}, "kv_cache_dtype"),
            ({"dtype": "fp32", "kv_cache_dtype": "fp16"}, "kv_cache_dtype"),
            ({"block_size": 8}, "block_size"),
        ):
            with pytest.raises(RequestError) as caught:
                GpuExecutor(checkpoint, spec, max_model_len=64, device=TORCH_DEVICE, **options)
            assert caught.value.field == field
        wide = replace(spec, head_dim=258)
        with pytest.raises(UnsupportedModelError, match="head_dim"):
            GpuExecutor(checkpoint, wide, max_model_len=64, device=TORCH_DEVICE)


# ---- several ranks ---------------------------------------------------------------------------------------


@pytest.mark.skipif(GPU, reason="needs two GPUs there; gloo does it without any")
def test_two_ranks_give_what_one_gives(small: Path, tmp_path: Path) -> None:
    model = tiny.make_model("llama", num_hidden_layers=1, hidden_size=32, head_dim=16, intermediate_size=48)
    adapter = LoRARequest("a", str(lora_files.save_adapter(tmp_path / "a", model).path))
    prompts = [{"prompt_token_ids": tiny.tokens(9 + 3 * i, seed=i)} for i in range(3)]
    found = []
    for size in (1, 2):
        with LLM(
            small,
            device=DEVICE,
            tensor_parallel_size=size,
            kv_cache_tokens=256,
            max_num_seqs=4,
            progress=False,
        ) as llm:
            tokens = told(llm.generate(prompts, GREEDY))
            found.append((tokens, told(llm.generate(prompts[:1], GREEDY, lora_request=adapter))))
    assert found[0] == found[1]


def test_a_width_that_does_not_divide(small: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"num_heads = 4 does not divide by 3"):
        LLM(small, device=DEVICE, tensor_parallel_size=3, progress=False)
