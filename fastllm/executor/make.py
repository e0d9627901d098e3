"""Which executor a device has, and what its options mean there."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastllm.errors import RequestError, UnsupportedModelError

if TYPE_CHECKING:
    from fastllm.executor.base import ModelExecutor
    from fastllm.formats.checkpoint import Checkpoint
    from fastllm.formats.keys import KeySource
    from fastllm.models.spec import DecoderSpec

DEVICES = "cpu, cuda, cuda:N or interpret"
MAX_RANKS = 64
DTYPES = ("auto", "bf16", "fp16", "fp32")
_CPU_KV_CACHE_DTYPES = ("int16", "int8", "fp16", "bf16", "fp32")
KV_CACHE_DTYPES = ("auto", *_CPU_KV_CACHE_DTYPES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Where a model runs, and in what.

    Attributes:
        name: "cpu"; "cuda" or "cuda:N"; "interpret": the GPU's executor on the CPU, with Triton's interpreter
            (TRITON_INTERPRET=1), slowly, for tests.
        dtype: of activations, and of weights that are not quantized: "bf16", "fp16" or "fp32"; "auto" is
            "bf16" on a GPU. A CPU computes in float32: "auto" or "fp32".
        deterministic: a request's answer does not depend on the others in its batch. On a CPU it never does.
        tensor_parallel_size: GPUs among which every layer is split, from the first one on.

    Raises:
        RequestError: anything else.
    """

    name: str = "cpu"
    dtype: str = "auto"
    deterministic: bool = False
    tensor_parallel_size: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"cpu|cuda(:\d{1,3})?|interpret", self.name):
            raise RequestError("device", self.name, DEVICES)
        allowed = DTYPES if self.on_gpu else ("auto", "fp32")
        if self.dtype not in allowed:
            raise RequestError("dtype", self.dtype, "one of " + ", ".join(repr(one) for one in allowed))
        if not isinstance(self.deterministic, bool):
            raise RequestError("deterministic", self.deterministic, "a bool")
        size = self.tensor_parallel_size
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= MAX_RANKS:
            raise RequestError("tensor_parallel_size", size, f"an integer in 1..{MAX_RANKS}")
        if size > 1 and self.name not in ("cuda", "interpret"):
            raise RequestError("tensor_parallel_size", size, f"1 with device {self.name!r}")

    @property
    def on_gpu(self) -> bool:
        """Whether it is the GPU's executor."""
        return self.name != "cpu"

    @property
    def identity(self) -> str:
        """What distinguishes its KV cache's contents from another device's; nothing for the CPU."""
        if not self.on_gpu:
            return ""
        return f" gpu {self._dtype}" + (" deterministic" if self.deterministic else "")

    @property
    def _dtype(self) -> str:
        if self.dtype != "auto":
            return self.dtype
        return "fp32" if self.name == "interpret" else "bf16"

    def check_kv_cache_dtype(self, field: str, value: str) -> None:
        """Raises RequestError, naming the field, unless the device has a KV cache of this type."""
        allowed = ("auto", "int8", self._dtype) if self.on_gpu else KV_CACHE_DTYPES
        if value not in allowed:
            raise RequestError(field, value, "one of " + ", ".join(repr(one) for one in allowed))

    def check_usable(self) -> None:
        """Raises UnsupportedModelError unless the device is there, with what its executor needs."""
        if self.on_gpu:
            self._gpu().usable_device(self._torch_name)

    @property
    def _torch_name(self) -> str:
        return "cpu" if self.name == "interpret" else self.name

    def _gpu(self) -> Any:
        """The module of the GPU's executor, which needs torch and triton."""
        try:
            from fastllm.executor import gpu
        except ImportError as error:
            raise UnsupportedModelError(f"device: {self.name!r}: {error}") from error
        return gpu

    def executor(
        self,
        checkpoint: Checkpoint,
        spec: DecoderSpec,
        *,
        kv_cache_dtype: str,
        max_num_batched_tokens: int,
        threads: int,
        reopen: Callable[[], AbstractContextManager[Checkpoint]] | None,
        keys: KeySource | None = None,
        **sizes: Any,
    ) -> ModelExecutor:
        """An executor with its weights and, unless kv_blocks is 0, its KV cache.

        Args:
            sizes: quantization, block_size, max_model_len, max_num_seqs, and of the KV cache's size what
                `CpuExecutor` takes.

        Raises:
            FastLLMError: as `CpuExecutor` and `GpuExecutor`.
        """
        if not self.on_gpu:
            from fastllm.executor.cpu import DEFAULT_KV_CACHE_DTYPE, CpuExecutor

            dtype = DEFAULT_KV_CACHE_DTYPE if kv_cache_dtype == "auto" else kv_cache_dtype
            return CpuExecutor(
                checkpoint, spec, kv_cache_dtype=dtype, threads=threads, reopen=reopen, keys=keys, **sizes
            )
        options = {
            "dtype": self._dtype,
            "kv_cache_dtype": kv_cache_dtype,
            "max_num_batched_tokens": max_num_batched_tokens,
            "device": self._torch_name,
            "deterministic": self.deterministic,
            "reopen": reopen,
            "keys": keys,
            **sizes,
        }
        made: ModelExecutor
        if self.tensor_parallel_size > 1:
            from fastllm.executor.tensor_parallel import TensorParallelExecutor

            made = TensorParallelExecutor(
                checkpoint,
                spec,
                size=self.tensor_parallel_size,
                key_file=None if keys is None else keys.file,
                **options,
            )
        else:
            made = self._gpu().GpuExecutor(checkpoint, spec, **options)
        return made
