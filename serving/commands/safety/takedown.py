"""`calotype moderation takedown`: a picture goes, every copy of it, and does not come again."""

from __future__ import annotations

import json
import pathlib
from typing import TYPE_CHECKING

import click

from calotype.moderation.policy.categories import Category
from calotype.serving.commands.service_options import (
    Refused,
    open_reviewer,
    refusals,
    service_options,
)

if TYPE_CHECKING:
    from calotype.serving.client import Takedown

MAX_FILE_BYTES = 20 * 2**20


@click.command()
@click.argument("file", required=False, type=click.Path(path_type=pathlib.Path))
@click.option("--asset", help="Instead of FILE: the id of a stored picture.")
@click.option(
    "--category", type=click.Choice([category.value for category in Category]),
    default=Category.REAL_PERSON_INTIMATE.value, show_default=True, metavar="CATEGORY",
    help="What the picture is refused for from now on.",
)  # fmt: skip
@click.option("--reason", help="For the record; needed to take a picture down.")
@click.option("--yes", is_flag=True, help="Do not ask before anything is deleted.")
@click.option("--list", "listing", is_flag=True, help="List what is refused.")
@click.option("--lift", metavar="TAKEDOWN", help="Let a picture come again.")
@click.option("--json", "plain", is_flag=True, help="Print JSON.")
@service_options
def takedown(
    file: pathlib.Path | None,
    asset: str | None,
    category: str,
    reason: str | None,
    yes: bool,
    listing: bool,
    lift: str | None,
    plain: bool,
    url: str,
    key_file: pathlib.Path | None,
) -> None:
    """Find the stored pictures that FILE is a copy of, delete them, and refuse it from now on.

    Copies are known by the watermark and by PDQ: resized, cropped or saved again. Without --reason
    they are only listed.
    """
    if [file, asset, lift, listing or None].count(None) != 3:
        raise click.UsageError("Give one of FILE, --asset, --list and --lift.")
    with refusals(), open_reviewer(url, key_file) as desk:
        if listing:
            for row in desk.takedowns():
                click.echo(json.dumps(row) if plain else _line(row))
            return
        if lift is not None:
            desk.lift_takedown(lift)
            click.echo(f"{lift}  lifted")
            return
        given = None if file is None else _read(file)
        found = desk.take_down(
            reason=reason or "looked for", category=category, image=given, asset_id=asset,
            dry_run=True,
        )  # fmt: skip
        if not plain:
            _show(found)
        if reason is not None and (
            yes or click.confirm("Delete them and refuse the picture from now on?", err=True)
        ):
            found = desk.take_down(reason=reason, category=category, image=given, asset_id=asset)
            if not plain:
                later = f", {found.pending} later" if found.pending else ""
                click.echo(f"{found.id}  {found.deleted} files deleted{later}")
                _warn(found)
        if plain:
            click.echo(
                json.dumps({name: getattr(found, name) for name in found.__dataclass_fields__})
            )


_ALSO = {
    "assets": "pictures that were drawn from them or are the same file",
    "files": "uploads and files of batches that hold one of them",
    "held": "held copies",
    "previews": "previews",
}


def _show(found: Takedown) -> None:
    for match in found.matches:
        away = "" if match["distance"] is None else f", {match['distance']} of 256 bits differ"
        click.echo(f"{match['asset_id']}  {match['job_id']}  by {match['by']}{away}")
    if found.match_count > len(found.matches):
        click.echo(f"... and {found.match_count - len(found.matches)} more")
    if not found.match_count:
        click.echo("No stored picture is a copy of it.")
    if any(found.also.values()):
        counts = ", ".join(f"{count} {_ALSO[name]}" for name, count in found.also.items() if count)
        click.echo(f"With them go: {counts}.")


def _warn(found: Takedown) -> None:
    if found.pdq is None and found.watermark is None:
        click.echo(
            "It may come again: there is too little in it to know it by, and no watermark.",
            err=True,
        )


def _line(row: dict[str, object]) -> str:
    return f"{row['id']}  {row['category']}  by {row['by']}  {row['reason']}"


def _read(file: pathlib.Path) -> bytes:
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise Refused(f"{file} cannot be read: {error.strerror}.") from None
    if len(data) > MAX_FILE_BYTES:
        raise Refused(f"{file} has more than {MAX_FILE_BYTES // 2**20} MiB.")
    return data
