"""`calotype provenance check`: what the marks of a picture file say."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from calotype.serving.core.errors import InvalidRequest

if TYPE_CHECKING:
    from calotype.moderation.provenance.marks import Provenance

MAX_FILE_BYTES = 100 * 2**20


@click.group()
def provenance() -> None:
    """Find out where a picture comes from."""


@provenance.command()
@click.argument("file", type=click.Path(path_type=pathlib.Path))
@click.option(
    "--data-dir",
    type=click.Path(path_type=pathlib.Path, file_okay=False),
    help="Folder of the installation whose marks are looked for (or CALOTYPE_DATA_DIR).",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(file: pathlib.Path, data_dir: pathlib.Path | None, as_json: bool) -> None:
    """Read the XMP, the Content Credentials and the watermark of FILE.

    The watermark is found in copies too that were resized, cropped or saved again; it can only be
    read with the key of the installation that made the picture.
    """
    from calotype.moderation.provenance.marks import check as read_marks
    from calotype.serving.config.environment import DATA_DIR
    from calotype.serving.images.provenance import installation_keys

    variables = dict(os.environ)
    if data_dir is not None:
        variables = {DATA_DIR: str(data_dir)}
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror}.") from None
    if len(data) > MAX_FILE_BYTES:
        raise InvalidRequest(f"{file} has more than {MAX_FILE_BYTES // 2**20} MiB.")
    found = read_marks(data, installation_keys(variables, make=False), str(file))
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
        return
    click.echo(f"{file}: {found.kind}, {found.width}x{found.height}")
    for line in _lines(found):
        click.echo(line)


def _lines(found: Provenance) -> Iterator[str]:
    yield f"XMP            {found.source_type or 'says nothing about its source'}"
    yield f"C2PA           {_credentials(found)}"
    yield f"watermark      {_watermark(found)}"
    yield f"made here      {'yes' if found.ours else 'not shown by any mark'}"


def _credentials(found: Provenance) -> str:
    known = found.credentials
    if known is None:
        return "no Content Credentials" if found.credentials_read else (
            "not read: not a png, jpeg or webp file, or calotype[provenance] is not installed"
        )  # fmt: skip
    state = "valid, signed here" if known.trusted else "valid" if known.valid else "INVALID"
    parts = [state]
    if known.signer or known.issuer:
        parts.append(f"signed by {known.signer} ({known.issuer}), {known.algorithm}")
    if known.generator:
        parts.append(f"made by {known.generator}")
    if known.source_type:
        parts.append(known.source_type.rpartition("/")[2])
    if not known.trusted and known.problems:
        parts.append(", ".join(known.problems))
    return "; ".join(parts)


def _watermark(found: Provenance) -> str:
    mark = found.watermark
    if mark is None:
        return "none" if found.watermark_read else (
            "not looked for: this data folder has no key yet (name another one with --data-dir)"
        )  # fmt: skip
    parts = [f"found, payload {mark.payload}, {mark.agreement:.0%} of the code read as written"]
    if mark.scale != 1.0:
        parts.append(f"{mark.scale:.0%} of the size it was made in")
    if mark.turned:
        parts.append(mark.turned)
    if found.former_key:
        parts.append("under a former key")
    return "; ".join(parts)
