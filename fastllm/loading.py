"""From a model reference to an engine that is ready: what `LLM` and `AsyncLLM` have in common."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import numbers
import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastllm.draft_model import DraftModel, load_draft_model
from fastllm.engine.offload import check_options
from fastllm.errors import CapacityError, ModelFileError, RequestError
from fastllm.executor.make import KV_CACHE_DTYPES, Device
from fastllm.formats.digest import VerifiedModel, check_sha256
from fastllm.formats.keys import KeySource
from fastllm.formats.source import DEFAULT_MODEL, resolve

if TYPE_CHECKING:
    from fastllm.engine.engine import Engine
    from fastllm.engine.hooks import EngineHook
    from fastllm.executor.base import ModelExecutor
    from fastllm.formats.checkpoint import Checkpoint
    from fastllm.formats.tokenizer import Tokenizer
    from fastllm.models.spec import DecoderSpec

logger = logging.getLogger(__name__)

QUANTIZATIONS = ("int4", "int8")
BLOCK_SIZES = (16, 32, 64)
_GUESSES = {"ngram": 10, "draft_model": 4}  # method of speculation: its num_speculative_tokens
_INT32_MAX = 2**31 - 1
_FINGERPRINT_BYTES = 64  # of a tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """What is to be loaded, and how. Checked when it is made; `LLM` says what each means.

    Raises:
        RequestError: naming the option.
    """

    model: str | os.PathLike[str] = DEFAULT_MODEL
    key_file: str | os.PathLike[str] | None = None
    sha256: str | None = None
    tokenizer: str | os.PathLike[str] | Tokenizer | None = None
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    block_size: int = 16
    enable_prefix_caching: bool = True
    kv_offload_bytes: int | None = None
    kv_offload_dir: str | os.PathLike[str] | None = None
    kv_offload_encrypted: bool | None = None
    speculative_config: Mapping[str, Any] | None = None
    target_itl_ms: float | None = None
    kv_cache_memory_bytes: int | None = None
    kv_cache_tokens: int | None = None
    kv_cache_memory_share: float | None = None
    threads: int | None = None
    max_loras: int = 8
    async_scheduling: bool = True
    seed: int = 0
    device: str = "cpu"
    dtype: str = "auto"
    deterministic: bool = False
    tensor_parallel_size: int = 1
    progress: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.model, (str, os.PathLike)):
            raise RequestError("model", self.model, "a path or a model reference")
        KeySource(self.key_file)  # the file itself is read when there is something to decrypt
        if self.sha256 is not None:
            check_sha256(self.sha256)
        place = self.place
        _choice("quantization", self.quantization, (None, *QUANTIZATIONS))
        _choice("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        place.check_kv_cache_dtype("kv_cache_dtype", self.kv_cache_dtype)
        _choice("block_size", self.block_size, BLOCK_SIZES)
        for name in ("enable_prefix_caching", "async_scheduling"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(name, getattr(self, name), "a bool")
        encrypted = False if self.kv_offload_encrypted is None else self.kv_offload_encrypted
        check_options(self.kv_offload_bytes, self.kv_offload_dir, encrypted, self.enable_prefix_caching)
        _check_speculation(self.speculative_config, place)
        target = self.target_itl_ms
        real = isinstance(target, (int, float)) and not isinstance(target, bool)
        if target is not None and not (real and 0 < target <= 1e6):
            raise RequestError("target_itl_ms", target, "milliseconds in (0, 1e6]")
        _count("max_num_seqs", self.max_num_seqs, 1, 65536)
        _count("max_num_batched_tokens", self.max_num_batched_tokens, 1, _INT32_MAX)
        _count("max_loras", self.max_loras, 0, 256)
        _count("seed", self.seed, -(2**63), 2**64 - 1)
        if self.max_model_len is not None:
            _count("max_model_len", self.max_model_len, 2, _INT32_MAX)
        if self.threads is not None:
            _count("threads", self.threads, 0, 1024)
        if self.kv_cache_memory_bytes is not None:
            _count("kv_cache_memory_bytes", self.kv_cache_memory_bytes, 1, 2**63 - 1)
        if self.kv_cache_tokens is not None:
            _count("kv_cache_tokens", self.kv_cache_tokens, 1, _INT32_MAX)
            if self.kv_cache_memory_bytes is not None:
                raise RequestError(
                    "kv_cache_tokens", self.kv_cache_tokens, "None beside kv_cache_memory_bytes"
                )
        if self.kv_cache_memory_share is not None:
            _share("kv_cache_memory_share", self.kv_cache_memory_share)
            for name in ("kv_cache_memory_bytes", "kv_cache_tokens"):
                if getattr(self, name) is not None:
                    raise RequestError(
                        "kv_cache_memory_share", self.kv_cache_memory_share, f"None beside {name}"
                    )

    @property
    def place(self) -> Device:
        """Where it runs."""
        return Device(
            name=self.device,
            dtype=self.dtype,
            deterministic=self.deterministic,
            tensor_parallel_size=self.tensor_parallel_size,
        )


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to run.

    Attributes:
        engine: owns the executor, and with it the memory.
        path: where the model lies on this machine.
        max_model_len: most tokens of one sequence, prompt included.
        weight_bytes, kv_cache_bytes: memory of the packed weights and of the KV cache, those of a draft model
            included.
        threads: threads that compute.
    """

    engine: Engine
    tokenizer: Tokenizer
    spec: DecoderSpec
    path: Path
    max_model_len: int
    weight_bytes: int
    kv_cache_bytes: int
    threads: int


def load_model(options: ModelOptions, hooks: Sequence[EngineHook] = ()) -> LoadedModel:
    """Fetch the model if need be, read it, and make an engine for it.

    Raises:
        FastLLMError: of every kind; nothing stays in memory then.
    """
    from fastllm.formats.checkpoint import open_checkpoint
    from fastllm.models.registry import spec_from_checkpoint

    options.place.check_usable()
    path = resolve(options.model, progress=options.progress)
    keys = KeySource(options.key_file)
    verified = _verify(path, options.sha256, progress=options.progress)
    with open_checkpoint(path, keys) as checkpoint:
        spec = spec_from_checkpoint(checkpoint)
        asked = options.max_model_len
        if asked is not None and asked > spec.context_length:
            raise RequestError(
                "max_model_len", asked, f"at most the model's context of {spec.context_length} tokens"
            )
        tokenizer = _tokenizer(options, checkpoint)
        known = fingerprint(checkpoint, spec)
        draft = _draft_model(options, spec, tokenizer, keys)
        executors = [] if draft is None else [draft.executor]
        try:
            executor = _executor(
                options, checkpoint, spec, _reopening(path, known, keys, options.sha256), draft
            )
            executors.append(executor)
            if draft is not None:
                draft.executor.allocate_kv(executor.kv_capacity())
            if verified is not None:
                verified.check_unchanged()
            encrypted = _offload_encrypted(options, checkpoint, draft)
            identity = f"{known} {options.quantization} {options.kv_cache_dtype}{options.place.identity}"
            max_model_len = _max_model_len(options, spec, executor)
            engine = _engine(
                options, spec, executor, tokenizer, max_model_len, identity, hooks, draft, encrypted
            )
        except BaseException:
            for item in executors:
                item.close()
            raise
    capacity = executor.kv_capacity() * executor.block_size
    logger.info(
        "%s: at most %d tokens per sequence (context %d, KV cache %d tokens), %.1f sequences of full length",
        path,
        max_model_len,
        spec.context_length,
        capacity,
        capacity / max_model_len,
    )
    return LoadedModel(
        engine,
        tokenizer,
        spec,
        path,
        max_model_len,
        sum(item.weight_bytes for item in executors),
        sum(item.kv_cache_bytes for item in executors),
        executor.threads,
    )


def fingerprint(checkpoint: Checkpoint, spec: DecoderSpec) -> str:
    """What tells a model from others, in hexadecimal: the same for every copy of its files.

    SHA-256 over the decoder's description and, of every tensor, its name, type, shape and first bytes: made
    in a millisecond, where reading all of the weights takes seconds.
    """
    digest = hashlib.sha256(repr(sorted(spec.as_dict().items())).encode())
    for name, tensor in checkpoint.tensors.items():
        digest.update(f"\n{name} {tensor.dtype} {tensor.shape} ".encode())
        digest.update(tensor.beginning(_FINGERPRINT_BYTES).tobytes())
    return digest.hexdigest()


def _verify(path: Path, sha256: str | None, *, progress: bool) -> VerifiedModel | None:
    """Compares a model's digest before it is read; None: there is none to compare with."""
    return None if sha256 is None else VerifiedModel(path, sha256, progress=progress)


def _reopening(
    path: Path, known: str, keys: KeySource, sha256: str | None = None
) -> Callable[[], AbstractContextManager[Checkpoint]]:
    """How the checkpoint is opened again; ModelFileError unless its fingerprint still is `known`, and its
    digest `sha256`."""

    @contextlib.contextmanager
    def reopen() -> Iterator[Checkpoint]:
        from fastllm.formats.checkpoint import open_checkpoint
        from fastllm.models.registry import spec_from_checkpoint

        verified = _verify(path, sha256, progress=False)
        with open_checkpoint(path, keys) as checkpoint:
            if fingerprint(checkpoint, spec_from_checkpoint(checkpoint)) != known:
                raise ModelFileError(str(path), "not the model any more that the engine was made from")
            yield checkpoint
            if verified is not None:
                verified.check_unchanged()

    return reopen


def _offload_encrypted(options: ModelOptions, checkpoint: Checkpoint, draft: DraftModel | None) -> bool:
    """Whether the KV cache's file is encrypted: as was asked, else as the model and its draft model are."""
    asked = options.kv_offload_encrypted
    model = checkpoint.encrypted or (draft is not None and draft.encrypted)
    if asked is None:
        return model and options.kv_offload_bytes is not None
    if model and options.kv_offload_bytes is not None and not asked:
        logger.warning(
            "the model is encrypted at rest, and kv_offload_encrypted=False: the KV cache's is not"
        )
    return asked


def read_tokenizer(
    reference: str | os.PathLike[str], *, progress: bool = True, keys: KeySource | None = None
) -> Tokenizer:
    """The tokenizer of a model reference; a directory needs no more than tokenizer.json.

    Args:
        keys: where the key of encrypted files is; None: in the environment.
    """
    from fastllm.formats.checkpoint import open_checkpoint
    from fastllm.formats.tokenizer import Tokenizer, load_tokenizer

    place = Path(reference)
    if place.is_dir() and (place / "tokenizer.json").exists():
        return Tokenizer.from_directory(place, keys)
    with open_checkpoint(resolve(reference, progress=progress), keys) as checkpoint:
        return load_tokenizer(checkpoint)


def _tokenizer(options: ModelOptions, checkpoint: Checkpoint) -> Tokenizer:
    from fastllm.formats.tokenizer import Tokenizer, load_tokenizer

    given = options.tokenizer
    if given is None:
        return load_tokenizer(checkpoint)
    if isinstance(given, Tokenizer):
        return given
    if not isinstance(given, (str, os.PathLike)):
        raise RequestError("tokenizer", given, "a Tokenizer, or a path or a model reference")
    try:
        return read_tokenizer(given, progress=options.progress, keys=checkpoint.keys)
    except RequestError as error:  # of a reference: it speaks of a model
        raise RequestError("tokenizer", error.value, error.limit) from error


def _executor(
    options: ModelOptions,
    checkpoint: Checkpoint,
    spec: DecoderSpec,
    reopen: Callable[[], AbstractContextManager[Checkpoint]],
    draft: DraftModel | None,
) -> ModelExecutor:
    return options.place.executor(
        checkpoint,
        spec,
        quantization=options.quantization,
        kv_cache_dtype=options.kv_cache_dtype,
        block_size=options.block_size,
        kv_cache_bytes=options.kv_cache_memory_bytes,
        kv_cache_share=options.kv_cache_memory_share,
        kv_cache_tokens=options.kv_cache_tokens,
        kv_bytes_beside=0 if draft is None else draft.executor.kv_bytes_per_block,
        max_model_len=options.max_model_len or spec.context_length,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        threads=options.threads or 0,
        reopen=reopen,
        keys=checkpoint.keys,
    )


def _draft_model(
    options: ModelOptions, spec: DecoderSpec, tokenizer: Tokenizer, keys: KeySource
) -> DraftModel | None:
    config = options.speculative_config
    if config is None or config["method"] != "draft_model":
        return None
    return load_draft_model(
        config,
        spec,
        tokenizer,
        place=options.place,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        block_size=options.block_size,
        threads=options.threads or 0,
        progress=options.progress,
        keys=keys,
        reopening=lambda path, checkpoint, own: _reopening(path, fingerprint(checkpoint, own), keys),
    )


def _max_model_len(options: ModelOptions, spec: DecoderSpec, executor: ModelExecutor) -> int:
    """What was asked for if it fits, else as much as model and cache allow."""
    had = executor.kv_capacity() * executor.block_size
    if options.max_model_len is None:
        return min(spec.context_length, had)
    if options.max_model_len > had:
        raise CapacityError(
            f"max_model_len: a sequence in a KV cache of {executor.kv_capacity()} blocks x "
            f"{executor.block_size} tokens ({executor.kv_cache_bytes} bytes)",
            asked=options.max_model_len,
            had=had,
            would_fit=had,
            unit="tokens",
        )
    return options.max_model_len


def _engine(
    options: ModelOptions,
    spec: DecoderSpec,
    executor: ModelExecutor,
    tokenizer: Tokenizer,
    max_model_len: int,
    identity: str,
    hooks: Sequence[EngineHook],
    draft: DraftModel | None,
    kv_offload_encrypted: bool,
) -> Engine:
    from fastllm.engine.engine import Engine, EngineConfig

    speculation = options.speculative_config or {}
    guesses = _GUESSES[speculation["method"]] if speculation else 0
    config = EngineConfig(
        max_model_len=max_model_len,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        block_size=options.block_size,
        vocab_size=spec.vocab_size,
        seed=options.seed,
        enable_prefix_caching=options.enable_prefix_caching,
        target_itl_ms=options.target_itl_ms,
        num_speculative_tokens=speculation.get("num_speculative_tokens", guesses),
        prompt_lookup_min=speculation.get("prompt_lookup_min", 2),
        draft_model_len=None if draft is None else draft.max_model_len,
        cache_identity=identity,
        max_loras=options.max_loras,
        async_scheduling=options.async_scheduling,
        kv_offload_bytes=options.kv_offload_bytes,
        kv_offload_dir=options.kv_offload_dir,
        kv_offload_encrypted=kv_offload_encrypted,
    )
    draft_executor = None if draft is None else draft.executor
    return Engine(executor, tokenizer, config, hooks, draft_executor=draft_executor)


def _choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    plain = value is None or (isinstance(value, (str, int)) and not isinstance(value, bool))
    if not plain or value not in allowed:
        raise RequestError(name, value, "one of " + ", ".join(repr(choice) for choice in allowed))


def _check_speculation(config: object, place: Device) -> None:
    """What `LLM` says of speculative_config; an unknown entry is refused."""
    if config is None:
        return
    if not isinstance(config, Mapping):
        raise RequestError("speculative_config", config, 'a mapping such as {"method": "ngram"}')
    if "method" not in config:
        raise RequestError("speculative_config", config, 'an entry "method"')
    _choice("speculative_config: method", config["method"], tuple(_GUESSES))
    entries = ["method", "num_speculative_tokens"]
    if config["method"] == "ngram":
        entries += ["prompt_lookup_min"]
    else:
        entries += ["model", "quantization", "kv_cache_dtype", "max_model_len"]
        if not isinstance(config.get("model"), (str, os.PathLike)):
            limit = "a path or a model reference"
            raise RequestError("speculative_config: model", config.get("model"), limit)
    for key, value in config.items():
        name = f"speculative_config: {key}"
        if key not in entries:
            raise RequestError("speculative_config", key, ", ".join(entries))
        if key == "num_speculative_tokens":
            _count(name, value, 1, 64)
        elif key == "prompt_lookup_min":
            _count(name, value, 1, 8)
        elif key == "quantization":
            _choice(name, value, (None, *QUANTIZATIONS))
        elif key == "kv_cache_dtype":
            _choice(name, value, KV_CACHE_DTYPES)
            place.check_kv_cache_dtype(name, value)
        elif key == "max_model_len":
            _count(name, value, 2, _INT32_MAX)


def _count(name: str, value: Any, least: int, most: int) -> None:
    limit = f"an integer in {least}..{most}"
    if isinstance(value, bool):
        raise RequestError(name, value, limit)
    try:
        number = operator.index(value)
    except TypeError:
        raise RequestError(name, value, limit) from None
    if not least <= number <= most:
        raise RequestError(name, value, limit)


def _share(name: str, value: Any) -> None:
    plain = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not plain or not 0 < value <= 1:
        raise RequestError(name, value, "a number in (0, 1]")
