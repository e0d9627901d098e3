"""LoRA adapters for callers: `LoRARequest`, and how `LLM` and `AsyncLLM` load what it names."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastllm.engine.adapters import check_name
from fastllm.errors import RequestError

if TYPE_CHECKING:
    from fastllm.engine_thread import EngineThread


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """A LoRA adapter, by name and place.

    A request with a `lora_path` loads the adapter if there is none of that name yet. By name alone it must
    have been loaded before.

    Attributes:
        lora_name: what it is called from now on.
        lora_path: a directory in PEFT's layout: adapter_config.json and adapter_model.safetensors.

    Raises:
        RequestError: no text for a name, or something else than a path.
    """

    lora_name: str
    lora_path: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        check_name(self.lora_name)
        if self.lora_path is not None and not (
            isinstance(self.lora_path, (str, os.PathLike)) and os.fspath(self.lora_path)
        ):
            raise RequestError("lora_path", self.lora_path, "a path, or None")


def parse_loras(value: object, count: int) -> list[LoRARequest | None]:
    """Adapters for `count` prompts: one for all, one for each (None among them for the model as it is), or
    None.

    Raises:
        RequestError: something else.
    """
    if value is None or isinstance(value, LoRARequest):
        return [value] * count
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise RequestError("lora_request", value, "a LoRARequest, or a list of them")
    for index, item in enumerate(value):
        if item is not None and not isinstance(item, LoRARequest):
            raise RequestError(f"lora_request[{index}]", item, "a LoRARequest or None")
    if len(value) != count:
        raise RequestError(
            "lora_request", f"{len(value)} of them", f"one for all or {count}, one for each prompt"
        )
    return list(value)


class AdapterLoader:
    """Loads adapters into the engine of a thread: reads and converts them where it is called, and hands them
    over between two steps, which go on meanwhile. One at a time."""

    def __init__(self, thread: EngineThread) -> None:
        self._thread = thread
        self._lock = threading.Lock()

    def missing(self, request: LoRARequest) -> bool:
        """Whether the request has to be loaded before it can be served. From any thread; waits for nothing.

        Raises:
            RequestError: its name belongs to an adapter from somewhere else.
        """
        there = self._thread.adapters.paths.get(request.lora_name)
        if there is None:
            return request.lora_path is not None
        if request.lora_path is not None and _place(request.lora_path) != there:
            raise RequestError(
                "lora_path",
                os.fspath(request.lora_path),
                f"{there}, where the loaded {request.lora_name!r} is from",
            )
        return False

    def load(self, request: LoRARequest) -> bool:
        """Load an adapter, and wait until it can be used.

        Returns:
            False where it was loaded already.

        Raises:
            RequestError: no path, no such directory, or the name belongs to an adapter from somewhere else.
            ModelFileError, UnsupportedModelError: the adapter is damaged, does not fit the model, or is of a
                kind that fastllm does not run.
            CapacityError: there are max_loras, or the memory does not suffice.
            EngineDeadError: the engine is closed, or has failed.
        """
        with self._lock:
            if not self.missing(request):
                if request.lora_name in self._thread.adapters.paths:
                    return False
                raise RequestError("lora_path", None, "a directory with adapter_config.json")
            assert request.lora_path is not None
            self._thread.call(lambda engine: engine.adapters.check_room()).result()
            prepared = self._thread.adapters.read(_place(request.lora_path))
            self._thread.call(lambda engine: engine.add_adapter(request.lora_name, prepared)).result()
            return True

    def load_all(self, requests: Iterable[LoRARequest | None]) -> None:
        """Load what has a path and is not loaded yet; see `load`."""
        for request in requests:
            if request is not None and self.missing(request):
                self.load(request)

    def remove(self, name: str) -> Future[bool]:
        """Unload an adapter; see `Engine.remove_adapter`. Waits for nothing, adapters that are being loaded
        included."""
        check_name(name)
        return self._thread.call(lambda engine: engine.remove_adapter(name))

    def loaded(self) -> list[LoRARequest]:
        """What is loaded, in the order in which it was."""
        self._thread.check_health()
        return [LoRARequest(name, path) for name, path in self._thread.adapters.paths.items()]


def _place(path: str | os.PathLike[str]) -> Path:
    """An adapter's directory, wherever this process goes later."""
    return Path(os.path.abspath(os.fspath(path)))
