"""`calotype model-app`: one model's application in one pod, until SIGTERM.

Holds no Ray itself: that is in a child, which is started again when it dies (`supervisor`). The
file that says what to run is one application of a Serve config (`deployments.cluster` shows it),
the same that KubeRay would be given. It is read again when it changes; a changed ``user_config``
reaches every replica without a restart.
"""

from __future__ import annotations

import asyncio
import json
import os
import pathlib
import signal
from collections.abc import Callable
from dataclasses import dataclass, field

from calotype.serving.api.http.server import listening_socket
from calotype.serving.cluster.supervisor import START_SECONDS, Supervisor, supervise_host
from calotype.serving.config.environment import ClusterEnvironment
from calotype.serving.core.errors import CalotypeError, InvalidRequest
from calotype.serving.core.json_object import JsonObject
from calotype.serving.observability.loops import Loop

POLL_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class ModelAppOptions:
    config: pathlib.Path
    host: str
    port: int
    start_seconds: float = START_SECONDS
    """What Ray's own start may take before it is tried again."""
    say: Callable[[str], None] = field(default=print)
    """Where sentences for whoever reads the log go."""


def run_model_app(options: ModelAppOptions) -> None:
    """Serves until SIGINT or SIGTERM; running pictures are finished then.

    Raises:
        CalotypeError: the file or the environment cannot be used, the port is taken, or the
            application cannot be started; one sentence.
    """
    environment = ClusterEnvironment.read()
    raw = _read(options.config)
    application = parse_application(raw, options.config)
    with listening_socket(options.host, options.port) as listener:
        supervisor = supervise_host(
            *(listener, environment.internal_token, os.environ, options.say),
            start_seconds=options.start_seconds,
            log_to_driver=True,
            tls=environment.tls,
        )
        asyncio.run(ModelApp(options, supervisor, raw).run(application))


def parse_application(raw: bytes, path: pathlib.Path) -> JsonObject:
    """The application that a file describes; Serve checks its fields.

    Raises:
        InvalidRequest: it is no JSON object; names the file.
    """
    try:
        application = json.loads(raw.decode("utf-8"))
    except ValueError as error:
        raise InvalidRequest(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(application, dict):
        raise InvalidRequest(f"{path} must hold an application of a Serve config, a JSON object.")
    return application


def _read(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read ({error.strerror}).") from None


class ModelApp:
    """The application that runs, and the file that it follows."""

    def __init__(self, options: ModelAppOptions, supervisor: Supervisor, raw: bytes) -> None:
        self._options, self._supervisor = options, supervisor
        self._seen = raw
        self._told = ""

    async def run(self, application: JsonObject) -> None:
        """Until SIGINT or SIGTERM. Raises CalotypeError when it cannot be started."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._end, number)
        following = asyncio.create_task(self._follow(application))
        try:
            await self._supervisor.run()
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)

    def _end(self, number: int) -> None:
        """The first signal asks to end, a second SIGINT ends at once."""
        if self._supervisor.ending and number == signal.SIGINT:
            asyncio.get_running_loop().create_task(self._supervisor.kill())
            return
        self._options.say("Draining ...")
        self._supervisor.end()

    async def _follow(self, application: JsonObject) -> None:
        name = application.get("name", "default")
        await self._supervisor.apply([application])
        self._say_once(f"The application {name} runs.")
        await Loop("configuration", self._look).run()

    async def _look(self) -> float:
        """Takes the file's application if it changed; the pause until the next look."""
        try:
            raw = await asyncio.to_thread(_read, self._options.config)
            if raw != self._seen:
                self._seen = raw
                changed = parse_application(raw, self._options.config)
                await self._supervisor.apply([changed])
                self._options.say("The changed application is deployed.")
        except CalotypeError as error:
            self._say_once(f"The changed application is not used: {error.message}")
        return POLL_SECONDS

    def _say_once(self, sentence: str) -> None:
        if sentence != self._told:
            self._told = sentence
            self._options.say(sentence)
