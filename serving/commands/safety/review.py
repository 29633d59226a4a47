"""`calotype moderation appeal|report|review`: people and the safety stage of a running service."""

from __future__ import annotations

import json
import pathlib
from typing import TYPE_CHECKING

import click

from calotype.serving.commands.service_options import (
    open_reviewer,
    refusals,
    service_options,
    write_file,
)

if TYPE_CHECKING:
    from calotype.serving.client import Case, Reviewer

VERDICTS = ("upheld", "overturned", "dismissed", "taken_down", "approved", "rejected")
as_json = click.option("--json", "plain", is_flag=True, help="Print JSON as the service sends it.")
reason = click.option("--reason", required=True, help="For the people who decide.")


@click.command()
@click.argument("decision_id")
@reason
@as_json
@service_options
def appeal(
    decision_id: str, reason: str, plain: bool, url: str, key_file: pathlib.Path | None
) -> None:
    """Ask people to look at a refusal again; DECISION_ID stands in the refusal."""
    with refusals(), open_reviewer(url, key_file) as desk:
        _show(desk.appeal(decision_id, reason), plain)


@click.command()
@click.argument("asset_id")
@reason
@as_json
@service_options
def report(
    asset_id: str, reason: str, plain: bool, url: str, key_file: pathlib.Path | None
) -> None:
    """Say that a picture should not exist; ASSET_ID stands in its address."""
    with refusals(), open_reviewer(url, key_file) as desk:
        _show(desk.report(asset_id, reason), plain)


@click.group()
@service_options
@click.pass_context
def review(context: click.Context, url: str, key_file: pathlib.Path | None) -> None:
    """Answer appeals and reports, with a key of the scope moderation."""
    context.obj = open_reviewer(url, key_file)
    context.call_on_close(context.obj.close)


@review.command("list")
@click.option("--status", default="open", show_default=True, help="Of the cases.")
@click.option(
    "--limit", type=click.IntRange(1, 100), default=20, show_default=True, help="Most cases."
)
@as_json
@click.pass_obj
def list_cases(desk: Reviewer, status: str, limit: int, plain: bool) -> None:
    """List the queue, the oldest first."""
    with refusals():
        for case in desk.cases(status, limit):
            _show(case, plain)


@review.command()
@as_json
@click.pass_obj
def take(desk: Reviewer, plain: bool) -> None:
    """Take the oldest open case, for half an hour; ends with 1 when none waits."""
    with refusals():
        case = desk.take()
    if case is None:
        click.echo("No case waits.", err=True)
        raise SystemExit(1)
    _show(case, plain)


@review.command()
@click.argument("case_id")
@as_json
@click.pass_obj
def show(desk: Reviewer, case_id: str, plain: bool) -> None:
    """Show a case."""
    with refusals():
        _show(desk.case(case_id), plain)


@review.command("picture")
@click.argument("case_id")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=pathlib.Path, dir_okay=False),
    help="File for the picture.",
)  # fmt: skip
@click.option(
    "--reveal", is_flag=True,
    help="The picture itself instead of a blurred one. The service writes down who looked.",
)  # fmt: skip
@click.pass_obj
def image(desk: Reviewer, case_id: str, output: pathlib.Path, reveal: bool) -> None:
    """Fetch the picture of a case, blurred."""
    with refusals():
        data = desk.image(case_id, reveal=reveal)
    write_file(output, data)
    click.echo(f"{output}  {'as it is, on record' if reveal else 'blurred'}")


@review.command()
@click.argument("case_id")
@click.argument("verdict", type=click.Choice(VERDICTS))
@click.option("--note", default="", help="What the asking team is told.")
@as_json
@click.pass_obj
def decide(desk: Reviewer, case_id: str, verdict: str, note: str, plain: bool) -> None:
    """End a case that you took: upheld or overturned an appeal, dismissed or taken_down a report,
    approved or rejected a picture that is held.

    What is taken down is gone at once, every copy of it, and will not be drawn again.
    """
    with refusals():
        _show(desk.decide(case_id, verdict, note), plain)  # type: ignore[arg-type]


def _show(case: Case, plain: bool) -> None:
    if plain:
        click.echo(json.dumps(case.raw))
        return
    click.echo(f"{case.id}  {case.kind}  {case.status}  {case.subject}  {case.reason}")
    if case.note:
        click.echo(f"    {case.note}")
