"""`calotype jobs`: ask a running service for pictures, watch them become, fetch them."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import TYPE_CHECKING, Any

import click

from calotype.serving.commands.service_options import (
    Command,
    Refused,
    read_key,
    refusals,
    service_options,
    write_file,
)

if TYPE_CHECKING:
    from calotype.serving.client import Client, Job, JobEvent


@click.group()
@service_options
@click.pass_context
def jobs(context: click.Context, url: str, key_file: pathlib.Path | None) -> None:
    """Generations of a running service."""
    from calotype.serving.client import Client

    context.obj = Client(url, read_key(key_file))
    context.call_on_close(context.obj.close)


def _output(command: Command) -> Command:
    return click.option(
        "-o", "--output", type=click.Path(path_type=pathlib.Path, dir_okay=False),
        help="File for the picture; further ones are named out-2.png, out-3.png ...",
    )(command)  # fmt: skip


as_json = click.option("--json", "plain", is_flag=True, help="Print JSON as the service sends it.")


@jobs.command()
@click.argument("prompt")
@click.option("--model", help="A model or one of its aliases.")
@click.option("--size", help="WIDTHxHEIGHT, multiples of 16.")
@click.option("--steps", type=click.IntRange(1), help="Denoise steps.")
@click.option("--seed", type=click.IntRange(0), help="Picture i is drawn with seed + i.")
@click.option("-n", "--n", "count", type=click.IntRange(1, 10), default=1, help="Pictures.")
@click.option("--negative-prompt", help="What the picture shall not show.")
@click.option(
    "--lora", "loras", multiple=True, metavar="NAME[:SCALE]", help="An adapter; may be repeated."
)
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE",
    help="Any other parameter of the API; the value is JSON or text. May be repeated.",
)  # fmt: skip
@click.option(
    "--metadata", multiple=True, metavar="NAME=TEXT", help="Comes back with the job; repeatable."
)
@click.option("--webhook", help="https address that is told when the job is over.")
@click.option("--deadline", type=float, help="Seconds after which the job fails.")
@click.option("--idempotency-key", help="The same key makes the same job only once.")
@click.option("--watch", "watching", is_flag=True, help="Wait for it, with a progress bar.")
@_output
@as_json
@click.pass_obj
def submit(
    client: Client,
    prompt: str,
    model: str | None,
    size: str | None,
    steps: int | None,
    seed: int | None,
    count: int,
    negative_prompt: str | None,
    loras: tuple[str, ...],
    settings: tuple[str, ...],
    metadata: tuple[str, ...],
    webhook: str | None,
    deadline: float | None,
    idempotency_key: str | None,
    watching: bool,
    output: pathlib.Path | None,
    plain: bool,
) -> None:
    """Ask for pictures of PROMPT; print the job's id.

    With -o or --watch it waits until the job is over.
    """
    parameters: dict[str, Any] = {"prompt": prompt, "n": count}
    named = {"size": size, "steps": steps, "seed": seed, "negative_prompt": negative_prompt}
    parameters |= {name: value for name, value in named.items() if value is not None}
    if loras:
        parameters["loras"] = [_lora(text) for text in loras]
    for name, text in (_pair("--set", text) for text in settings):
        parameters[name] = _value(text)
    with refusals():
        job = client.submit(
            parameters,
            model=model,
            metadata=dict(_pair("--metadata", text) for text in metadata),
            webhook_url=webhook,
            deadline_seconds=deadline,
            idempotency_key=idempotency_key,
        )
        click.echo(job.id, err=plain)
        if watching or output is not None:
            job = _watched(client, job)
        _finish(client, job, output, plain)


@jobs.command()
@click.argument("job_id")
@_output
@as_json
@click.pass_obj
def get(client: Client, job_id: str, output: pathlib.Path | None, plain: bool) -> None:
    """Show a job; with -o also fetch its pictures."""
    with refusals():
        job = client.get(job_id)
        if not plain:
            click.echo(_line(job))
        _finish(client, job, output, plain)


@jobs.command("list")
@click.option(
    "--status", type=click.Choice(["queued", "running", "succeeded", "failed", "canceled"])
)
@click.option("--metadata", multiple=True, metavar="NAME=TEXT", help="Only jobs with it.")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="Most jobs.")
@as_json
@click.pass_obj
def list_jobs(
    client: Client, status: str | None, metadata: tuple[str, ...], limit: int, plain: bool
) -> None:
    """List the team's jobs, newest first."""
    wanted = dict(_pair("--metadata", text) for text in metadata)
    with refusals():
        after: str | None = None
        while limit > 0:
            page = client.list(
                limit=min(100, limit), after=after, status=status, metadata=wanted or None
            )
            for job in page.jobs:
                click.echo(json.dumps(job.raw) if plain else _line(job))
            limit, after = limit - len(page.jobs), page.last_id
            if not page.has_more or not page.jobs:
                return


@jobs.command()
@click.argument("job_id")
@_output
@as_json
@click.pass_obj
def watch(client: Client, job_id: str, output: pathlib.Path | None, plain: bool) -> None:
    """Wait until a job is over, with a progress bar."""
    with refusals():
        job = _watched(client, client.get(job_id))
        if not plain:
            click.echo(_line(job))
        _finish(client, job, output, plain)


@jobs.command()
@click.argument("job_id")
@as_json
@click.pass_obj
def cancel(client: Client, job_id: str, plain: bool) -> None:
    """End a job; one that is over already stays as it is."""
    with refusals():
        job = client.cancel(job_id)
    click.echo(json.dumps(job.raw) if plain else _line(job))


def _watched(client: Client, job: Job) -> Job:
    """The job when it is over."""
    if job.over:
        return job
    with click.progressbar(length=100, label=_label(job), file=sys.stderr) as bar:
        for event in client.events(job.id):
            if event.job is not None:
                bar.update(100 - bar.pos if event.job.status == "succeeded" else 0)
                return event.job
            bar.label = _event_label(event)
            bar.update(int(event.data.get("progress") or 0) - bar.pos)
    return client.get(job.id)


def _label(job: Job) -> str:
    if job.status == "queued":
        return f"Waiting, {job.queue_position} before it" if job.queue_position else "Waiting"
    return "Drawing"


def _event_label(event: JobEvent) -> str:
    if event.type != "job.queued":
        return "Drawing"
    place = event.data.get("queue_position")
    return f"Waiting, {place} before it" if place else "Waiting"


def _finish(client: Client, job: Job, output: pathlib.Path | None, plain: bool) -> None:
    """Fetches the pictures, prints the job, and ends with 1 if it failed."""
    if output is not None and job.status == "succeeded":
        for number, image in enumerate(job.images, start=1):
            path = output if number == 1 else _numbered(output, number)
            write_file(path, client.download(image))
            click.echo(f"{path}  seed {image.seed}", err=plain)
    if plain:
        click.echo(json.dumps(job.raw))
    if job.status in ("failed", "canceled"):
        reason = (job.error or {}).get("message") or f"The job was {job.status}."
        click.echo(f"{job.id}: {reason}", err=True)
        sys.exit(1)


def _line(job: Job) -> str:
    told = f"{job.id}  {job.status}"
    if job.status == "queued" and job.estimated_seconds is not None:
        told += f"  about {job.estimated_seconds:g} s"
    elif job.status == "running":
        told += f"  {job.progress} %"
    elif job.status == "failed":
        told += f"  {(job.error or {}).get('code', '')}"
    return f"{told}  {job.model}".rstrip()


def _lora(text: str) -> dict[str, Any]:
    name, colon, scale = text.rpartition(":")
    if not colon:
        return {"id": text}
    try:
        return {"id": name, "scale": float(scale)}
    except ValueError:
        raise Refused(f"--lora {text!r}: the scale {scale!r} is no number.") from None


def _pair(option: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise Refused(f"{option} {text!r} must be NAME=VALUE.")
    return name, value


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _numbered(path: pathlib.Path, number: int) -> pathlib.Path:
    return path.with_name(f"{path.stem}-{number}{path.suffix}")
