"""One model on several GPUs: this process is rank 0, the others are processes of their own.

    engine ─► TensorParallelExecutor ─┬─ pipe ─► worker 1 ─┐
                                      ├─ pipe ─► worker 2 ─┤ outputs gathered (NCCL; gloo without GPUs)
                                      └─ own GpuExecutor ──┘

A worker gets every StepBatch and every other call through a pipe, as a line of JSON and the arrays' bytes,
and does with it what rank 0 does; all ranks sample, from the same logits with the same keys. A worker that
fails says so on its way out, and the call that waits for it raises.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from torch import distributed

from fastllm.errors import FastLLMError, ModelFileError, RequestError, UnsupportedModelError
from fastllm.executor.base import Float32Array, Int32Array, StepBatch, StepResult
from fastllm.executor.gpu import GpuAdapter, GpuExecutor, usable_device
from fastllm.executor.gpu_weights import check_split
from fastllm.executor.ranks import Rank

if TYPE_CHECKING:
    from fastllm.formats.checkpoint import Checkpoint
    from fastllm.models.spec import DecoderSpec

logger = logging.getLogger(__name__)

_ARRAYS = tuple(StepBatch.__annotations__)
_PATIENCE = timedelta(minutes=5)  # of a rank that waits for the others, the time to load a model included
_HEADER = struct.Struct("<I")


class TensorParallelExecutor:
    """Implements `Executor`, `AdapterHost`, `Pipelined` and `Sleeper` of `fastllm.executor.base` over several
    GPUs.

    Args:
        checkpoint, spec: as `GpuExecutor`.
        size: ranks; every width of the decoder must divide by it.
        key_file: with the key of encrypted weights; None: in the environment.
        device: "cuda" takes GPUs 0 to size - 1; "cpu" with Triton's interpreter.
        options: the others of `GpuExecutor`; sizes of the KV cache are those of each rank.

    Raises:
        UnsupportedModelError: a width does not divide, or there are fewer GPUs.
        FastLLMError: as `GpuExecutor`, on any rank.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: DecoderSpec,
        *,
        size: int,
        device: str,
        key_file: Path | None = None,
        **options: Any,
    ) -> None:
        check_split(spec, size)
        base = usable_device(device)
        if base.type == "cuda" and torch.cuda.device_count() < size:
            raise UnsupportedModelError(
                f"tensor_parallel_size: {size} GPUs are needed, there are {torch.cuda.device_count()}"
            )
        plain = {name: options[name] for name in options if name not in ("reopen", "keys")}
        self._workers: list[subprocess.Popen[bytes]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="fastllm-ranks-")
        meeting = Path(self._folder.name) / "meeting"
        try:
            for index in range(1, size):
                config = {
                    "path": str(checkpoint.path),
                    "key_file": None if key_file is None else str(key_file),
                    "meeting": str(meeting),
                    "index": index,
                    "size": size,
                    "device": device,
                    "options": {**plain, "kv_blocks": 0},
                }
                self._workers.append(_start_worker(config, self._log(index)))
            with _speaking_for(self):
                _join(meeting, 0, size, base.type)
                own = "cuda:0" if base.type == "cuda" else device
                wanted = options.pop("kv_blocks", None)
                self._own = GpuExecutor(
                    checkpoint, spec, device=own, rank=Rank(0, size), kv_blocks=wanted, **options
                )
                if self._own.kv_capacity():
                    self._tell("allocate_kv", blocks=self._own.kv_capacity())
        except BaseException:
            self.close()
            raise

    # ---- what rank 0 does alone ---------------------------------------------------------------------------

    @property
    def block_size(self) -> int:
        """Tokens per block of the KV cache."""
        return self._own.block_size

    @property
    def kv_bytes_per_block(self) -> int:
        """Bytes of a block, of all ranks."""
        return self._own.kv_bytes_per_block * self._size

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of the KV caches of all ranks."""
        return self._own.kv_cache_bytes * self._size

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights on one GPU."""
        return self._own.weight_bytes

    @property
    def threads(self) -> int:
        """Threads that a step uses in each process."""
        return self._own.threads

    @property
    def steps_ahead(self) -> int:
        """Steps that may be submitted beyond the one that is waited for."""
        return self._own.steps_ahead

    @property
    def _size(self) -> int:
        return 1 + len(self._workers)

    def kv_capacity(self) -> int:
        """Blocks in the KV cache."""
        return self._own.kv_capacity()

    def read_adapter(self, path: Path) -> GpuAdapter:
        """As `GpuExecutor.read_adapter`."""
        return self._own.read_adapter(path)

    def collect(self, ticket: int) -> StepResult:
        """Waits for the step of `submit`."""
        return self._own.collect(ticket)

    # ---- what all ranks do --------------------------------------------------------------------------------

    def allocate_kv(self, blocks: int) -> None:
        """Makes the KV cache, of so many blocks on every rank."""
        self._tell("allocate_kv", blocks=blocks)
        self._own.allocate_kv(blocks)

    def submit(self, batch: StepBatch) -> int:
        """Begins a step on every rank."""
        with _speaking_for(self):
            self._tell("step", {name: getattr(batch, name) for name in _ARRAYS})
            return self._own.submit(batch)

    def run(self, batch: StepBatch, *, logits: bool = False) -> tuple[StepResult, Float32Array | None]:
        """One step at once, as `GpuExecutor.run`."""
        with _speaking_for(self):
            self._tell("run", {name: getattr(batch, name) for name in _ARRAYS}, logits=logits)
            return self._own.run(batch, logits=logits)

    def load_adapter(self, index: int, adapter: GpuAdapter) -> None:
        """Between two steps: sequences of this index use the adapter."""
        with _speaking_for(self):
            self._tell("load_adapter", index=index, path=str(adapter.path), digest=adapter.digest.hex())
            self._own.load_adapter(index, adapter)

    def unload_adapter(self, index: int) -> None:
        """Between two steps: forgets the adapter of an index, if it has one."""
        self._tell("unload_adapter", index=index)
        self._own.unload_adapter(index)

    def sleep(self, level: int) -> None:
        """Gives the KV cache back, on every rank.

        Raises:
            RequestError: level 2; ranks keep their weights.
        """
        if level > 1:
            raise RequestError("level", level, "1, with tensor parallelism")
        self._tell("sleep", level=level)
        self._own.sleep(level)

    def wake(self) -> None:
        """Makes the KV cache anew, on every rank."""
        self._tell("wake")
        self._own.wake()

    def close(self) -> None:
        """Ends the workers and gives all memory back."""
        for worker in self._workers:
            assert worker.stdin is not None
            with contextlib.suppress(OSError):
                _send(worker.stdin, "close", {}, {})
            with contextlib.suppress(OSError):
                worker.stdin.close()
        if hasattr(self, "_own"):
            self._own.close()
        for worker in self._workers:
            try:
                worker.wait(10)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
        self._workers.clear()
        if distributed.is_initialized():
            distributed.destroy_process_group()
        self._folder.cleanup()

    def _tell(self, call: str, arrays: dict[str, Any] | None = None, **arguments: Any) -> None:
        for worker in self._workers:
            assert worker.stdin is not None
            _send(worker.stdin, call, arguments, arrays or {})

    def _log(self, index: int) -> Path:
        """Where a worker writes what it has to say."""
        return Path(self._folder.name) / f"rank{index}.log"

    def failures(self) -> list[str]:
        """The last words of the workers that have ended."""
        said = []
        for index, worker in enumerate(self._workers, 1):
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.wait(2)
                lines = self._log(index).read_text(errors="replace").strip().splitlines()
                said.append(lines[-1] if lines else f"status {worker.returncode}")
        return said


@contextlib.contextmanager
def _speaking_for(executor: TensorParallelExecutor) -> Iterator[None]:
    """A failure of the exchange is told as what the worker died of."""
    try:
        yield
    except FastLLMError:
        raise
    except Exception as error:
        said = executor.failures()
        if not said:
            raise
        raise RuntimeError(f"a rank of the model ended: {said[0]}") from error


def _join(meeting: Path, index: int, size: int, kind: str) -> None:
    """Makes the process one of the group that exchanges outputs; nothing outside this machine is heard."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        init_method=meeting.as_uri(),
        rank=index,
        world_size=size,
        timeout=_PATIENCE,
    )


def _start_worker(config: dict[str, Any], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as errors:
        worker = subprocess.Popen(
            [sys.executable, "-m", "fastllm.executor.tensor_parallel"], stdin=subprocess.PIPE, stderr=errors
        )
    assert worker.stdin is not None
    _send(worker.stdin, "load", config, {})
    return worker


# ---- the pipe --------------------------------------------------------------------------------------------


def _send(pipe: IO[bytes], call: str, arguments: dict[str, Any], arrays: dict[str, Any]) -> None:
    plain = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    shapes = [(name, values.dtype.str, values.shape) for name, values in plain.items()]
    head = json.dumps({"call": call, "arguments": arguments, "arrays": shapes}).encode()
    pipe.write(_HEADER.pack(len(head)))
    pipe.write(head)
    for values in plain.values():
        pipe.write(values.tobytes())
    pipe.flush()


def _receive(pipe: IO[bytes]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The next call; "close" where there is no more."""
    head = pipe.read(_HEADER.size)
    if len(head) < _HEADER.size:
        return "close", {}, {}
    told = json.loads(pipe.read(_HEADER.unpack(head)[0]))
    arrays = {}
    for name, kind, shape in told["arrays"]:
        dtype = np.dtype(kind)
        data = pipe.read(dtype.itemsize * int(np.prod(shape, dtype=np.int64)))
        arrays[name] = np.frombuffer(bytearray(data), dtype).reshape(shape)
    return told["call"], told["arguments"], arrays


# ---- a worker --------------------------------------------------------------------------------------------


def work(pipe: IO[bytes]) -> None:
    """A rank above 0: does what it is told until it is told to close."""
    from fastllm.formats.checkpoint import open_checkpoint
    from fastllm.formats.keys import KeySource
    from fastllm.models.registry import spec_from_checkpoint

    call, config, _ = _receive(pipe)
    if call != "load":
        return
    index, device = config["index"], config["device"]
    kind = "cuda" if device.startswith("cuda") else "cpu"
    _join(Path(config["meeting"]), index, config["size"], kind)
    keys = KeySource(config["key_file"])
    with open_checkpoint(config["path"], keys) as checkpoint:
        own = GpuExecutor(
            checkpoint,
            spec_from_checkpoint(checkpoint),
            device=f"cuda:{index}" if kind == "cuda" else device,
            rank=Rank(index, config["size"]),
            keys=keys,
            **config["options"],
        )
    while True:
        call, arguments, arrays = _receive(pipe)
        if call == "close":
            break
        if call == "step":
            own.submit(_batch(arrays))  # what it yields is known where it is asked for
        elif call == "run":
            own.run(_batch(arrays), **arguments)
        elif call == "load_adapter":
            adapter = own.read_adapter(Path(arguments["path"]))
            if adapter.digest.hex() != arguments["digest"]:
                raise ModelFileError(arguments["path"], "has changed since it was read")
            own.load_adapter(arguments["index"], adapter)
        else:
            getattr(own, call)(**arguments)
    own.close()
    distributed.destroy_process_group()


def _batch(arrays: dict[str, Int32Array]) -> Any:
    return SimpleNamespace(**arrays)


if __name__ == "__main__":
    work(sys.stdin.buffer)
