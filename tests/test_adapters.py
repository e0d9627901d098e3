"""LoRA adapters below the engine: the files, the kernel, the decoder against float64 and against itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
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
from lora_files import ALL, SLOTS, Saved, adapted, edit_config, edit_tensors, merge, save_adapter
from step_batches import Chunk, ints, step_batch, whole
from test_decoder import assert_close, drawn_decoder, executor

from fastllm import _core, reference
from fastllm.errors import (
    CapacityError,
    FastLLMError,
    ModelFileError,
    RequestError,
    UnsupportedModelError,
)
from fastllm.executor.cpu import CpuExecutor
from fastllm.formats.checkpoint import open_checkpoint
from fastllm.models.adapters import PROJECTIONS, LoraAdapter, read_adapter
from fastllm.models.registry import spec_from_checkpoint
from fastllm.models.spec import DecoderSpec
from fastllm.models.tensors import HF_NAMES

Floats = npt.NDArray[np.float32]

# ---- the kernel ----------------------------------------------------------------------------------------


@given(strategies.sizes(1, 40), strategies.sizes(1, 70), strategies.sizes(1, 300), strategies.seeds())
def test_low_rank_product(rows: int, rank: int, cols: int, seed: int) -> None:
    """The same bits on every instruction set and in every tile, near the exact sum.

    A sum of n products in fp32, in whatever order, errs by at most (n + 1) * 2^-24 times the sum of their
    magnitudes; the scale adds one rounding.
    """
    rng = np.random.default_rng(seed)
    x = strategies.make_floats((rows, cols), "normal", seed)
    a = strategies.make_floats((rank, cols), "outliers", seed + 1)
    scale = float(np.float32(rng.uniform(0.1, 4.0)))
    got = _core.low_rank(x, a, scale)
    for isa in _core.supported_isas():
        np.testing.assert_array_equal(_core.low_rank(x, a, scale, isa).view(np.int32), got.view(np.int32))
    row, column = int(rng.integers(rows)), int(rng.integers(rank))
    alone = _core.low_rank(x[row : row + 1].copy(), a[column : column + 1].copy(), scale)
    np.testing.assert_array_equal(
        alone.view(np.int32), got[row : row + 1, column : column + 1].view(np.int32)
    )
    exact = scale * (x.astype(np.float64) @ a.astype(np.float64).T)
    bound = scale * (np.abs(x).astype(np.float64) @ np.abs(a).astype(np.float64).T) * (cols + 2) * 2.0**-24
    assert (np.abs(got - exact) <= bound).all()


def test_low_rank_arguments() -> None:
    x = np.zeros((2, 5), np.float32)
    with pytest.raises(RequestError, match="low_rank: a"):
        _core.low_rank(x, np.zeros((3, 4), np.float32), 1.0)
    with pytest.raises(RequestError, match="low_rank: x"):
        _core.low_rank(x.astype(np.float64), x, 1.0)  # type: ignore[arg-type]


# ---- the files -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.make_model("llama")


@pytest.fixture(scope="module")
def checkpoint_path(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_hf(model, tmp_path_factory.mktemp("llama"))


def read(path: Path, checkpoint_path: Path) -> LoraAdapter:
    with open_checkpoint(checkpoint_path) as checkpoint:
        return read_adapter(path, spec_from_checkpoint(checkpoint), HF_NAMES)


@st.composite
def settings(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `save_adapter`."""
    targets = draw(st.lists(st.sampled_from(ALL), min_size=1, unique=True))
    layers = draw(st.sampled_from((None, None, [0], [1], [0, 1])))
    places = {"self_attn": ALL[:4], "mlp": ALL[4:]}
    names = [
        f"model.layers.{layer}.{block}.{target}"
        for layer in layers or (0, 1)
        for block, inside in places.items()
        for target in inside
        if target in targets
    ]
    some = st.lists(st.sampled_from(names), unique=True, max_size=3)
    return {
        "targets": targets,
        "layers": layers,
        "rank": draw(strategies.sizes(1, 70)),
        "alpha": draw(st.sampled_from((1, 3, 16, 0.5, 64))),
        "dtype": draw(st.sampled_from(("F32", "F16", "BF16"))),
        "seed": draw(strategies.seeds()),
        "ranks": {name: draw(st.integers(1, 9)) for name in draw(some)},
        "alphas": {name: draw(st.sampled_from((2, 5.5, 32))) for name in draw(some)},
        "rslora": draw(st.booleans()),
    }


@given(settings())
def test_reads_what_was_written(
    model: Any, checkpoint_path: Path, tmp_path_factory: pytest.TempPathFactory, given_: dict[str, Any]
) -> None:
    saved = save_adapter(tmp_path_factory.mktemp("adapter"), model, **given_)
    got = read(saved.path, checkpoint_path)
    assert len(got.parts) == len(saved.a)
    assert got.rank == max(a.shape[0] for a in saved.a.values())
    found = {(part.slot, part.layer): part for part in got.parts}
    for name in saved.a:
        part = found[SLOTS[name.rsplit(".", 1)[-1]], int(name.split(".")[2])]
        for values, expected in ((part.a, saved.a[name]), (part.b, saved.b[name])):
            assert values.dtype == np.float32
            assert values.flags.c_contiguous
            np.testing.assert_array_equal(values, expected)
        assert part.scale == pytest.approx(saved.scale[name], rel=1e-12)
    shutil.rmtree(saved.path)


def test_the_digest_stands_for_both_files(model: Any, checkpoint_path: Path, tmp_path: Path) -> None:
    def digest(name: str, **given_: Any) -> bytes:
        return read(save_adapter(tmp_path / name, model, **given_).path, checkpoint_path).digest

    first = digest("a")
    assert len(first) == 32
    assert digest("b") == first
    assert digest("c", alpha=9) != first
    assert digest("d", seed=1) != first
    assert digest("e", lora_dropout=0.1) != first  # the bytes, not what they mean


def test_patterns(model: Any, checkpoint_path: Path, tmp_path: Path) -> None:
    """The end of a name, dots escaped or not, or a whole name after ^; the first that fits counts."""
    saved = save_adapter(
        tmp_path,
        model,
        alpha_pattern={
            r"layers\.0\.self_attn\.q_proj": 1,
            "q_proj": 2,
            "^model.layers.1.mlp.up_proj": 3,
            "^layers.1.mlp.gate_proj": 4,
            "proj": 5,
        },
    )
    scales = {(part.slot, part.layer): part.scale for part in read(saved.path, checkpoint_path).parts}
    assert scales["q", 0] == 1 / 4
    assert scales["q", 1] == 2 / 4
    assert scales["up", 1] == 3 / 4
    assert scales["gate", 1] == 8 / 4
    assert scales["v", 0] == 8 / 4


def test_a_pattern_of_targets_is_not_run(model: Any, checkpoint_path: Path, tmp_path: Path) -> None:
    """The tensors say which modules there are; the pattern here would take for ever."""
    saved = save_adapter(tmp_path, model, targets=("q_proj",), target_modules="(.*)*(.*)*(.*)*x")
    assert {part.slot for part in read(saved.path, checkpoint_path).parts} == {"q"}


def test_fused_modules_are_cut_into_their_parts(tmp_path: Path, checkpoint_path: Path) -> None:
    layer = "model.layers.{i}."
    names = {
        **HF_NAMES,
        "qkv": layer + "self_attn.qkv_proj.weight",
        "gate_up": layer + "mlp.gate_up_proj.weight",
    }
    rng = np.random.default_rng(0)
    values = {}
    for i in range(2):
        for module, outputs in (("self_attn.qkv_proj", 64 + 32 + 32), ("mlp.gate_up_proj", 2 * 96)):
            for half, shape in (("A", (3, 64)), ("B", (outputs, 3))):
                name = f"base_model.model.model.layers.{i}.{module}.lora_{half}.weight"
                values[name] = torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
    save_adapter(tmp_path, tiny.make_model("llama"), rank=3, target_modules=["qkv_proj", "gate_up_proj"])

    def replace(tensors: dict[str, torch.Tensor]) -> None:
        tensors.clear()
        tensors.update(values)

    edit_tensors(tmp_path, replace)
    with open_checkpoint(checkpoint_path) as checkpoint:
        got = read_adapter(tmp_path, spec_from_checkpoint(checkpoint), names)
    rows = {"q": ("self_attn.qkv", 0, 64), "k": ("self_attn.qkv", 64, 96), "v": ("self_attn.qkv", 96, 128)}
    rows |= {"gate": ("mlp.gate_up", 0, 96), "up": ("mlp.gate_up", 96, 192)}
    assert len(got.parts) == 10
    for part in got.parts:
        module, first, last = rows[part.slot]
        stem = f"base_model.model.model.layers.{part.layer}.{module}_proj.lora_"
        np.testing.assert_array_equal(part.a, values[stem + "A.weight"].numpy())
        np.testing.assert_array_equal(part.b, values[stem + "B.weight"].numpy()[first:last])
    with pytest.raises(
        UnsupportedModelError, match="gate_up_proj"
    ):  # a model whose projections are not fused
        read(tmp_path, checkpoint_path)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


def set_tensor(name: str, value: Any) -> Callable[[Path], None]:
    return lambda path: edit_tensors(path, lambda tensors: tensors.update({name: value}))


def drop(name: str) -> Callable[[Path], None]:
    return lambda path: edit_tensors(path, lambda tensors: tensors.pop(name))


def fields(**values: Any) -> Callable[[Path], None]:
    return lambda path: edit_config(path, **values)


def raw_config(text: str) -> Callable[[Path], None]:
    return lambda path: (path / "adapter_config.json").write_text(text)  # type: ignore[func-returns-value]


def only_pickled(path: Path) -> None:
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")


def truncate(path: Path) -> None:
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


BAD: dict[str, tuple[Callable[[Path], Any], type[FastLLMError], str]] = {
    "no B": (drop(Q0 + "B.weight"), ModelFileError, r"q_proj.lora_B.weight: missing"),
    "no A": (drop(Q0 + "A.weight"), ModelFileError, r"q_proj.lora_A.weight: missing"),
    "wrong inputs": (
        set_tensor(Q0 + "A.weight", torch.zeros(4, 63)), ModelFileError,
        r"q_proj.lora_A.weight: expected shape \(r = 4, inputs = 64\), found \(4, 63\)",
    ),
    "wrong outputs": (
        set_tensor(Q0 + "B.weight", torch.zeros(32, 4)), ModelFileError,
        r"lora_B.weight: expected shape \(outputs = 64, r = 4\), found \(32, 4\)",
    ),
    "three dimensions": (
        set_tensor(Q0 + "B.weight", torch.zeros(64, 4, 1)), ModelFileError,
        "expected shape",
    ),
    "another rank": (
        fields(r=5), ModelFileError, r"expected shape \(r = 5, inputs = (\d+)\), found \(4, \1\)"
    ),
    "another rank of one": (
        fields(rank_pattern={"layers.0.self_attn.q_proj": 3}), ModelFileError, "expected shape .r = 3"
    ),
    "rank 0": (fields(r=0), ModelFileError, "r: expected integer of at least 1"),
    "rank too large": (fields(r=257), UnsupportedModelError, "r = 257: ranks of at most 256"),
    "rank of one too large": (
        fields(rank_pattern={"q_proj": 300}), UnsupportedModelError, "q_proj = 300: ranks of at most 256"
    ),
    "rank no integer": (fields(r=4.0), ModelFileError, "r: expected integer, got number"),
    "rank of one no integer": (fields(rank_pattern={"q_proj": True}), ModelFileError, "rank_pattern.q_proj"),
    "NaN alpha": (fields(lora_alpha=float("nan")), ModelFileError, "lora_alpha: expected finite number"),
    "NaN alpha of one": (
        fields(alpha_pattern={"q_proj": float("nan")}), ModelFileError,
        "alpha_pattern.q_proj",
    ),
    "alpha 0": (fields(lora_alpha=0), ModelFileError, "lora_alpha"),
    "no alpha": (fields(lora_alpha=...), ModelFileError, "lora_alpha"),
    "a pattern": (fields(rank_pattern={"(a+)+$": 3}), UnsupportedModelError, "rank_pattern"),
    "unknown target": (
        fields(target_modules=[*ALL, "query_key_value"]), UnsupportedModelError,
        "target_modules: query_key_value",
    ),
    "target without tensors": (
        lambda path: (drop(Q0 + "B.weight")(path), drop(Q0 + "A.weight")(path)), ModelFileError,
        "target_modules: q_proj: no tensors of model.layers.0.self_attn.q_proj",
    ),
    "tensors without target": (
        fields(target_modules=["q_proj"]), ModelFileError, "target_modules: does not name model.layers"
    ),
    "no target": (fields(target_modules=...), ModelFileError, "target_modules"),
    "head": (
        set_tensor("base_model.model.lm_head.lora_A.weight", torch.zeros(4, 64)), UnsupportedModelError,
        "lm_head.*no such module, or none that can have an adapter",
    ),
    "embedding": (
        set_tensor("base_model.model.model.embed_tokens.lora_embedding_A", torch.zeros(4, 300)),
        UnsupportedModelError, "lora_embedding_A",
    ),
    "layer beyond the model's": (
        set_tensor(Q0.replace("layers.0", "layers.2") + "A.weight", torch.zeros(4, 64)),
        UnsupportedModelError, "layers.2.self_attn.q_proj",
    ),
    "magnitudes of DoRA": (
        set_tensor("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", torch.zeros(64)),
        UnsupportedModelError, "lora_magnitude_vector",
    ),
    "another prefix": (
        set_tensor("model.layers.0.self_attn.q_proj.lora_A.weight", torch.zeros(4, 64)),
        UnsupportedModelError, "expected base_model.model.",
    ),
    "DoRA": (fields(use_dora=True), UnsupportedModelError, "use_dora = True: DoRA"),
    "bias": (fields(bias="all"), UnsupportedModelError, "bias = 'all'"),
    "bias of B": (fields(lora_bias=True), UnsupportedModelError, "lora_bias"),
    "modules to save": (fields(modules_to_save=["lm_head"]), UnsupportedModelError, "modules_to_save"),
    "trained embeddings": (fields(trainable_token_indices=[5]), UnsupportedModelError, "trainable_token"),
    "transposed": (fields(fan_in_fan_out=True), UnsupportedModelError, "fan_in_fan_out"),
    "replicated layers": (
        fields(layer_replication=[[0, 2], [1, 2]]), UnsupportedModelError,
        "layer_replication",
    ),
    "base weights changed": (fields(init_lora_weights="pissa"), UnsupportedModelError, "init_lora_weights"),
    "another task": (fields(task_type="SEQ_CLS"), UnsupportedModelError, "task_type"),
    "another method": (fields(peft_type="IA3"), UnsupportedModelError, "peft_type = 'IA3'"),
    "no method": (fields(peft_type=...), ModelFileError, "peft_type"),
    "unknown field": (fields(use_something_new=True), UnsupportedModelError, "use_something_new"),
    "integers": (
        set_tensor(Q0 + "A.weight", torch.zeros(4, 64, dtype=torch.int8)), UnsupportedModelError, "got I8"
    ),
    "infinite": (
        set_tensor(Q0 + "B.weight", torch.full((64, 4), float("inf"))), ModelFileError, "lora_B.*not finite"
    ),
    "pickled": (only_pickled, UnsupportedModelError, "pickle runs code"),
    "truncated": (truncate, ModelFileError, "truncated"),
    "no weights": (
        lambda path: (path / "adapter_model.safetensors").unlink(), ModelFileError, "there is no such file"
    ),
    "no tensors": (
        lambda path: edit_tensors(path, lambda tensors: tensors.clear()), ModelFileError, "has no tensor"
    ),
    "no configuration": (
        lambda path: (path / "adapter_config.json").unlink(), ModelFileError,
        "adapter_config",
    ),
    "no JSON": (raw_config("{"), ModelFileError, "not JSON"),
    "a list": (raw_config("[]"), ModelFileError, "expected object"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_bad_files(fault: str, model: Any, checkpoint_path: Path, tmp_path: Path) -> None:
    damage, error, message = BAD[fault]
    saved = save_adapter(tmp_path / "adapter", model)
    damage(saved.path)
    with pytest.raises(error, match=message) as raised:
        read(saved.path, checkpoint_path)
    assert str(saved.path) in str(raised.value)


def test_no_directory(checkpoint_path: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="lora_path"):
        read(tmp_path / "nowhere", checkpoint_path)


def test_memory(model: Any, checkpoint_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = save_adapter(tmp_path, model)
    with executor(checkpoint_path) as made:
        monkeypatch.setattr("fastllm.executor.cpu.available_memory", lambda: 1000)
        with pytest.raises(CapacityError, match=r"adapter_model.safetensors.* asked \d+ bytes, had 1000"):
            made.read_adapter(saved.path)


# ---- the decoder ---------------------------------------------------------------------------------------


def load(made: CpuExecutor, *adapters: Saved) -> None:
    for index, saved in enumerate(adapters):
        made.load_adapter(index, made.read_adapter(saved.path))


def logits_with(made: CpuExecutor, tokens: list[int], adapter: int) -> Floats:
    table = list(range(made.kv_capacity()))
    batch = step_batch([whole(tokens, table)], made.block_size, adapter=ints([adapter]))
    _, logits = made.run(batch, logits=True)
    assert logits is not None
    return logits


def assert_bits(got: Floats, expected: Floats) -> None:
    np.testing.assert_array_equal(got.view(np.int32), expected.view(np.int32))


CASES = [
    (kind, variant)
    for variant in ("llama", "llama-biased", "llama-head-dim", "mistral", "qwen2", "qwen3", "llama-tied")
    for kind in ("hf", "gguf")
]


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_agrees_with_the_dense_model(kind: str, variant: str, tmp_path: Path) -> None:
    """Against float64 with W + scale * B A in place of W, and against `transformers` with the same.

    The tolerance, 1e-4 of the largest logit, is that of the model without an adapter (test_decoder): the
    adapter's two products are sums of at most 96 fp32 terms each, whose rounding, below 1e-5, is of the same
    kind and size as that of the products they are added to. Rows of B in another order, a wrong scale, a slot
    left out, each change the logits by half of their size.
    """
    model = tiny.make_model(variant)
    path = tiny.save_hf(model, tmp_path) if kind == "hf" else tiny.save_gguf(model, tmp_path / "model.gguf")
    saved = save_adapter(tmp_path / "adapter", model, rank=5, alpha=7)
    tokens = tiny.tokens(70)
    with executor(path) as made:
        plain = logits_with(made, tokens, -1)
        load(made, saved)
        got = logits_with(made, tokens, 0)
        assert_bits(logits_with(made, tokens, -1), plain)
    assert_close(got, tiny.logits(merge(model, saved), tokens), 1e-4)
    with open_checkpoint(path) as checkpoint:
        spec = spec_from_checkpoint(checkpoint)
        weights = adapted(reference.decoder_weights(checkpoint, spec), saved)
    assert_close(got, reference.decoder_forward(spec, weights, tokens), 1e-4)
    assert np.abs(got - plain).max() > 0.2 * np.abs(plain).max()


@given(settings(), strategies.sizes(1, 50))
def test_any_adapter_agrees_with_the_oracle(
    model: Any,
    checkpoint_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    given_: dict[str, Any],
    length: int,
) -> None:
    saved = save_adapter(tmp_path_factory.mktemp("adapter"), model, **given_)
    tokens = tiny.tokens(length, seed=length)
    with executor(checkpoint_path) as made:
        load(made, saved)
        got = logits_with(made, tokens, 0)
    with open_checkpoint(checkpoint_path) as checkpoint:
        spec = spec_from_checkpoint(checkpoint)
        weights = adapted(reference.decoder_weights(checkpoint, spec), saved)
    assert_close(got, reference.decoder_forward(spec, weights, tokens), 1e-4)
    shutil.rmtree(saved.path)


@given(strategies.decoder_specs(), strategies.seeds(), strategies.sizes(1, 70))
def test_any_spec_with_an_adapter_agrees_with_the_oracle(spec: DecoderSpec, seed: int, length: int) -> None:
    """Widths that no vector divides, post norms, biases, windows: whatever stands between the products."""
    rng = np.random.default_rng(seed)
    decoder, weights = drawn_decoder(spec, seed)
    tokens = rng.integers(0, spec.vocab_size, length).tolist()
    adapter = _core.Adapter()
    changed = dict(weights)
    for slot in PROJECTIONS:
        for layer in range(spec.num_layers):
            if rng.random() < 0.4:
                continue
            outputs, inputs = weights[slot, layer].shape
            rank, scale = int(rng.choice((1, 2, 5, 16, 17, 40))), float(np.float32(rng.uniform(0.2, 2.0)))
            a = (rng.standard_normal((rank, inputs)) / inputs**0.5).astype(np.float32)
            b = (rng.standard_normal((outputs, rank)) / rank**0.5).astype(np.float32)
            adapter.set(slot, layer, a, _core.PackedMatrix.from_float(b, "f32"), scale)
            changed[slot, layer] = weights[slot, layer] + scale * (
                b.astype(np.float64) @ a.astype(np.float64)
            )
    decoder.load_adapter(3, adapter)
    table = rng.permutation(32)[: -(-length // 16)].tolist()
    got = decoder.step(step_batch([whole(tokens, table)], 16, adapter=ints([3])), True)["logits"]
    assert_close(got, reference.decoder_forward(spec, changed, tokens), 1e-4)


def test_the_largest_rank(model: Any, checkpoint_path: Path, tmp_path: Path) -> None:
    saved = save_adapter(tmp_path, model, rank=256)
    tokens = tiny.tokens(20)
    with executor(checkpoint_path) as made:
        load(made, saved)
        assert_close(logits_with(made, tokens, 0), tiny.logits(merge(model, saved), tokens), 1e-4)


def test_both_kinds_of_checkpoint_give_the_same_bits(
    model: Any, checkpoint_path: Path, tmp_path: Path
) -> None:
    """A GGUF file keeps q and k in another row order, the adapter is the same."""
    saved = save_adapter(tmp_path / "adapter", model)
    tokens = tiny.tokens(40)
    results = []
    for path in (checkpoint_path, tiny.save_gguf(model, tmp_path / "model.gguf")):
        with executor(path) as made:
            load(made, saved)
            results.append(logits_with(made, tokens, 0))
    assert_bits(*results)


@pytest.fixture(scope="module", params=["Q4_1", "F16"])
def wide(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Saved]]:
    """A model and three adapters: everything, few projections with a larger rank, one layer alone."""
    model = tiny.make_model("llama", max_position_embeddings=2048, **tiny.WIDE)
    place = tmp_path_factory.mktemp("wide")
    path = tiny.save_gguf(model, place / "model.gguf", dtype=request.param)
    return path, [
        save_adapter(place / "all", model, rank=7, seed=1, dtype="BF16"),
        save_adapter(place / "few", model, rank=33, seed=2, targets=("q_proj", "down_proj"), dtype="F16"),
        save_adapter(place / "one", model, rank=4, seed=3, targets=("v_proj", "up_proj"), layers=[1]),
    ]


@given(st.sampled_from((1, 2, 3, 8)), st.sampled_from(("fp32", "int16", "int8")), strategies.seeds())
def test_any_arrangement_gives_the_same_bits(
    wide: tuple[Path, list[Saved]], threads: int, kv: str, seed: int
) -> None:
    """Alone or beside others with other adapters and none, whole or in chunks, on any number of threads."""
    path, adapters = wide
    rng = np.random.default_rng(seed)
    lengths = rng.choice((1, 2, 15, 17, 64, 65, 127, 200), rng.integers(1, 6))
    sequences = [tiny.tokens(int(length), seed=i) for i, length in enumerate(lengths)]
    which = rng.integers(-1, 3, len(sequences)).tolist()
    options: dict[str, Any] = {"kv_cache_dtype": kv, "max_model_len": 512, "max_num_seqs": 6}
    with executor(path, threads=1, **options) as made:
        plain = [logits_with(made, tokens, -1) for tokens in sequences]
        load(made, *adapters)
        alone = [logits_with(made, tokens, adapter) for tokens, adapter in zip(sequences, which, strict=True)]
    for one, other, adapter in zip(plain, alone, which, strict=True):
        assert (adapter < 0) == bool((one == other).all())

    with executor(path, threads=threads, **options) as made:
        load(made, *adapters)
        blocks = rng.permutation(made.kv_capacity()).tolist()
        tables = [[blocks.pop() for _ in range(-(-len(tokens) // 16))] for tokens in sequences]
        done = [0] * len(sequences)
        while any(d < len(tokens) for d, tokens in zip(done, sequences, strict=True)):
            chunks, members = [], []
            for s, tokens in enumerate(sequences):
                count = min(len(tokens) - done[s], int(rng.choice((0, 1, 2, 17, 64, 400))))
                if count:
                    chunks.append(Chunk(tokens[done[s] : done[s] + count], done[s], tables[s], range(count)))
                    members.append(s)
            if not chunks:
                continue
            batch = step_batch(chunks, 16, adapter=ints([which[s] for s in members]))
            _, logits = made.run(batch, logits=True)
            assert logits is not None
            row = 0
            for s, chunk in zip(members, chunks, strict=True):
                count = len(chunk.tokens)
                assert_bits(logits[row : row + count], alone[s][done[s] : done[s] + count])
                row += count
                done[s] += count


@given(st.sampled_from((2, 3, 4, 6)), st.integers(32, 60), strategies.seeds())
def test_batches_cut_into_parts(wide: tuple[Path, list[Saved]], threads: int, count: int, seed: int) -> None:
    """So many sequences that threads take some of their own; the adapters of a part may be none."""
    path, adapters = wide
    rng = np.random.default_rng(seed)
    sequences = [tiny.tokens(int(length), seed=i) for i, length in enumerate(rng.integers(17, 20, count))]
    which = np.where(rng.random(count) < rng.random(), rng.integers(0, 3, count), -1)
    if rng.random() < 0.5:
        which[: count // 2] = -1
    results: list[list[Floats]] = []
    for used in (1, threads):
        options: dict[str, Any] = {"kv_cache_dtype": "int16", "max_model_len": 256, "max_num_seqs": count}
        with executor(path, threads=used, **options) as made:
            load(made, *adapters)
            tables = [[2 * i, 2 * i + 1] for i in range(count)]
            prompts = [Chunk(text[:-1], 0, table) for text, table in zip(sequences, tables, strict=True)]
            decodes = [
                Chunk(text[-1:], len(text) - 1, table) for text, table in zip(sequences, tables, strict=True)
            ]
            got = []
            for chunks in (prompts, decodes):
                _, logits = made.run(step_batch(chunks, 16, adapter=ints(which)), logits=True)
                assert logits is not None
                got.append(logits)
            results.append(got)
    for one, many in zip(*results, strict=True):
        assert_bits(many, one)


def test_loading_replacing_unloading(wide: tuple[Path, list[Saved]]) -> None:
    path, adapters = wide
    tokens = tiny.tokens(20)
    with executor(path) as made:
        prepared = [made.read_adapter(saved.path) for saved in adapters]
        made.load_adapter(0, prepared[0])
        first = logits_with(made, tokens, 0)
        made.load_adapter(5, prepared[1])
        made.load_adapter(0, prepared[2])
        third = logits_with(made, tokens, 0)
        second = logits_with(made, tokens, 5)
        made.load_adapter(0, prepared[0])
        assert_bits(logits_with(made, tokens, 0), first)
        made.load_adapter(5, prepared[2])
        assert_bits(logits_with(made, tokens, 5), third)
        made.load_adapter(1, prepared[1])
        assert_bits(logits_with(made, tokens, 1), second)
        made.unload_adapter(0)
        made.unload_adapter(0)
        made.unload_adapter(77)
        for index in (0, 2, 77, -2, 2**31 - 1):
            with pytest.raises(RequestError, match="StepBatch: adapter"):
                logits_with(made, tokens, index)
        assert_bits(logits_with(made, tokens, 5), third)
        assert prepared[1].rank == 33
        assert prepared[1].nbytes >= 4 * sum(a.size + saved_b.size for a, saved_b in zip(
            adapters[1].a.values(), adapters[1].b.values(), strict=True))  # fmt: skip


def test_an_adapter_of_another_model_is_refused(
    wide: tuple[Path, list[Saved]], checkpoint_path: Path
) -> None:
    path, adapters = wide
    with executor(path) as made, executor(checkpoint_path) as other:
        prepared = made.read_adapter(adapters[0].path)
        with pytest.raises(
            RequestError, match="adapter: expected from 64 to 64, got 'q of layer 0 from 256 to 256'"
        ):
            other.load_adapter(0, prepared)
        with pytest.raises(RequestError, match="StepBatch: adapter"):
            logits_with(other, tiny.tokens(4), 0)
        for index in (-1, 256):
            with pytest.raises(RequestError, match="index"):
                made.load_adapter(index, prepared)
        made.load_adapter(255, prepared)


def test_matrices_that_do_not_fit() -> None:
    adapter = _core.Adapter()
    a = np.zeros((3, 8), np.float32)
    b = _core.PackedMatrix.from_float(np.zeros((5, 3), np.float32), "f32")
    adapter.set("q", 0, a, b, 1.0)
    wide_b = _core.PackedMatrix.from_float(np.zeros((5, 4), np.float32), "f32")
    half_b = _core.PackedMatrix.from_float(np.zeros((5, 3), np.float32), "bf16")
    for field, arguments in {
        "slot": ("head", 0, a, b, 1.0),
        "layer": ("q", 1024, a, b, 1.0),
        "a": ("k", 0, np.zeros((257, 8), np.float32), b, 1.0),
        "b": ("k", 0, a, wide_b, 1.0),
        "scale": ("k", 0, a, b, float("inf")),
    }.items():
        with pytest.raises(RequestError, match=rf"\A{field}: "):
            adapter.set(*arguments)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"\Ab: "):
        adapter.set("k", 0, a, half_b, 1.0)
    with pytest.raises(RequestError, match="once"):
        adapter.set("q", 0, a, b, 1.0)
    with pytest.raises(RequestError, match=r"Adapter\.set: a"):
        adapter.set("k", 0, a.astype(np.float64), b, 1.0)  # type: ignore[arg-type]
    assert adapter.rank == 3


def test_what_a_decoder_has_cannot_be_changed(wide: tuple[Path, list[Saved]]) -> None:
    path, adapters = wide
    with executor(path) as made:
        prepared = made.read_adapter(adapters[2].path)
        made.load_adapter(0, prepared)
        b = _core.PackedMatrix.from_float(np.zeros((256, 1), np.float32), "f32")
        with pytest.raises(RequestError, match="one that no decoder has yet"):
            prepared.matrices.set("q", 0, np.zeros((1, 256), np.float32), b, 1.0)


def test_config_as_peft_writes_it(model: Any, checkpoint_path: Path, tmp_path: Path) -> None:
    """Fields that older versions do not have may be missing."""
    saved = save_adapter(tmp_path, model)
    needed = {"peft_type", "r", "lora_alpha", "target_modules"}
    values = json.loads((saved.path / "adapter_config.json").read_text())
    edit_config(saved.path, **{name: ... for name in values if name not in needed})
    assert len(read(saved.path, checkpoint_path).parts) == 14
