"""`calotype keys`: who may use a service. Works on its job database, not through its API."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from calotype.serving.core.errors import NotFound

if TYPE_CHECKING:
    from calotype.serving.database.database import Database
    from calotype.serving.jobs.records import KeyRecord


@click.group()
@click.option(
    "--data-dir",
    type=click.Path(path_type=pathlib.Path, file_okay=False),
    default=pathlib.Path(os.environ.get("CALOTYPE_DATA_DIR", "calotype-data")),
    show_default=True,
    help="Folder of the job database (or CALOTYPE_DATA_DIR).",
)
@click.pass_context
def keys(context: click.Context, data_dir: pathlib.Path) -> None:
    """API keys.

    CALOTYPE_DATABASE_URL names the database of a cluster; without it, it is in --data-dir.
    """
    context.obj = data_dir


@contextlib.contextmanager
def _opened(data_dir: pathlib.Path) -> Iterator[Database]:
    from calotype.serving.database.connection import sqlite_url
    from calotype.serving.database.database import Database

    url = os.environ.get("CALOTYPE_DATABASE_URL")
    if not url:
        data_dir.mkdir(parents=True, exist_ok=True)
        url = sqlite_url(data_dir)
    database = Database.open(url)
    try:
        yield database
    finally:
        database.close()


# The folder may be named before or after the command.
_data_dir = click.option(
    "--data-dir",
    "here",
    type=click.Path(path_type=pathlib.Path, file_okay=False),
    help="As of `calotype keys`.",
)


@keys.command()
@click.option("--name", default="", help="What it is for.")
@click.option("--team", default="default", show_default=True, help="Whose it is.")
@click.option(
    "--scope", "scopes", multiple=True,
    help="images, jobs, adapters, trainings, moderation or admin; may be repeated. Default: all.",
)  # fmt: skip
@_data_dir
@click.pass_obj
def create(
    data_dir: pathlib.Path, name: str, team: str, scopes: tuple[str, ...], here: pathlib.Path | None
) -> None:
    """Make an API key and print it, for the only time."""
    from calotype.serving.database.accounts.api_keys import SCOPES

    with _opened(here or data_dir) as database:
        plain, record = database.api_keys.create(team=team, name=name, scopes=scopes or SCOPES)
    click.echo(plain)
    click.echo(f"{record.id}: team {team}; shown this once, keep it.", err=True)


@keys.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one key a line.")
@_data_dir
@click.pass_obj
def list_keys(data_dir: pathlib.Path, as_json: bool, here: pathlib.Path | None) -> None:
    """List all keys, without what would let anybody in."""
    with _opened(here or data_dir) as database:
        teams = {team.id: team.name for team in database.teams.list_teams()}
        found = [_described(key, teams) for key in database.api_keys.list_keys()]
    for key in found:
        if as_json:
            click.echo(json.dumps(key))
            continue
        shown = f"{key['prefix']}..." if key["prefix"] else "-"
        words = (key["id"], shown, key["team"], key["state"], ",".join(key["scopes"]), key["name"])
        click.echo("  ".join(words).rstrip())


@keys.command()
@click.argument("key_id")
@_data_dir
@click.pass_obj
def revoke(data_dir: pathlib.Path, key_id: str, here: pathlib.Path | None) -> None:
    """Let a key work no longer, from now on."""
    with _opened(here or data_dir) as database:
        if not database.api_keys.revoke_key(key_id):
            raise NotFound(
                f"There is no key {key_id!r} that is valid. `calotype keys list` shows all."
            )
    click.echo(f"{key_id} is revoked.")


@keys.command()
@click.argument("key_id")
@click.option(
    "--overlap-seconds", type=click.FloatRange(0), default=86_400.0, show_default=True,
    help="How long the old key works beside the new one.",
)  # fmt: skip
@_data_dir
@click.pass_obj
def rotate(
    data_dir: pathlib.Path, key_id: str, overlap_seconds: float, here: pathlib.Path | None
) -> None:
    """Make a new key in place of an old one and print it, for the only time."""

    with _opened(here or data_dir) as database:
        plain, record = database.api_keys.rotate(key_id, overlap_seconds)
    click.echo(plain)
    click.echo(f"{record.id} takes the place of {key_id}; shown this once, keep it.", err=True)


def _described(key: KeyRecord, teams: dict[str, str]) -> dict[str, Any]:
    state = "valid"
    if key.revoked is not None:
        state = "revoked"
    elif key.expires is not None:
        state = "ended" if key.expires <= time.time() else "ends soon"
    return {
        "id": key.id,
        "prefix": key.prefix,
        "team": teams.get(key.team_id, key.team_id),
        "state": state,
        "scopes": list(key.scopes),
        "name": key.name,
        "created": int(key.created),
    }
