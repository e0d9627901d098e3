"""One answer on other processors: the same bits with every instruction set here, and emulated on older ones.

    python tests/qemu_proof.py [--model MODEL]

Runs one fixed job (every kernel on fixed arrays, then the default model on three requests) once for each
instruction set of this machine, chosen by FASTLLM_ISA, and once each under `qemu-x86_64 -cpu Nehalem`, which
has nothing beyond SSE4.2, and `-cpu Haswell`, which has AVX2 and FMA; there nothing is overridden, so the
processor's own features decide what runs. Prints what was compared, and exits with 1 unless all agree. Needs
qemu-user; takes about two minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

QEMU = "qemu-x86_64"
PROCESSORS = {"Nehalem": "baseline", "Haswell": "avx2"}  # and what fastllm must choose there
REQUESTS = (
    ("The capital of France is", {"temperature": 0.0}),
    ("def fibonacci(n):\n    ", {"temperature": 0.9, "seed": 7, "top_p": 0.95}),
    (
        " ".join(f"Item {i} is number {i * i}." for i in range(9)),
        {"temperature": 0.0, "repetition_penalty": 1.1},
    ),
)


def digest(*arrays: npt.ArrayLike) -> str:
    """A hash of dtype, shape and bits."""
    total = hashlib.sha256()
    for array in map(np.asarray, arrays):
        total.update(f"{array.dtype.str}{array.shape}".encode())
        total.update(array.tobytes())
    return total.hexdigest()


def floats(seed: int, *shape: int) -> npt.NDArray[np.float32]:
    """Values of many magnitudes, from integers by exact steps, and so the same on every machine."""
    rng = np.random.Generator(np.random.PCG64(seed))
    mantissas = rng.integers(-(2**23), 2**23, shape).astype(np.float32)
    return np.ldexp(mantissas, rng.integers(-26, -20, shape)).astype(np.float32)


def kernel_hashes() -> dict[str, str]:
    """Each kernel once, on the instruction set in use."""
    from fastllm import _core, ops

    x, weights = floats(1, 7, 416), floats(2, 50, 416)
    hashes = {"quantize_rows": digest(*ops.quantize_rows(x))}
    matrices = {
        f"int{bits} g{group}": ops.quantize(weights, bits, group)
        for bits in (4, 8)
        for group in (16, 32, 128)
    }
    matrices |= {kind: ops.from_float(weights, kind) for kind in ("f32", "f16", "bf16")}
    for name, w in matrices.items():
        hashes[f"matmul {name}"] = digest(ops.matmul(x, w), ops.matmul(x[:1], w))
        hashes[f"embedding {name}"] = digest(ops.embedding(w, np.arange(50, dtype=np.int32)))
    hashes["rms_norm"] = digest(ops.rms_norm(x, weights[0], 1e-5))
    hashes["layer_norm"] = digest(ops.layer_norm(x, weights[0], weights[1], 1e-5))
    hashes["silu_mul"] = digest(ops.silu_mul(x, x[::-1]))
    hashes["gelu_tanh_mul"] = digest(ops.gelu_tanh_mul(x, x[::-1]))
    hashes["softcap"] = digest(ops.softcap(x, 3.0))
    hashes["exp"] = digest(_core.exp(x.reshape(-1)))
    cos, sin = _core.rope_tables(_core.rope_inverse_frequencies(10000.0, 32), 1000, 7)
    hashes["rope_tables"] = digest(cos, sin)
    hashes["rope"] = digest(_core.rope(x.reshape(7, 13, 32), cos, sin))
    for name in ("exp", "log", "pow", "sin", "cos"):
        hashes[f"scalar {name}"] = digest(_core.scalar_math(name, np.abs(x).astype(np.float64) + 0.01, 0.37))
    keys, values, queries = floats(3, 90, 2, 32), floats(4, 90, 2, 32), floats(5, 20, 6, 32)
    for dtype in ("f32", "f16", "bf16", "i16", "i8"):
        cache = ops.KvCache(6, 2, 32, 16, dtype)
        slots = np.arange(90, dtype=np.int32)
        cache.write(keys, values, slots)
        hashes[f"cache {dtype}"] = digest(*cache.read(slots))
        out = _core.paged_attention(
            cache,
            queries,
            np.array([0, 20], np.int32),
            np.array([90], np.int32),
            np.arange(6, dtype=np.int32)[None],
        )
        hashes[f"attention {dtype}"] = digest(out)
    logits = floats(6, 4, 997) * np.float32(4)
    drawn = ops.sample(
        logits, temperature=[0.0, 1.0, 0.7, 1.3], top_k=[0, 50, 0, 0], top_p=[1, 1, 0.9, 1], num_logprobs=5
    )
    hashes["sample"] = digest(drawn.tokens, drawn.logprobs, drawn.ranks, drawn.top_ids, drawn.top_logprobs)
    return hashes


def model_hashes(model: Path) -> dict[str, str]:
    """The logits of a prompt, and the tokens and log-probabilities of requests that run together."""
    from step_batches import step_batch, whole

    from fastllm import LLM, SamplingParams
    from fastllm.executor.cpu import CpuExecutor
    from fastllm.formats.checkpoint import open_checkpoint
    from fastllm.models.registry import spec_from_checkpoint

    hashes = {}
    with LLM(model, max_model_len=128, max_num_seqs=4, threads=2, progress=False) as llm:
        params = [SamplingParams(**options, max_tokens=5, logprobs=3) for _, options in REQUESTS]
        for index, output in enumerate(llm.generate([prompt for prompt, _ in REQUESTS], params)):
            completion = output.outputs[0]
            entries = [sorted(step.items()) for step in completion.logprobs or []]
            bits = [np.float32(entry.logprob) for step in entries for _, entry in step]
            ids = [token for step in entries for token, _ in step]
            hashes[f"request {index}"] = digest(completion.token_ids, ids, bits)
            hashes[f"text {index}"] = completion.text
        prompt = llm.get_tokenizer().encode(REQUESTS[0][0])
    with open_checkpoint(model) as checkpoint:
        spec = spec_from_checkpoint(checkpoint)
        executor = CpuExecutor(
            checkpoint, spec, max_model_len=64, max_num_seqs=1, kv_cache_dtype="int8", threads=1
        )
    _, logits = executor.run(step_batch([whole(prompt, [3, 1])], executor.block_size), logits=True)
    executor.close()
    hashes["logits, int8 cache"] = digest(logits)
    return hashes


def job(model: Path) -> None:
    """What every processor runs: one JSON object on standard output."""
    from fastllm import _core

    print(json.dumps({"isa": _core.isa(), "hashes": {**kernel_hashes(), **model_hashes(model)}}))


def run_job(model: Path, prefix: list[str], **env: str) -> tuple[dict[str, Any], float]:
    """The job's report and its seconds, run here or under an emulator."""
    start = time.monotonic()
    command = [*prefix, sys.executable, __file__, "--job", "--model", str(model)]
    clean = {name: value for name, value in os.environ.items() if name != "FASTLLM_ISA"}
    done = subprocess.run(
        command, env={**clean, **env}, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if done.returncode != 0:
        told = [line for line in done.stderr.splitlines() if "TCG doesn't support" not in line]
        raise SystemExit(f"{' '.join(command)}: exit status {done.returncode}\n" + "\n".join(told[-20:]))
    return json.loads(done.stdout), time.monotonic() - start


def prove(model: Path) -> bool:
    """Runs the job everywhere, prints one line each, and says whether all agree."""
    from fastllm import _core

    if shutil.which(QEMU) is None:
        raise SystemExit(f"{QEMU} is not installed (package qemu-user)")
    runs = [(f"FASTLLM_ISA={isa}", isa, [], {"FASTLLM_ISA": isa}) for isa in _core.supported_isas()]
    for processor, isa in PROCESSORS.items():
        # NumPy's BLAS takes the emulated processor for a newer one than it is; ours is told nothing.
        env = {"OPENBLAS_CORETYPE": processor}
        runs.append((f"{QEMU} -cpu {processor}", isa, [QEMU, "-cpu", processor], env))
    expected: dict[str, str] | None = None
    agree = True
    for name, isa, prefix, env in runs:
        report, seconds = run_job(model, prefix, **env)
        hashes = report["hashes"]
        if expected is None:
            expected = hashes
        wrong = [key for key in expected if hashes.get(key) != expected[key]]
        verdict = f"{len(hashes)} results agree" if not wrong else f"differs in {', '.join(wrong)}"
        if report["isa"] != isa:
            verdict = f"ran {report['isa']}, not {isa}; {verdict}"
        agree = agree and not wrong and report["isa"] == isa and len(hashes) == len(expected)
        print(f"{name:28} {report['isa']:11} {seconds:6.1f} s  {verdict}", flush=True)
    total = hashlib.sha256(json.dumps(expected, sort_keys=True).encode()).hexdigest()
    print(f"sha256 over all results: {total}")
    return agree


def main() -> int:
    """See the module's docstring."""
    from fastllm.formats.source import DEFAULT_MODEL, resolve

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="model reference (default: the default model)")
    parser.add_argument("--job", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    model = resolve(options.model, progress=False)
    if options.job:
        job(model)
        return 0
    return 0 if prove(model) else 1


if __name__ == "__main__":
    sys.exit(main())
