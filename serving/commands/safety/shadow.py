"""`calotype moderation shadow`: what classifiers on trial think of what was decided."""

from __future__ import annotations

import json
import pathlib

import click

from calotype.serving.core.errors import InvalidRequest


@click.group()
def shadow() -> None:
    """Classifiers on trial, which a policy names in `shadow`."""


@shadow.command()
@click.argument("logs", type=click.Path(path_type=pathlib.Path, exists=True))
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def report(logs: pathlib.Path, as_json: bool) -> None:
    """How far they agree with the decisions, from a log or a folder such as DATA_DIR/audit."""
    from calotype.moderation.errors import AuditError
    from calotype.moderation.evaluation.agreement import agreements

    try:
        found = agreements(logs)
    except AuditError as error:
        raise InvalidRequest(str(error)) from error
    if as_json:
        click.echo(json.dumps([one.to_json() for one in found], indent=2))
        return
    for one in found:
        for line in one.lines():
            click.echo(line)
