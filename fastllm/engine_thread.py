"""One thread that runs an engine for everybody: synchronous callers, event loops, any number of threads.

    callers ──commands──► SimpleQueue ──► [ commands | Engine.step | mailboxes ] ──► Bell ──► callers

Only this thread touches the engine, so requests of all callers share its batches and nothing needs a lock
around it. It sleeps in the queue while there is nothing to do: an idle engine costs no processor time.

Commands are put from any thread and never wait. `SimpleQueue.put` may even interrupt itself, so that a
generator can be thrown away by the garbage collector at any moment, in any thread, and still give up its
request. What a request brings waits in its `Mailbox`, where newer output replaces or extends older; hence a
slow reader costs one output of memory, and never stops the engine.

The thread can be paused: requests that are posted then are held back, in order, until it resumes.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from fastllm.engine.adapters import Adapters
from fastllm.engine.constraints import Constraint
from fastllm.engine.engine import Engine, check_sleep_level
from fastllm.engine.sequence import pack_token_ids
from fastllm.errors import CapacityError, EngineDeadError, RequestError
from fastllm.outputs import CompletionOutput, EmbeddingOutput, RequestOutput
from fastllm.pooling_params import PoolingParams
from fastllm.sampling_params import RequestOutputKind, SamplingParams

logger = logging.getLogger(__name__)

T = TypeVar("T")
Output = TypeVar("Output", bound="RequestOutput | EmbeddingOutput")
Command = Callable[[Engine], None]

CLOSED = "the engine is closed"
SLEEP_MODES = ("refuse", "abort", "wait")


class Bell(Protocol):
    """Tells a reader that there is something in its mailboxes. Called on the engine thread; must not wait."""

    def post(self, mailbox: Mailbox[Any]) -> None:
        """Something was put into an empty mailbox."""
        ...

    def ring(self) -> bool:
        """Called once after all posts of a step. False: the reader is gone for good."""
        ...


class Mailbox(Generic[Output]):
    """What one request has brought and its reader has not yet taken.

    With `output_kind` DELTA the pieces are joined, otherwise the newest output stands for all before it.
    """

    __slots__ = ("_error", "_lock", "_output", "bell", "kind", "request_id")

    def __init__(self, request_id: str, kind: RequestOutputKind, bell: Bell) -> None:
        self.request_id = request_id
        self.kind = kind
        self.bell = bell
        self._lock = threading.Lock()
        self._output: Any = None  # an Output
        self._error: Exception | None = None

    def put(self, output: Output) -> None:
        """Called on the engine thread."""
        with self._lock:
            older = self._output
            newest: Any = output
            if older is not None and self.kind is RequestOutputKind.DELTA:
                newest = join_deltas(older, newest)
            self._output = newest
        if older is None:
            self.bell.post(self)

    def fail(self, error: Exception) -> None:
        """The request has no further output; the reader gets the error once it has taken what there is."""
        with self._lock:
            self._error = error
        self.bell.post(self)

    def take(self) -> Output | None:
        """What has come since the last call, None for nothing.

        Raises:
            FastLLMError: the request failed.
        """
        with self._lock:
            output: Output | None = self._output
            self._output = None
            if output is None and self._error is not None:
                raise self._error
            return output


def join_deltas(older: RequestOutput, newer: RequestOutput) -> RequestOutput:
    """Two successive DELTA outputs of one request as one. The older object is used for the result."""
    known = {item.index: item for item in older.outputs}
    for item in newer.outputs:
        first = known.get(item.index)
        if first is None:
            older.outputs.append(item)
            continue
        first.text += item.text
        first.token_ids += item.token_ids
        if item.logprobs is not None:
            first.logprobs = (first.logprobs or []) + item.logprobs
        first.cumulative_logprob = item.cumulative_logprob
        first.finish_reason = item.finish_reason
        first.stop_reason = item.stop_reason
    older.outputs.sort(key=lambda item: item.index)
    if older.prompt_logprobs is None:
        older.prompt_logprobs = newer.prompt_logprobs
    older.finished = newer.finished
    older.metrics = newer.metrics
    older.num_cached_tokens = newer.num_cached_tokens
    return older


@dataclass(frozen=True, slots=True)
class Admission:
    """A request on its way to the engine.

    Attributes:
        mailbox: where its outputs go; has its id.
        place: what an error calls it, "" where there is only one.
        constraint: what `Constraints.prepare` made of params.
    """

    mailbox: Mailbox[Any]
    prompt: str | None
    prompt_token_ids: Sequence[int]
    params: SamplingParams | PoolingParams
    priority: int = 0
    place: str = ""
    cache_salt: str | None = None
    adapter: str | None = None
    constraint: Constraint | None = None

    def aborted(self) -> RequestOutput | EmbeddingOutput:
        """The output of a request that was aborted before the engine had heard of it."""
        return aborted_output(self.mailbox.request_id, self.prompt, self.prompt_token_ids, self.params)


def aborted_output(
    request_id: str, prompt: str | None, ids: Sequence[int], params: SamplingParams | PoolingParams
) -> RequestOutput | EmbeddingOutput:
    """The only output of a request that was aborted before it had begun."""
    if isinstance(params, PoolingParams):
        nothing = np.zeros(0, dtype=np.float32)
        return EmbeddingOutput(request_id, nothing, list(ids), prompt=prompt, finish_reason="abort")
    outputs = [CompletionOutput(index, "", [], finish_reason="abort") for index in range(params.n)]
    return RequestOutput(request_id, prompt, list(ids), None, outputs, finished=True)


class EngineThread:
    """Owns an engine and the thread that runs it.

    A daemon thread that is stopped and waited for at exit. After a failure of the engine, and after `stop`,
    every request and every later call gets an EngineDeadError.
    """

    def __init__(self, engine: Engine, *, name: str = "fastllm-engine") -> None:
        self._engine = engine
        self.adapters: Adapters = engine.adapters  # for what of it any thread may use
        self._commands: SimpleQueue[Command] = SimpleQueue()
        self._mail: dict[str, Mailbox[Any]] = {}
        self._paused = False
        self._held: list[Admission] = []  # posted while it was paused, in order
        self._bedtime = False  # it goes to sleep as soon as nothing is unfinished, and takes no requests
        self._idle: list[Callable[[EngineDeadError | None], None]] = []  # called then, or with why not
        # Ids that ended since the last step by abort: the engine has yet to hand out their last outputs.
        self._ending: set[str] = set()
        self._stopping = False
        self._over: EngineDeadError | None = None  # nothing is taken any more, and why
        self._failed = False
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        _live.add(self)

    # ---- any thread --------------------------------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        return self._over is None and not self._stopping

    @property
    def failure(self) -> EngineDeadError | None:
        """Why the engine died; None while it lives and after an orderly stop."""
        return self._over if self._failed else None

    def check_health(self) -> None:
        """Raises EngineDeadError where the engine takes no requests any more."""
        if self._over is not None:
            raise _copy(self._over)
        if self._stopping:
            raise EngineDeadError(CLOSED)
        if os.getpid() != self._pid:
            raise EngineDeadError("the engine runs in the process that made it; make one in this process")

    def call(self, function: Callable[[Engine], T]) -> Future[T]:
        """Run a function on the engine between two steps.

        Commands are served in the order in which they were given. What the function raises goes to the
        future and no further. Until it is called, the future can be cancelled.

        Raises:
            EngineDeadError: the engine is dead or closed.
        """
        self.check_health()
        future: Future[T] = Future()

        def command(engine: Engine) -> None:
            if not future.set_running_or_notify_cancel():
                return
            if self._over is not None:
                future.set_exception(_copy(self._over))
                return
            try:
                result = function(engine)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        self._put(command)
        return future

    def admit(self, admissions: Sequence[Admission]) -> Future[None]:
        """Queue requests: all of them, or none.

        Returns:
            A future with RequestError, CapacityError or EngineDeadError if they were refused. An error of one
            among several requests names it.
        """
        return self.call(lambda engine: self._admit(engine, admissions))

    def post(self, admission: Admission) -> None:
        """Queue one request; where it is refused, its mailbox gets the error."""
        self.check_health()

        def command(engine: Engine) -> None:
            try:
                if self._over is not None:
                    raise _copy(self._over)
                if self._paused:
                    self._held.append(admission)
                    return
                self._admit(engine, (admission,))
            except Exception as error:
                admission.mailbox.fail(error)
                admission.mailbox.bell.ring()

        self._put(command)

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests; their readers get a last output ("abort"). Unknown ids are ignored."""
        ids = tuple(request_ids)

        def command(engine: Engine) -> None:
            for request_id in ids:
                if request_id in self._mail:
                    self._abort(engine, request_id)
            if self._held:
                self._drop_held(lambda item: item.mailbox.request_id in ids, tell=True)

        self._put(command)

    def pause(self, *, wait: bool, reset_prefix_cache: bool = True) -> Future[None]:
        """Hold requests that are posted from now on back until `resume`. May be called again.

        Args:
            wait: let those that there are come to their end; else they are aborted.
            reset_prefix_cache: forget what is cached once nothing runs.

        Returns:
            A future that is done when nothing runs any more. It is not affected by `resume`.

        Raises:
            EngineDeadError: the engine is dead or closed.
        """

        def begin(engine: Engine) -> None:
            self._paused = True
            if not wait:
                self._abort_all(engine)

        def end(engine: Engine) -> None:
            if reset_prefix_cache:
                engine.reset_prefix_cache()

        return self._when_idle(begin, end)

    def resume(self) -> Future[None]:
        """Take requests again, those that were held back first. Without `pause`, do nothing."""

        def command(engine: Engine) -> None:
            self._paused = False
            held, self._held = self._held, []
            for item in held:
                try:
                    self._admit(engine, (item,))
                except Exception as error:
                    item.mailbox.fail(error)
                    item.mailbox.bell.ring()

        return self.call(command)

    @property
    def is_paused(self) -> bool:
        return self._paused

    def sleep(self, level: int, mode: str) -> Future[None]:
        """`Engine.sleep`, when nothing is unfinished.

        Args:
            mode: what about requests that are: "refuse" to sleep, "abort" them, or "wait" for them. Others
                are refused from now on.

        Returns:
            A future that is done when it sleeps, with the errors of `Engine.sleep`.

        Raises:
            RequestError: another level or mode.
            EngineDeadError: the engine is dead or closed.
        """
        check_sleep_level(level)
        if mode not in SLEEP_MODES:
            raise RequestError("mode", mode, "one of " + ", ".join(map(repr, SLEEP_MODES)))

        def begin(engine: Engine) -> None:
            if mode == "refuse" and engine.request_ids:
                engine.sleep(level)  # says so
            self._bedtime = True
            if mode == "abort":
                self._abort_all(engine)

        def end(engine: Engine) -> None:
            self._bedtime = False
            engine.sleep(level)

        return self._when_idle(begin, end)

    def _when_idle(self, begin: Callable[[Engine], None], end: Callable[[Engine], None]) -> Future[None]:
        """Call `begin` between two steps, and `end` as soon as nothing is unfinished.

        Returns:
            A future that is done when `end` is, with what either raised. Until `begin` is called, it can be
            cancelled.
        """
        self.check_health()
        future: Future[None] = Future()

        def finish(over: EngineDeadError | None) -> None:
            if over is not None:
                future.set_exception(_copy(over))
                return
            try:
                end(self._engine)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)

        def command(engine: Engine) -> None:
            if not future.set_running_or_notify_cancel():
                return
            if self._over is not None:
                finish(self._over)
                return
            try:
                begin(engine)
            except BaseException as error:
                future.set_exception(error)
                return
            if engine.has_unfinished():
                self._idle.append(finish)
            else:
                finish(None)

        self._put(command)
        return future

    def discard(self, mailboxes: Iterable[Mailbox[Any]]) -> Future[None]:
        """End the requests of readers that are gone, within a step. Never waits, never fails.

        Returns:
            A future that is done when their blocks are free.
        """
        boxes = tuple(mailboxes)
        done: Future[None] = Future()

        def command(engine: Engine) -> None:
            for box in boxes:
                self._discard(engine, box)
            done.set_result(None)

        if os.getpid() == self._pid:
            self._put(command)
        else:  # a forked process has neither the thread nor the requests
            done.set_result(None)
        return done

    def stop(self) -> None:
        """Take no more requests and end those that there are. Does not wait; may be called again."""

        self._stopping = True
        self._commands.put(lambda engine: None)  # wakes it

    def join(self, timeout: float | None = None) -> None:
        """Wait until the thread is over and the engine closed. Calls `stop` first."""
        self.stop()
        if os.getpid() == self._pid and threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def _put(self, command: Command) -> None:
        self._commands.put(command)
        if self._over is not None:  # the thread may have looked for the last time already
            self._serve()

    # ---- the engine thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        engine = self._engine
        over = EngineDeadError(CLOSED)
        try:
            while not self._stopping:
                self._serve(wait=not engine.has_unfinished())
                engine.check_health()  # a command may have met its death
                if not self._stopping and engine.has_unfinished():
                    self._step(engine)
                if self._idle and not engine.has_unfinished():
                    waiting, self._idle = self._idle, []
                    for finish in waiting:
                        finish(None)
        except BaseException as error:
            self._failed = True
            logger.exception("the engine failed")
            over = _copy(error) if isinstance(error, EngineDeadError) else _obituary(error)
        finally:
            try:
                engine.close()
            except Exception:
                logger.exception("closing the engine failed")
            self._finish(over)

    def _serve(self, *, wait: bool = False) -> None:
        """Run the commands that are there; with `wait`, sleep until there is one."""
        try:
            while wait or not self._commands.empty():
                self._commands.get(block=wait)(self._engine)
                wait = False
        except Empty:  # at the end several threads may serve
            pass

    def _step(self, engine: Engine) -> None:
        outputs = engine.step()
        self._ending.clear()
        bells: dict[Bell, None] = {}
        for output in outputs:
            request_id = output.request_id
            mailbox = self._mail.get(request_id)
            if mailbox is None:  # discarded
                continue
            if output.finished:
                del self._mail[request_id]
            mailbox.put(output)
            bells[mailbox.bell] = None
        for bell in bells:
            if not bell.ring():
                for mailbox in [box for box in self._mail.values() if box.bell is bell]:
                    self._discard(engine, mailbox)

    def _admit(self, engine: Engine, admissions: Sequence[Admission]) -> None:
        if self._bedtime:
            raise RequestError("is_sleeping", True, "False: the engine is about to sleep")
        if not self._ending.isdisjoint(item.mailbox.request_id for item in admissions):
            # The last output of the former bearer of an id comes out with the next step; it is not ours.
            self._step(engine)
        added: list[Admission] = []
        try:
            for item in admissions:  # all are looked at before the first is taken
                packed = pack_token_ids(item.prompt_token_ids, engine.scheduler.vocab_size)
                item.params.check_vocabulary(engine.scheduler.vocab_size)
                engine.scheduler.length_limit(len(packed), item.params.max_tokens)
                if item.adapter is not None:
                    engine.adapters.find(item.adapter)
            for item in admissions:
                engine.add_request(
                    item.mailbox.request_id,
                    item.prompt_token_ids,
                    item.params,
                    prompt=item.prompt,
                    priority=item.priority,
                    cache_salt=item.cache_salt,
                    constraint=item.constraint,
                    adapter=item.adapter,
                )
                self._mail[item.mailbox.request_id] = item.mailbox
                added.append(item)
        except BaseException as error:
            for other in added:
                self._discard(engine, other.mailbox)
            if item.place:
                name_place(error, item.place)
            raise

    def _abort(self, engine: Engine, request_id: str) -> None:
        engine.abort(request_id)
        self._ending.add(request_id)

    def _abort_all(self, engine: Engine) -> None:
        for request_id in tuple(self._mail):
            if request_id not in self._ending:
                self._abort(engine, request_id)

    def _drop_held(self, goes: Callable[[Admission], bool], *, tell: bool) -> None:
        """Forget some requests that are held back; with `tell` their readers get an output ("abort")."""
        gone = [item for item in self._held if goes(item)]
        self._held = [item for item in self._held if not goes(item)]
        for item in gone:
            if tell:
                item.mailbox.put(item.aborted())
                item.mailbox.bell.ring()

    def _discard(self, engine: Engine, mailbox: Mailbox[Any]) -> None:
        request_id = mailbox.request_id
        if self._mail.get(request_id) is mailbox:  # an id that was refused may be somebody else's
            del self._mail[request_id]
            self._abort(engine, request_id)
        elif self._held:
            self._drop_held(lambda item: item.mailbox is mailbox, tell=False)

    def _finish(self, over: EngineDeadError) -> None:
        """Tell everybody. A command that comes from now on is served by whoever gives it."""
        self._over = over
        boxes = [*self._mail.values(), *(item.mailbox for item in self._held)]
        self._mail, self._held = {}, []
        for mailbox in boxes:
            mailbox.fail(_copy(over))
        waiting, self._idle = self._idle, []
        for finish in waiting:
            finish(over)
        for bell in {mailbox.bell for mailbox in boxes}:
            bell.ring()
        self._serve()


def _obituary(cause: BaseException) -> EngineDeadError:
    error = EngineDeadError(f"the engine stopped: {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error


def _copy(error: EngineDeadError) -> EngineDeadError:
    """An exception of its own for each who raises it: a raised one collects the frames it passes."""
    copy = EngineDeadError(*error.args)
    copy.__cause__ = error.__cause__
    return copy


def name_place(error: BaseException, place: str) -> None:
    """Say in an error which of several prompts it is about."""
    if isinstance(error, RequestError):
        error.field = f"{place}: {error.field}"
    if isinstance(error, (RequestError, CapacityError)):
        error.args = (f"{place}: {error}",)


_live: weakref.WeakSet[EngineThread] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    """Let no thread compute while the interpreter takes everything down."""
    for thread in list(_live):
        thread.join(timeout=10.0)
