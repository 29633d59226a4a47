"""`calotype model-app`: Ray and one model's application inside one pod, until SIGTERM.

The file that says what to run is one application of a Serve config (`deployments.cluster` shows
it), the same that KubeRay would be given. It is read again when it changes; a changed
``user_config`` reaches every replica without a restart.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from pydantic import ValidationError
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from calotype.serving.api.http.listener import listening_socket
from calotype.serving.config import describe
from calotype.serving.config.environment import ClusterEnvironment
from calotype.serving.core.errors import InvalidRequest, ModelLoadFailed
from calotype.serving.deployments.app import QUIET_LOG
from calotype.serving.deployments.ray_node import start_ray, stop_ray

log = logging.getLogger(__name__)

POLL_SECONDS = 2.0
EAGER_SECONDS = 0.25
DRAIN_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class ModelAppOptions:
    config: pathlib.Path
    host: str
    port: int
    say: Callable[[str], None] = field(default=print)
    """Where sentences for whoever reads the log go."""


def run_model_app(options: ModelAppOptions) -> None:
    """Serves until SIGINT or SIGTERM; running pictures are finished then.

    Raises:
        CalotypeError: the file or the environment cannot be used, the port is taken, or the
            application cannot be started; one sentence.
    """
    ClusterEnvironment.read()
    raw = _read(options.config)
    application = parse_application(raw, options.config)
    with listening_socket(options.host, options.port):
        pass  # Serve's proxy takes it later, and would only log that it cannot
    stop = threading.Event()
    with _ray(), _signals(stop):  # in this order: Ray has handlers of its own, which kill
        _start_serve(options)
        app = ModelApp(options, application, raw)
        app.deploy(application)
        try:
            app.follow(stop)
        finally:
            app.end()


def parse_application(raw: bytes, path: pathlib.Path) -> ServeApplicationSchema:
    """The application that a file describes.

    Raises:
        InvalidRequest: it is no JSON or describes no application; names the file and the field.
    """
    try:
        return ServeApplicationSchema.model_validate(json.loads(raw.decode("utf-8")))
    except ValidationError as error:
        raise InvalidRequest(f"{path}: {describe(error)}") from None
    except ValueError as error:
        raise InvalidRequest(f"{path} is not valid JSON: {error}.") from None


def _read(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read ({error.strerror}).") from None


class ModelApp:
    """The application that runs, and the file that it follows."""

    def __init__(
        self, options: ModelAppOptions, application: ServeApplicationSchema, raw: bytes
    ) -> None:
        self._options = options
        self._name = application.name
        self._seen = raw
        self._told = ""

    def deploy(self, application: ServeApplicationSchema) -> None:
        """Hands the application to Serve, which changes what differs; returns at once."""
        self._name = application.name
        # As KubeRay does through Serve's REST interface, without a dashboard process for it.
        _get_global_client().deploy_apps(ServeDeploySchema(applications=[application]))

    def follow(self, stop: threading.Event) -> None:
        """Until ``stop``: says how the application is, and takes a changed file.

        Raises:
            ModelLoadFailed: the application that the process was started with cannot be deployed.
        """
        ran = False
        while not stop.wait(POLL_SECONDS if ran else EAGER_SECONDS):
            status, message = self._status()
            if status == "DEPLOY_FAILED" and not ran:
                raise ModelLoadFailed(f"The application {self._name} cannot run: {message}")
            if status == "RUNNING" and not ran:
                ran = True
            self._tell(status, message)
            self._look()

    def end(self) -> None:
        """Finishes the running pictures, leaves the queued jobs to the database, ends Serve."""
        self._options.say("Draining ...")
        with contextlib.suppress(RayServeException, ray.exceptions.RayError, TimeoutError):
            dispatcher = serve.get_deployment_handle("Dispatcher", self._name)
            dispatcher.drain.remote(DRAIN_SECONDS).result(timeout_s=DRAIN_SECONDS + 10)
        # Ray reports the end of its own processes as errors: nobody who reads this asked.
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            serve.shutdown()

    def _look(self) -> None:
        try:
            raw = _read(self._options.config)
            if raw == self._seen:
                return
            self._seen = raw
            application = parse_application(raw, self._options.config)
        except InvalidRequest as error:
            self._say_once(f"The changed application is not used: {error.message}")
            return
        self.deploy(application)
        self._options.say("The changed application is deployed.")

    def _tell(self, status: str, message: str) -> None:
        words = {"RUNNING": "runs", "DEPLOYING": "is being deployed"}
        detail = f": {message}" if message else ""
        self._say_once(f"The application {self._name} {words.get(status, status)}{detail}.")

    def _say_once(self, sentence: str) -> None:
        if sentence != self._told:
            self._told = sentence
            self._options.say(sentence)

    def _status(self) -> tuple[str, str]:
        found: Any = serve.status().applications.get(self._name)
        if found is None:
            return "DEPLOYING", ""
        lines = str(found.message).strip().splitlines()
        return str(found.status.value), lines[-1].strip(" .") if lines else ""


def _start_serve(options: ModelAppOptions) -> None:
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": options.host, "port": options.port},
            logging_config=QUIET_LOG,
        )
    except Exception as error:  # Ray raises whatever its processes could not do
        raise ModelLoadFailed(f"Ray Serve could not be started in this pod: {error}") from error


@contextlib.contextmanager
def _ray() -> Iterator[None]:
    """Ray in this pod alone."""
    start_ray(log_to_driver=True)
    try:
        yield
    finally:
        stop_ray()


@contextlib.contextmanager
def _signals(stop: threading.Event) -> Iterator[None]:
    """The first signal asks to end, a second SIGINT ends at once."""

    def end(number: int, frame: Any) -> None:
        if stop.is_set() and number == signal.SIGINT:
            stop_ray()
            os._exit(130)
        stop.set()

    previous = {n: signal.signal(n, end) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
