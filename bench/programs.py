"""The programs under comparison, each driven in processes of its own.

A `Program` lists the settings worth trying for a row and measures a row with one of them. fastllm and
llama.cpp get a new process for every measurement; the others, which take seconds to minutes to load, one
process per model and setting that waits, idle, between measurements (bench/measure/protocol.py), and new
ones where loading is what is measured.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import machine
import models
import peers
from processes import Watched, output
from rows import MEMORY_CONTEXT, Row

Setting = dict[str, Any]
MEASURE = machine.ROOT / "bench" / "measure"
AT_ONCE = 64  # sequences that a waiting program has room for
FASTLLM = "fastllm"


@dataclass(frozen=True)
class Options:
    """What holds for all programs of a run."""

    threads: int
    repeats: int
    isa: str  # of fastllm; "" for the best. llama.cpp's build follows it.
    kv_cache_dtype: str


@dataclass
class Figure:
    """One measurement: its figure in the row's unit, all samples behind it, and what else is known."""

    value: float
    samples: list[float]
    more: dict[str, Any]


class Program:
    """One program with one model."""

    name: str
    slow_to_load = False
    """Whether loading is measured a few times only."""

    def __init__(self, model: str, options: Options) -> None:
        self.model = model
        self.options = options

    def settings(self, row: Row) -> list[Setting]:
        """What to try; empty where the program does not do such a row."""
        raise NotImplementedError

    def measure(self, row: Row, setting: Setting, seed: int) -> Figure:
        raise NotImplementedError

    def close(self) -> None:
        """Ends what still waits."""


def job_of(row: Row, repeats: int, warmup: int, seed: int) -> dict[str, Any]:
    """The protocol's job for a row. The first token of a sequence belongs to its prefill."""
    count = row.decoded if row.kind == "serve" else row.decoded + 1
    shape = {"batch": row.batch, "prompt": row.prompt, "generate": count}
    return {**shape, "repeats": repeats, "warmup": warmup, "seed": seed}


def rate(row: Row, sample: dict[str, Any]) -> float:
    """A sample of the protocol in tokens per second."""
    if row.kind == "prefill":
        return float(row.prompt * sample["requests"] / sample["prefill_seconds"])
    if row.kind == "serve":
        return float(row.decoded * sample["requests"] / sample["total_seconds"])
    return float(sample["decoded"] / sample["decode_seconds"])


def effort(row: Row, repeats: int) -> tuple[int, int]:
    """Repeats and warm-ups in one process: a long prompt needs neither."""
    return (1, 0) if row.prompt > 2000 else (repeats, 1)


# -- fastllm and whatever speaks the protocol ----------------------------------------------------------------


class Python(Program):
    """A script of bench/measure/ in an environment of its own."""

    script: str
    keeps = True
    """Whether a process waits for the next measurement."""

    def __init__(self, model: str, options: Options) -> None:
        super().__init__(model, options)
        self._waiting: dict[str, Watched] = {}

    def interpreter(self) -> Path:
        return peers.python_of(self.name)

    def path(self) -> Path:
        return models.path(self.model)

    def environment(self) -> dict[str, str]:
        return {"OMP_NUM_THREADS": str(self.options.threads)}

    def setup(self, row: Row) -> dict[str, Any]:
        """Room for the row alone; for one that waits, for every row."""
        if self.keeps and row.kind != "memory":
            return {"max_len": 8192, "max_seqs": AT_ONCE, "max_step_tokens": 8192}
        at_once = row.batch * row.prompt if row.decoded else 0
        return {"max_len": row.max_len, "max_seqs": row.batch, "max_step_tokens": max(512, at_once)}

    def start(self, row: Row, setting: Setting) -> Watched:
        setup = {"model": str(self.path()), "threads": self.options.threads, **self.setup(row), **setting}
        command = [str(self.interpreter()), str(MEASURE / self.script), json.dumps(setup)]
        return Watched(command, self.environment())

    def measure(self, row: Row, setting: Setting, seed: int) -> Figure:
        if row.kind in ("load", "memory"):
            return self._measure_start(row, setting, seed)
        key = json.dumps(setting)
        process = self._waiting.get(key)
        about: dict[str, Any] = {}
        if process is None:
            process = self.start(row, setting)
            about = process.line()
            if self.keeps:
                self._waiting[key] = process
        answer = process.ask(job_of(row, *effort(row, self.options.repeats), seed))
        if not self.keeps:
            process.close()
        samples = [rate(row, sample) for sample in answer["samples"]]
        more = {"peak_bytes": answer.get("peak_bytes"), "about": about, "raw": answer["samples"]}
        return Figure(median(samples), samples, more)

    def _measure_start(self, row: Row, setting: Setting, seed: int) -> Figure:
        process = self.start(row, setting)
        about = process.line()
        answer = process.ask(job_of(row, 1, 0, seed))
        process.close()
        seconds = answer["done"] - process.started
        peak = answer.get("peak_bytes") or process.peak_bytes
        value = seconds if row.kind == "load" else peak / 1e6
        to_first = about["load_seconds"] + answer["done"] - about["ready"]
        more = {"about": about, "peak_bytes": peak, "seconds": seconds, "load_to_first_seconds": to_first}
        return Figure(value, [value], more)

    def close(self) -> None:
        for process in self._waiting.values():
            process.close()
        self._waiting.clear()


class FastLLM(Python):
    name, script, keeps = FASTLLM, "with_fastllm.py", False

    def interpreter(self) -> Path:
        return Path(sys.executable)

    def environment(self) -> dict[str, str]:
        return {"FASTLLM_ISA": self.options.isa} if self.options.isa else {}

    def setup(self, row: Row) -> dict[str, Any]:
        dtype = {"kv_cache_dtype": self.options.kv_cache_dtype}
        if row.kind == "load":  # as anyone writes it: LLM(model)
            return {"default": True, **dtype}
        return {**super().setup(row), **dtype}

    def settings(self, row: Row) -> list[Setting]:
        return [{}]


class Vllm(Python):
    name, script, slow_to_load = "vllm", "with_vllm.py", True

    def path(self) -> Path:
        return models.path(self.model + "-bf16")

    def settings(self, row: Row) -> list[Setting]:
        return [{}]


class Transformers(Python):
    name, script, slow_to_load = "transformers", "with_transformers.py", True

    def path(self) -> Path:
        return models.path(self.model + "-bf16")

    def settings(self, row: Row) -> list[Setting]:
        one_at_a_time = row.batch == 1 or row.kind == "serve"  # batches are what the others are for
        if not one_at_a_time or row.kind == "context":
            return []
        return [{"dtype": "bfloat16"}, {"dtype": "float32"}]


class OpenVino(Python):
    name, script, slow_to_load = "openvino", "with_openvino.py", True

    def settings(self, row: Row) -> list[Setting]:
        return [{}] if row.batch == 1 else []  # reads batches of padded prompts only as texts


class OnnxRuntime(Python):
    name, script, slow_to_load = "onnxruntime", "with_onnxruntime.py", True

    def path(self) -> Path:
        return models.path(self.model + "-onnx")

    def settings(self, row: Row) -> list[Setting]:
        return [{}]


# -- llama.cpp -----------------------------------------------------------------------------------------------


class LlamaCpp(Program):
    name = "llama.cpp"

    def settings(self, row: Row) -> list[Setting]:
        attention = [{"flash_attention": value} for value in ("on", "off")]
        if row.kind in ("load", "memory"):
            return attention[:1]
        if row.kind != "prefill":
            return attention
        micro = (128, 512) if row.prompt <= 512 else (128, 512, 2048)
        return [{**setting, "micro_batch": size} for setting in attention for size in micro]

    def program(self, name: str) -> str:
        return str(peers.llama(name, "avx2" if self.options.isa == "avx2" else "native"))

    def measure(self, row: Row, setting: Setting, seed: int) -> Figure:
        common = ["-m", str(models.path(self.model)), "-t", str(self.options.threads)]
        if row.kind in ("load", "memory"):
            return self._measure_start(row, common)
        repeats, warmup = effort(row, self.options.repeats)
        if row.kind == "prefill":
            return self._prefill(row, setting, common, repeats, warmup)
        return self._batched(row, setting, common, repeats)

    def _prefill(self, row: Row, setting: Setting, common: list[str], repeats: int, warmup: int) -> Figure:
        micro = str(setting["micro_batch"])
        shape = ["-p", str(row.prompt), "-n", "0", "-b", str(max(2048, row.prompt)), "-ub", micro]
        more = ["-fa", setting["flash_attention"], "-r", str(repeats), "-o", "json"]
        command = [self.program("llama-bench"), *common, *shape, *more, *([] if warmup else ["--no-warmup"])]
        (answer,) = json.loads(output(command))
        samples = list(answer["samples_ts"])
        about = ("build_number", "cpu_info", "backends", "model_type", "type_k", "type_v")
        return Figure(median(samples), samples, {"about": {key: answer.get(key) for key in about}})

    def _batched(self, row: Row, setting: Setting, common: list[str], repeats: int) -> Figure:
        steps = row.decoded - 1 if row.kind == "serve" else row.decoded  # the prompts give the first tokens
        count = str(row.batch)
        shape = ["-npp", str(row.prompt), "-ntg", str(steps), "-npl", ",".join([count] * repeats)]
        room = str(row.batch * row.max_len)
        more = ["-fa", setting["flash_attention"], "-c", room, "-b", "2048", "-ub", "512"]
        command = [self.program("llama-batched-bench"), *common, *shape, *more, "--output-format", "jsonl"]
        lines = [json.loads(line) for line in output(command).splitlines() if line.startswith("{")]
        if len(lines) != repeats:
            raise RuntimeError(f"{' '.join(command)}: {len(lines)} of {repeats} measurements")
        if row.kind == "serve":
            samples = [row.batch * row.decoded / line["t"] for line in lines]
        else:
            samples = [line["speed_tg"] for line in lines]
        return Figure(median(samples), samples, {"raw": lines})

    def _measure_start(self, row: Row, common: list[str]) -> Figure:
        """llama-completion until the first byte of the first token comes out."""
        room = str(MEMORY_CONTEXT) if row.kind == "memory" else "4096"
        more = ["-n", "1", "-c", room, "--no-warmup", "-no-cnv", "--no-display-prompt", "--temp", "0"]
        command = [self.program("llama-completion"), *common, *more, "-p", "The capital of France is"]
        process = Watched(command, {})
        assert process.process.stdout is not None
        process.process.stdout.read(1)
        seconds = time.time() - process.started
        process.process.stdout.read()
        process.close()
        value = seconds if row.kind == "load" else process.peak_bytes / 1e6
        return Figure(value, [value], {"peak_bytes": process.peak_bytes, "seconds": seconds})


PROGRAMS: dict[str, type[Program]] = {
    program.name: program for program in (FastLLM, LlamaCpp, Vllm, OpenVino, OnnxRuntime, Transformers)
}
