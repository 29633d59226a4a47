"""`calotype fetch`: what the Jobs of the operator run."""

from __future__ import annotations

import logging
import pathlib
import sys

import click

FETCH_CONFIG = pathlib.Path("/etc/calotype/fetch/fetch.json")


@click.command()
@click.argument("kind", type=click.Choice(["adapter", "model"]))
@click.option(
    "--config",
    type=click.Path(path_type=pathlib.Path, dir_okay=False),
    default=FETCH_CONFIG,
    show_default=True,
    help="What to fetch, from where, and what it must fit.",
)
@click.option(
    "--result",
    type=click.Path(path_type=pathlib.Path, dir_okay=False),
    help="File for the result; without it the container's termination message.",
)
def fetch(kind: str, config: pathlib.Path, result: pathlib.Path | None) -> None:
    """Fetch and check the weights of an adapter or a model, on a CPU.

    Prints the result as JSON; exit code 1 and a reason if there are no weights that could be
    served. HF_TOKEN, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or HTTP_AUTHORIZATION open
    what is not public.
    """
    from calotype.serving.weights.fetch import run_order
    from calotype.serving.weights.report import failure, leave, success
    from calotype.serving.wire.fetch_faults import FetchFailed
    from calotype.serving.wire.fetch_order import read_order

    code = 1
    try:
        fetched = run_order(read_order(config, kind), lambda text: click.echo(text, err=True))
        report, code = success(fetched), 0
    except FetchFailed as error:
        report = failure(error)
    except Exception as error:  # whatever it is, the operator must hear of it
        logging.getLogger(__name__).exception("the fetch failed")
        report = failure(FetchFailed(f"The fetch failed: {type(error).__name__}: {error}."))
    leave(report, result)
    click.echo(report)
    sys.exit(code)
