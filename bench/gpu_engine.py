"""The GPU engine: attention, decode and prefill against the machine's limits, and the default model.

    python bench/gpu_engine.py --out docs/benchmarks/gpu_engine.json
    TRITON_INTERPRET=1 python bench/gpu_engine.py --smoke        the same code on a CPU, sizes of nothing

Sections, each skipped when the time is up (what was not reached is missing from the record, not estimated):

    attention  paged attention in bf16 and over an int8 cache, against the copy bandwidth and the bf16 rate;
               beside it torch's attention on contiguous K and V (flash, cuDNN), which has no tables to follow
    decode     steps of random-weight decoders with the sizes of Llama 3.2 1B and Llama 3 8B, in int4, int8
               and bf16, for batches and contexts, as the engine runs them: CUDA graphs, sampler included;
               against reading weights and cache once
    prefill    their prompts
    default    the default model: greedy tokens and perplexity against the CPU engine, and the time that the
               engine takes between two steps
    everyday   transformers with torch.compile and a static cache, where it is installed, on the same shapes
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from fastllm.executor.gpu import GpuExecutor
from fastllm.executor.gpu_decoder import GpuDecoder
from fastllm.executor.gpu_weights import LayerWeights, Linear, Weights
from fastllm.executor.ranks import Rank
from fastllm.formats.source import DEFAULT_MODEL
from fastllm.kernels import attention, products
from fastllm.kernels.attention_plan import plan_attention
from fastllm.kernels.tune import random_matrix
from fastllm.models.spec import DecoderSpec

BF16 = torch.bfloat16
LIMIT_COPIES = 1 << 30  # bytes copied to measure the copy bandwidth
BARS = (  # (what, bar, goal)
    ("decode attention 32 x 4096, share of the copy bandwidth", 0.75, 0.92),
    ("decode attention 1 x 16384, share of the copy bandwidth", 0.40, 0.60),
    ("prefill attention 8192, TFLOP/s", 300, 450),
    ("8B int4 decode, batch 1, share of the bandwidth limit", 0.45, 0.70),
    ("engine between steps, microseconds (at most)", 150, 60),
)
SIZES = {
    name: dict(
        zip(("dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_dim"), of, strict=True)
    )
    for name, of in {
        "1B": (2048, 16, 32, 8, 64, 8192),
        "8B": (4096, 32, 32, 8, 128, 14336),
        "smoke": (64, 1, 4, 2, 16, 128),
    }.items()
}


class Bench:
    """What a run has: its device, its time, its record."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.smoke = options.smoke
        self.model = options.model
        self.device = torch.device("cpu" if self.smoke else "cuda")
        self.dtype = torch.float32 if self.smoke else BF16
        self.end = time.monotonic() + options.deadline
        self.record: dict[str, Any] = {"rows": []}

    def left(self) -> float:
        return self.end - time.monotonic()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object], least: int = 3) -> float:
        """Median seconds of a call that ends on the GPU, after one that does not count."""
        call()
        self.wait()
        times: list[float] = []
        begun = time.monotonic()
        while len(times) < (1 if self.smoke else least) or (
            len(times) < 20 and time.monotonic() - begun < 0.5 and not self.smoke
        ):
            start = time.perf_counter()
            call()
            self.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def graph_seconds(self, call: Callable[[], object], launches: int = 20) -> float:
        """Seconds of one call among many in a CUDA graph: without the host."""
        if self.smoke:
            return self.seconds(call)
        call()
        self.wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(launches):
                call()
        return self.seconds(graph.replay) / launches

    def note(self, section: str, **values: Any) -> None:
        self.record["rows"].append({"section": section, **values})
        print(section, *(f"{name}={value}" for name, value in values.items()), flush=True)


# ---- limits ------------------------------------------------------------------------------------------------


def limits(bench: Bench) -> dict[str, float]:
    """Bytes a second read and written by a copy, and bf16 FLOP a second of the vendor's product."""
    size = 1 << 20 if bench.smoke else LIMIT_COPIES
    source = torch.zeros(size, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    copied = bench.graph_seconds(lambda: target.copy_(source), 5)
    n = 64 if bench.smoke else 8192
    a = torch.randn(n, n, dtype=bench.dtype, device=bench.device)
    multiplied = bench.graph_seconds(lambda: torch.mm(a, a), 5)
    return {"copy_bytes_per_s": 2 * size / copied, "bf16_flop_per_s": 2 * n**3 / multiplied}


# ---- attention ---------------------------------------------------------------------------------------------


def time_attention(bench: Bench) -> None:
    heads, kv_heads, d, block = (4, 2, 16, 16) if bench.smoke else (32, 8, 128, 16)
    cases = [(32, 4096, 1), (1, 16384, 1), (1, 8192, 8192), (4, 2048, 2048), (256, 1024, 1)]
    for sequences, length, queries in [(2, 40, 1), (1, 32, 32)] if bench.smoke else cases:
        for int8 in (False, True):
            _attention_case(bench, sequences, length, queries, int8, heads, kv_heads, d, block)
        if bench.left() < 60:
            return


def _attention_case(
    bench: Bench, sequences: int, length: int, queries: int, int8: bool, heads: int, kv_heads: int, d: int,
    block: int,
) -> None:  # fmt: skip
    device, dtype = bench.device, bench.dtype
    blocks = -(-length // block)
    kv_dtype = torch.int8 if int8 else dtype
    shape = (sequences * blocks, kv_heads, block, d)
    if int8:
        cache = [torch.randint(-127, 128, shape, dtype=kv_dtype, device=device) for _ in range(2)]
        scales = [torch.full(shape[:3], 0.01, device=device) for _ in range(2)]
    else:
        cache = [torch.randn(shape, device=device).to(dtype) for _ in range(2)]
        scales = [None, None]
    order = np.random.default_rng(0).permutation(sequences * blocks).astype(np.int32)
    tables = torch.from_numpy(order.reshape(sequences, blocks)).to(device)
    q = torch.randn(sequences * queries, heads, d, device=device).to(dtype)
    starts = np.arange(sequences + 1, dtype=np.int32) * queries
    plan = plan_attention(
        starts, np.full(sequences, length, np.int32), tiles=attention.tiles(device, d, dtype, kv_dtype),
        group=heads // kv_heads, kv_heads=kv_heads, multiprocessors=products.multiprocessors(device),
        table_width=blocks,
    )  # fmt: skip
    items = attention.to_device(plan, device, head_dim=d)
    out = torch.empty_like(q)

    def call() -> None:
        attention.launch_attention(q, *cache, tables, items, out, d**-0.5, 0.0, *scales)

    took = bench.graph_seconds(call)
    read = 2 * sequences * length * kv_heads * (d * kv_dtype.itemsize + (4 if int8 else 0))
    products_of = 4 * sequences * heads * d * (queries * length - queries * (queries - 1) // 2)
    bench.note(
        "attention", sequences=sequences, length=length, queries=queries, cache="int8" if int8 else "bf16",
        microseconds=round(took * 1e6, 1), bytes_per_s=read / took, flop_per_s=products_of / took,
        of_copy=round(read / took / bench.record["limits"]["copy_bytes_per_s"], 3),
    )  # fmt: skip
    if not int8:
        _torch_attention(bench, sequences, length, queries, heads, kv_heads, d)


def _torch_attention(
    bench: Bench, sequences: int, length: int, queries: int, heads: int, kv_heads: int, d: int
) -> None:
    """What K and V side by side would take: an upper bound for whoever follows block tables."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def of(count: int, rows: int) -> torch.Tensor:
        return torch.randn(sequences, count, rows, d, device=bench.device).to(bench.dtype)

    q, k, v = of(heads, queries), of(kv_heads, length), of(kv_heads, length)
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        if bench.smoke:
            continue

        def call(backend: SDPBackend = backend) -> torch.Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=queries > 1, enable_gqa=True
                )

        try:
            took = bench.graph_seconds(call)
        except RuntimeError as error:
            bench.note("sdpa", backend=name, failed=str(error).splitlines()[0][:120])
            continue
        bench.note(
            "sdpa", backend=name, sequences=sequences, length=length, queries=queries,
            microseconds=round(took * 1e6, 1),
        )  # fmt: skip


# ---- decoders of random weights ----------------------------------------------------------------------------


def random_weights(spec: DecoderSpec, kind: str, dtype: torch.dtype, device: torch.device) -> Weights:
    """Of a kind: "int4" and "int8" in groups of 128 and a scale per row; embedding and head in 8 bits."""

    def matrix(rows: int, cols: int, eight: bool = False) -> Any:
        if kind == "bf16":
            return torch.randn(rows, cols, device=device).to(dtype) / cols**0.5
        if kind == "int4" and not eight:
            return random_matrix("u4", rows, cols, 128, str(device))
        return random_matrix("i8", rows, cols, 0, str(device))

    def linear(rows: int, cols: int, *, interleaved: bool = False) -> Linear:
        return Linear((matrix(rows, cols),), None, interleaved)

    ones = torch.ones(spec.dim, device=device)
    heads, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    layers = [
        LayerWeights(
            linear(heads + 2 * kv, spec.dim),
            linear(spec.dim, heads),
            linear(2 * spec.ffn_dim, spec.dim, interleaved=True),
            linear(spec.dim, spec.ffn_dim),
            {"attn_norm": ones, "ffn_norm": ones},
        )
        for _ in range(spec.num_layers)
    ]
    embed = matrix(spec.vocab_size, spec.dim, eight=True)
    total = embed.nbytes + sum(
        part.nbytes for layer in layers for part in (layer.qkv, layer.o, layer.gate_up, layer.down)
    )
    return Weights(embed, None, Linear((embed,)), ones, None, layers, total)


class RandomExecutor(GpuExecutor):
    """A GpuExecutor whose weights come from nowhere."""

    def __init__(self, spec: DecoderSpec, kind: str, bench: Bench, **options: Any) -> None:
        self._kind = kind
        super().__init__(
            SimpleNamespace(kind="hf"),  # type: ignore[arg-type]
            spec,
            dtype="fp32" if bench.smoke else "bf16",
            device=str(bench.device),
            **options,
        )

    def _load(self, checkpoint: Any) -> None:
        weights = random_weights(self._spec, self._kind, self._dtype, self._device)
        self._decoder = GpuDecoder(
            self._spec, weights, dtype=self._dtype, device=self._device, positions=self._max_model_len,
            deterministic=False, rank=Rank(),
        )  # fmt: skip


def spec_of(name: str, context: int) -> DecoderSpec:
    size = SIZES[name]
    return DecoderSpec(
        architecture="llama", vocab_size=300 if name == "smoke" else 128256, context_length=context,
        norm_eps=1e-5, rope_base=500000.0, rotary_dim=size["head_dim"], tied_head=True, **size,
    )  # fmt: skip


def batch_of(sequences: int, length: int, queries: int, block: int) -> Any:
    """A step of sequences of one length, each in blocks of its own; greedy rows."""
    blocks = -(-length // block)
    tables = np.arange(sequences * blocks, dtype=np.int32).reshape(sequences, blocks)
    positions = np.tile(np.arange(length - queries, length, dtype=np.int32), sequences)
    owner = np.repeat(np.arange(sequences), queries)
    rows = np.arange(sequences, dtype=np.int32)

    def ints(value: int, count: int = sequences) -> Any:
        return np.full(count, value, dtype=np.int32)

    def floats(value: float) -> Any:
        return np.full(sequences, value, dtype=np.float32)

    none = np.zeros(0, dtype=np.int32)
    return SimpleNamespace(
        token_ids=ints(7, sequences * queries), positions=positions,
        slot_mapping=(tables[owner, positions // block] * block + positions % block).astype(np.int32),
        query_start=np.arange(sequences + 1, dtype=np.int32) * queries, seq_lens=ints(length),
        block_tables=tables, copy_blocks=np.zeros((0, 2), dtype=np.int32), adapter=ints(-1),
        row_seq=rows, row_token=rows * queries + queries - 1, row_kind=ints(0), row_target=ints(-1),
        num_logprobs=ints(-1), temperature=floats(0), top_k=ints(0), top_p=floats(1), min_p=floats(0),
        presence=floats(0), frequency=floats(0), repetition=floats(1),
        seed=np.zeros(sequences, dtype=np.uint64), sample_index=ints(0), bias_start=ints(0, sequences + 1),
        bias_ids=none, bias_values=none.astype(np.float32), banned_start=ints(0, sequences + 1),
        banned_ids=none, mask_row=ints(-1), mask_words=np.zeros((0, 1), dtype=np.uint32),
        history_start=ints(0, sequences + 1), history=none, history_prompt_len=ints(0),
    )  # fmt: skip


def time_decoders(bench: Bench) -> None:
    shapes = [(1, 1024), (16, 1024), (64, 1024), (256, 1024), (1, 8192), (16, 8192), (64, 8192)]
    if bench.smoke:
        shapes = [(1, 20), (2, 20)]
    for model in ("smoke",) if bench.smoke else ("8B", "1B"):
        context = max(length for _, length in shapes)
        spec = spec_of(model, context)
        for kind in ("int4", "int8", "bf16"):
            if bench.left() < 45:
                return
            tokens = max(count * -(-length // 16) * 16 for count, length in shapes)
            made = RandomExecutor(
                spec, kind, bench, max_model_len=context, max_num_seqs=max(count for count, _ in shapes),
                kv_cache_tokens=tokens,
            )  # fmt: skip
            for count, length in shapes:
                _time_decode(bench, made, model, kind, count, length)
            _time_prefill(bench, made, model, kind, min(context, 32 if bench.smoke else 2048))
            made.close()


def _time_decode(
    bench: Bench, made: RandomExecutor, model: str, kind: str, sequences: int, length: int
) -> None:
    batch = batch_of(sequences, length, 1, made.block_size)
    took = bench.seconds(lambda: made.collect(made.submit(batch)), 10)
    spec, copy = made._spec, bench.record["limits"]["copy_bytes_per_s"]
    cache = 2 * spec.num_layers * sequences * length * spec.num_kv_heads * spec.head_dim
    least = (made.weight_bytes + cache * made._kv_dtype.itemsize) / copy
    bench.note(
        "decode", model=model, weights=kind, batch=sequences, context=length,
        milliseconds=round(took * 1e3, 3), tokens_per_s=round(sequences / took),
        of_limit=round(least / took, 3),
    )  # fmt: skip


def _time_prefill(bench: Bench, made: RandomExecutor, model: str, kind: str, length: int) -> None:
    batch = batch_of(1, length, length, made.block_size)
    took = bench.seconds(lambda: made.collect(made.submit(batch)))
    bench.note("prefill", model=model, weights=kind, tokens=length, tokens_per_s=round(length / took))


# ---- the default model -------------------------------------------------------------------------------------


def time_default_model(bench: Bench) -> None:
    """Tokens, perplexity and speed of the default model on both engines."""
    from fastllm import LLM, SamplingParams

    device = "interpret" if bench.smoke else "cuda"
    prompts = ["The capital of France is", "Water boils at", "def fibonacci(n):", "Once upon a time"]
    prompts = prompts[: 1 if bench.smoke else None]
    tokens = 2 if bench.smoke else 64
    greedy = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    scored = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    text = (Path(__file__).resolve().parents[1] / "README.md").read_text()[: 60 if bench.smoke else 4000]
    answers, perplexity = {}, {}
    for where in ("cpu", device):
        begun = time.perf_counter()
        length = 256 if bench.smoke else 2048
        with LLM(bench.model, device=where, max_model_len=length, progress=False) as llm:
            if where == device:
                bench.note("start", seconds=round(time.perf_counter() - begun, 2))
            answers[where] = [list(o.outputs[0].token_ids) for o in llm.generate(prompts, greedy)]
            logprobs = llm.generate([text], scored)[0].prompt_logprobs
            values = [next(iter(place.values())).logprob for place in logprobs or [] if place]
            perplexity[where] = float(np.exp(-np.mean(values)))
            if where == device and not bench.smoke:
                for count in (1, 16, 64):
                    _time_engine(bench, llm, count)
    same = [
        next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x))
        for x, y in zip(answers["cpu"], answers[device], strict=True)
    ]
    bench.note("default", same_tokens=same, of=tokens, perplexity=perplexity)


def _time_engine(bench: Bench, llm: Any, count: int) -> None:
    """A step of the engine, and how long the GPU has nothing to do between two: with steps submitted ahead,
    as they are, and one after the other, as in a profile."""
    from fastllm import SamplingParams

    params = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": [5 + i, 6, 7, 8]} for i in range(count)]
    llm.generate(prompts, params, use_tqdm=False)
    ahead = llm.generate(prompts, params, use_tqdm=False)[0].metrics.mean_inter_token_latency or 0.0
    with llm.profile() as profile:
        llm.generate(prompts, params, use_tqdm=False)
    times = profile.decode
    gpu, alone = times.parts["gpu"] / times.steps, times.seconds / times.steps
    bench.note(
        "engine", batch=count, step_microseconds=round(ahead * 1e6, 1), gpu_microseconds=round(gpu * 1e6, 1),
        between_microseconds=round((ahead - gpu) * 1e6, 1),
        between_one_by_one_microseconds=round((alone - gpu) * 1e6, 1),
    )  # fmt: skip


# ---- the everyday alternative ------------------------------------------------------------------------------


def time_everyday(bench: Bench) -> None:
    """transformers, compiled, with a static cache: batch 1 and 16 at the 8B's sizes in bf16."""
    if bench.smoke:
        return
    try:
        import transformers
    except ImportError as error:
        bench.note("everyday", failed=str(error))
        return
    size = SIZES["8B"]
    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=size["dim"], num_hidden_layers=size["num_layers"],
        num_attention_heads=size["num_heads"], num_key_value_heads=size["num_kv_heads"],
        intermediate_size=size["ffn_dim"], max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=BF16).eval()
    for count in (1, 16):
        if bench.left() < 60:
            return
        prompt = torch.full((count, 1024), 7, device="cuda")
        options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
        run = lambda: model.generate(prompt, cache_implementation="static", **options)  # noqa: B023, E731
        run()
        took = bench.seconds(run, 2)
        bench.note("everyday", batch=count, context=1024, tokens_per_s=round(64 * count / took))


# ---- record ------------------------------------------------------------------------------------------------


def held(record: dict[str, Any]) -> list[tuple[str, float | None, float, float]]:
    """What is measured of each bar: (what, value, bar, goal)."""
    rows = record["rows"]

    def find(section: str, value: str, **wanted: Any) -> float | None:
        for row in rows:
            if row["section"] == section and all(row.get(name) == one for name, one in wanted.items()):
                return float(row[value])
        return None

    flop = find("attention", "flop_per_s", sequences=1, length=8192, queries=8192, cache="bf16")
    values = (
        find("attention", "of_copy", sequences=32, length=4096, cache="bf16"),
        find("attention", "of_copy", sequences=1, length=16384, cache="bf16"),
        None if flop is None else flop / 1e12,
        find("decode", "of_limit", model="8B", weights="int4", batch=1, context=1024),
        find("engine", "between_microseconds", batch=1),
    )
    return [(what, value, bar, goal) for (what, bar, goal), value in zip(BARS, values, strict=True)]


def page(record: dict[str, Any], name: str) -> str:
    lines = [
        "# The GPU engine",
        "",
        f"{record['device']}, torch {record['torch']}, {record['date']}. Record: [{name}]({name}).",
        "",
        "| bar | measured | bar | goal |",
        "|---|---:|---:|---:|",
    ]
    for what, value, bar, goal in held(record):
        lines.append(f"| {what} | {'not measured' if value is None else f'{value:.3g}'} | {bar} | {goal} |")
    for section in dict.fromkeys(row["section"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["section"] == section]
        names = list(dict.fromkeys(key for row in rows for key in row if key != "section"))
        lines += ["", f"## {section}", "", "| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
        lines += ["| " + " | ".join(_cell(row.get(key, "")) for key in names) + " |" for row in rows]
    return "\n".join([*lines, ""])


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> int:
    sections = {
        "attention": time_attention,
        "default": time_default_model,
        "decode": time_decoders,
        "everyday": time_everyday,
    }
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="the record, JSON; its page goes beside it as .md")
    parser.add_argument("--sections", default=",".join(sections))
    parser.add_argument("--deadline", type=float, default=450, help="seconds (450)")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="of the section default")
    parser.add_argument("--smoke", action="store_true", help="on a CPU, to see that it runs")
    options = parser.parse_args()
    bench = Bench(options)
    bench.record |= {
        "device": "interpreted" if bench.smoke else torch.cuda.get_device_name(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "torch": torch.__version__,
        "limits": limits(bench),
    }
    print(bench.record["device"], bench.record["limits"], flush=True)
    for name in options.sections.split(","):
        if bench.left() > 30:
            sections[name](bench)
    text = page(bench.record, options.out.name if options.out else "record")
    print(text)
    if options.out:
        options.out.write_text(json.dumps(bench.record))
        options.out.with_suffix(".md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
