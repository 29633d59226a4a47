"""`calotype serve`: the API on this machine."""

from __future__ import annotations

import logging
import os
import pathlib
from typing import TYPE_CHECKING

import click

from calotype.serving.commands.service_options import ray_start_option

if TYPE_CHECKING:
    from calotype.serving.deployments.preparation import ServeOptions

DATA_DIR = pathlib.Path(os.environ.get("CALOTYPE_DATA_DIR", "calotype-data"))
_data_dir = click.option(
    "--data-dir",
    type=click.Path(path_type=pathlib.Path, file_okay=False),
    default=DATA_DIR,
    show_default=True,
    help="Folder of the job database and the pictures (or CALOTYPE_DATA_DIR).",
)


@click.command()
@click.option(
    "-f",
    "--manifests",
    multiple=True,
    type=click.Path(path_type=pathlib.Path),
    help="A manifest or a folder of them; may be repeated. Without it: the built-in model.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@click.option(
    "--threads", type=click.IntRange(1, 256), default=1, show_default=True,
    help="Torch threads of one replica.",
)  # fmt: skip
@_data_dir
@ray_start_option
def serve(
    manifests: tuple[pathlib.Path, ...],
    host: str,
    port: int,
    threads: int,
    data_dir: pathlib.Path,
    ray_start_seconds: float,
) -> None:
    """Serve the API on this machine; Ctrl-C drains and ends it.

    The first API key is taken from CALOTYPE_API_KEY, or made and printed once. Changed manifests
    are picked up while the service runs. When Ray dies it is started again, and jobs are kept.
    """
    from calotype.serving.deployments.preparation import ServeOptions

    # The keys of the marks lie there.
    os.environ["CALOTYPE_DATA_DIR"] = str(data_dir.resolve())
    _run(
        ServeOptions(
            host,
            port,
            data_dir,
            manifests,
            threads,
            os.environ.get("CALOTYPE_API_KEY") or None,
            ray_start_seconds,
            say=lambda sentence: click.echo(sentence),
        )
    )


def _run(options: ServeOptions) -> None:
    """Serves until SIGINT or SIGTERM.

    Raises:
        CalotypeError: a manifest is wrong, a model cannot be loaded, the port or the data folder
            is taken; one sentence.
    """
    from calotype.serving.api.http.server import listening_socket
    from calotype.serving.deployments.preparation import claimed, read_resources
    from calotype.serving.observability.logs import set_up_logs

    # A person reads the terminal: what goes well is not written there.
    set_up_logs(level=logging.WARNING)
    resources = read_resources(options.places())
    with listening_socket(options.host, options.port) as listener, claimed(options.data_dir):
        from calotype.serving.deployments.service import run_service

        run_service(options, resources, listener)
