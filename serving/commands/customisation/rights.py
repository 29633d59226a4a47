"""`calotype rights`: what adapters learnt from, and consent that is taken back."""

from __future__ import annotations

import hashlib
import json
import pathlib
from typing import TYPE_CHECKING

import click

from calotype.serving.commands.service_options import (
    Refused,
    open_reviewer,
    refusals,
    service_options,
)

if TYPE_CHECKING:
    from calotype.serving.client.moderation import Revocation

_SHOWN = 20


@click.group()
def rights() -> None:
    """Rights of the pictures that adapters learn from."""


@rights.command()
@click.option("--picture", metavar="SHA256", help="sha256 of the picture's file.")
@click.option(
    "--file", type=click.Path(path_type=pathlib.Path, dir_okay=False),
    help="Instead of --picture: the picture's file itself.",
)  # fmt: skip
@click.option("--reason", help="For the record; needed to revoke. Without it they are only listed.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--restore", is_flag=True, help="Consent was given again: lift the quarantine.")
@click.option("--list", "listing", is_flag=True, help="List what was revoked.")
@click.option("--json", "plain", is_flag=True, help="Print JSON.")
@service_options
def revoke(
    picture: str | None,
    file: pathlib.Path | None,
    reason: str | None,
    yes: bool,
    restore: bool,
    listing: bool,
    plain: bool,
    url: str,
    key_file: pathlib.Path | None,
) -> None:
    """Quarantine every adapter that learnt from a picture, and every picture drawn with those.

    Nothing is deleted: --restore lifts it. What must be gone for good is for `calotype moderation
    takedown`. The key needs the scope 'moderation'.
    """
    if [picture, file, listing or None].count(None) != 2:
        raise click.UsageError("Give one of --picture, --file and --list.")
    sha256 = "" if listing else _digest(picture, file)
    with refusals(), open_reviewer(url, key_file) as desk:
        if listing:
            for row in desk.revocations():
                click.echo(json.dumps(row) if plain else f"{row['id']}  {row['reason']}")
            return
        if restore:
            desk.restore_rights(sha256)
            click.echo(f"{sha256}  restored")
            return
        found = desk.revoke_rights(sha256, reason or "looked for", dry_run=True)
        if not plain:
            _show(found)
        if reason is not None and (
            yes or click.confirm("Quarantine all of this from now on?", err=True)
        ):
            found = desk.revoke_rights(sha256, reason)
            if not plain:
                click.echo(
                    f"revoked: {len(found.adapters)} adapters and {found.asset_count} pictures "
                    f"are quarantined, {found.ended_jobs} jobs were ended"
                )
                _show_retraining(found)
        if plain:
            click.echo(
                json.dumps({name: getattr(found, name) for name in found.__dataclass_fields__})
            )


@rights.command()
@click.argument("adapter", type=click.Path(path_type=pathlib.Path, exists=True, dir_okay=False))
@click.option("--name", help="Of the adapter. Default: the file's name.")
@service_options
def record(
    adapter: pathlib.Path, name: str | None, url: str, key_file: pathlib.Path | None
) -> None:
    """Tell a service what ADAPTER learnt from, as its file says.

    Needed where the gateway cannot read the file and nobody trained it in this service.
    """
    from calotype.serving.engine.sizing.adapter_origins import read_origins

    found = read_origins(adapter)
    if found is None:
        raise Refused(
            f"{adapter} does not say what it learnt from; train it with `calotype train lora`."
        )
    with adapter.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    with refusals(), open_reviewer(url, key_file) as desk:
        desk.record_origins(
            {
                "digest": f"sha256:{digest}",
                "name": name or adapter.stem,
                "dataset_digest": found.dataset_digest,
                "command": found.command,
                "pictures": [
                    {"sha256": sha256, "rights": record} for sha256, record in found.pictures
                ],
            }
        )
    click.echo(f"{adapter}: sha256:{digest} learnt from {len(found.pictures)} pictures")


def _digest(picture: str | None, file: pathlib.Path | None) -> str:
    if file is not None:
        try:
            with file.open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise Refused(f"{file} cannot be read: {error.strerror}.") from None
    sha256 = (picture or "").lower()
    if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
        raise Refused(
            "--picture is the sha256 of the picture's file, 64 hexadecimal digits, as sha256sum "
            "prints it; or give the file itself with --file."
        )
    return sha256


def _show(found: Revocation) -> None:
    for adapter in found.adapters:
        record = adapter["rights"] or {}
        by = f"{record.get('basis', 'no record')} {record.get('holder', '')}".strip()
        click.echo(
            f"adapter  {adapter['name']}  {adapter['digest']}  {adapter['pictures']} pictures, "
            f"by {by}"
        )
    for asset_id in found.asset_ids[:_SHOWN]:
        click.echo(f"picture  {asset_id}")
    if found.asset_count > _SHOWN:
        click.echo(f"... and {found.asset_count - _SHOWN} more pictures")
    if not found.adapters:
        click.echo("No adapter that this service knows learnt from it.")


def _show_retraining(found: Revocation) -> None:
    for adapter in found.adapters:
        if adapter["retrain"]:
            click.echo(f"train {adapter['name']} again without it:\n  {adapter['retrain']}")
        else:
            click.echo(
                f"train {adapter['name']} again without it: add --without {found.id} to the "
                "command that trained it"
            )
