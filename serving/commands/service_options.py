"""What commands share: of those that speak with a running service its address, a key and its
refusals; of those that start Ray how long that may take; how they were typed."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shlex
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from calotype.serving.client import Reviewer

Command = Callable[..., Any]


class Refused(click.ClickException):
    """What the service said, for the person at the terminal."""

    exit_code = 2


def service_options(command: Command) -> Command:
    """``--url`` and ``--key-file``."""
    url = click.option(
        "--url", envvar="CALOTYPE_URL", default="http://127.0.0.1:8000", show_default=True,
        help="Address of the service (or CALOTYPE_URL).",
    )  # fmt: skip
    key_file = click.option(
        "--key-file", type=click.Path(path_type=pathlib.Path, dir_okay=False),
        help="File with the API key; without it CALOTYPE_API_KEY is used.",
    )  # fmt: skip
    decorated: Command = url(key_file(command))
    return decorated


def ray_start_option(command: Command) -> Command:
    """``--ray-start-seconds``."""
    option = click.option(
        "--ray-start-seconds", envvar="CALOTYPE_RAY_START_SECONDS", default=240.0,
        type=click.FloatRange(5, 3600), show_default=True,
        help="How long Ray's own start may take, each time (or CALOTYPE_RAY_START_SECONDS).",
    )  # fmt: skip
    decorated: Command = option(command)
    return decorated


def read_key(key_file: pathlib.Path | None) -> str:
    """The API key of a file or of the environment. Raises Refused."""
    key = os.environ.get("CALOTYPE_API_KEY", "")
    if key_file is not None:
        try:
            key = key_file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise Refused(f"--key-file {key_file} cannot be read: {error}.") from None
    if not key.strip():
        raise Refused(
            "An API key is needed: set CALOTYPE_API_KEY, or name a file with --key-file. "
            "`calotype keys create` makes one."
        )
    return key.strip()


def open_reviewer(url: str, key_file: pathlib.Path | None) -> Reviewer:
    """A client for the people of the safety stage, to be closed."""
    from calotype.serving.client import Reviewer

    return Reviewer(url, read_key(key_file))


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """What the service refuses ends the command with a sentence."""
    from calotype.serving.client import ApiError, ServiceUnreachable

    try:
        yield
    except ApiError as error:
        told = [error.message]
        if error.param and error.param not in error.message:
            told.append(f"The parameter is {error.param}.")
        if error.request_id:
            told.append(f"(request {error.request_id})")
        raise Refused(" ".join(told)) from None
    except ServiceUnreachable as error:
        raise Refused(f"{error} Name the service with --url or CALOTYPE_URL.") from None


def typed_command() -> str:
    """The command that runs, as a line for a shell, with the options that were given."""
    context = click.get_current_context()
    words, above = list[str](), context
    while above.parent is not None:  # the outermost is called by a path, or python -m
        words.insert(0, str(above.info_name))
        above = above.parent
    words.insert(0, "calotype")
    for parameter in context.command.params:
        name = str(parameter.name)
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        value = context.params[name]
        values = list(value) if isinstance(value, tuple) else [value]
        if isinstance(parameter, click.Argument):
            words += [str(one) for one in values]
        elif isinstance(parameter, click.Option) and parameter.is_flag:
            words.append(parameter.opts[-1])
        else:
            words += [word for one in values for word in (parameter.opts[-1], str(one))]
    return shlex.join(words)


def write_file(path: pathlib.Path, data: bytes) -> None:
    """Writes a file, and the folders that it lies in. Raises Refused."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise Refused(f"{path} cannot be written: {error.strerror}.") from None
