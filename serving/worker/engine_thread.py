"""Runs the engine on a thread of its own, for callers in an event loop.

`Engine.step` blocks for one denoise step; the thread calls it while there is work, and every event
is handed to the coroutine that waits for its request.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from calotype.serving.core.errors import CalotypeError, EngineError, GroupLost
from calotype.serving.core.request import Event, Failed, Finished, GenerationRequest, Progress

if TYPE_CHECKING:
    from calotype.serving.engine.engine import Engine


log = logging.getLogger(__name__)

TELL_SECONDS = 0.2
"""How late progress may be reported: waking the event loop at every step costs a tenth of it."""

ALIVE_SECONDS = 0.2
"""How often it is checked whether the thread is still there to report an end."""


@dataclass(frozen=True, slots=True)
class EngineInputs:
    """What a request is drawn from beside its parameters: see `Engine.add`."""

    embeds: Any = None
    """Of the prompt: [tokens, width], a tensor or an array."""
    negative: Any = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    """The images that the request names, by name."""
    checkpoint: bytes | None = None


class EngineThread:
    """Runs an engine for as long as the process lives, or until `close`.

    It also ends, without an answer to anybody, when the devices of a group lose each other.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._listeners: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Queue[Event]]] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._kept: list[Event] = []
        self._told = 0.0
        """When events were handed over last."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    async def draw(
        self, request: GenerationRequest, given: EngineInputs
    ) -> AsyncGenerator[Event, None]:
        """Adds the request and yields its events; the last one is `Finished` or `Failed`.

        A caller that stops iterating aborts the request, and waits until the engine has let it go:
        the same request may come again.
        """
        queue: asyncio.Queue[Event] = asyncio.Queue()
        with self._changed:
            self._listeners[request.id] = (asyncio.get_running_loop(), queue)
        terminal = added = False
        try:
            await self._add(request, given)
            added = True
            with self._changed:
                self._changed.notify()
            while not terminal:
                event = await queue.get()
                terminal = isinstance(event, Finished | Failed)
                yield event
        except CalotypeError as error:  # refused by `add`
            if terminal:
                raise
            terminal = True
            yield Failed(request.id, error)
        finally:
            if not terminal:
                self.abort(request.id)
                if added:
                    await self._end_of(queue)
            with self._changed:
                self._listeners.pop(request.id, None)

    async def _add(self, request: GenerationRequest, given: EngineInputs) -> None:
        add = functools.partial(
            self.engine.add,
            request,
            given.embeds,
            negative=given.negative,
            files=given.files or None,
            checkpoint=given.checkpoint,
        )
        if not given.files:
            add()
            return
        # Images take a while to decode, and the event loop has others to serve meanwhile.
        adding = asyncio.ensure_future(asyncio.to_thread(add))
        try:
            await asyncio.shield(adding)
        except asyncio.CancelledError:
            # The thread cannot be stopped: what it adds is aborted as soon as it is in.
            adding.add_done_callback(lambda _: self.abort(request.id))
            raise

    async def _end_of(self, queue: asyncio.Queue[Event]) -> None:
        """Returns when the last event has come: it must not reach who asks for the same again."""
        while self.alive:
            with contextlib.suppress(TimeoutError):
                event = await asyncio.wait_for(queue.get(), ALIVE_SECONDS)
                if isinstance(event, Finished | Failed):
                    return

    def abort(self, request_id: str) -> None:
        """Stops the request before its next step."""
        self.engine.abort(request_id)
        with self._changed:
            self._changed.notify()

    def close(self) -> None:
        """Ends the thread after the step it is in."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout=30)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed and not self.engine.has_work:
                    # The time-out only guards against a wake-up lost between add and notify.
                    self._changed.wait(0.5)
                if self._closed:
                    return
            try:
                events = self.engine.step()
            except GroupLost as error:
                # Nobody is answered: the jobs are drawn elsewhere, once their leases have run out.
                log.error("the engine ends: %s", error.message)
                return
            except Exception as error:  # a bug of ours: no request may wait for ever because of it
                self._fail_all(error)
                continue
            self._tell(events)

    def _tell(self, events: Sequence[Event]) -> None:
        """Hands events over; those that only tell of progress wait for others, or for a moment."""
        self._kept += events
        now = time.monotonic()
        waits = all(isinstance(event, Progress) for event in self._kept)
        if waits and now - self._told < TELL_SECONDS:
            return
        kept, self._kept, self._told = self._kept, [], now
        for event in kept:
            self._deliver(event)

    def _deliver(self, event: Event) -> None:
        with self._changed:
            listener = self._listeners.get(event.request_id)
        if listener is not None:
            loop, queue = listener
            if not loop.is_closed():
                loop.call_soon_threadsafe(queue.put_nowait, event)

    def _fail_all(self, error: Exception) -> None:
        with self._changed:
            waiting = list(self._listeners)
        for request_id in waiting:
            self.engine.abort(request_id)
            fault = EngineError(f"The engine failed: {type(error).__name__}: {error}.")
            self._deliver(Failed(request_id, fault))
