"""`calotype dataset`: look at pictures before anything is learnt from them."""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from calotype.serving.commands.service_options import write_file

if TYPE_CHECKING:
    from calotype.serving.config.rights import Rights
    from calotype.serving.training.dataset.report import DatasetReport

Command = Callable[..., Any]
_SHOWN = 20
"""Files of a kind that are named; the HTML file and --json name all of them."""


@click.group()
def dataset() -> None:
    """Pictures with captions that an adapter is trained on."""


def picture_options(command: Command) -> Command:
    """How pictures are set apart, and the rights of those that bring no record of their own."""
    options = (
        click.option(
            "--holdout", type=click.FloatRange(0, 0.5), default=0.1, show_default=True,
            help="Share of pictures that is not learnt from.",
        ),
        click.option(
            "--duplicates-within", "distance", type=click.IntRange(0, 128), default=31,
            show_default=True, help="Bits of the PDQ hash in which copies may differ.",
        ),
        click.option(
            "--rights", "basis", type=click.Choice(["own", "licensed", "consent"]),
            help="By what right they are learnt from, where rights.json or metadata.jsonl says "
            "nothing.",
        ),
        click.option("--holder", help="Who holds the rights, or gave the consent."),
        click.option("--licence", help="Licence, for example CC-BY-4.0."),
        click.option("--evidence", help="Where the proof is kept: a URL or a file."),
        click.option("--expires", metavar="YYYY-MM-DD", help="Last day of the rights."),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def given_rights(
    basis: str | None,
    holder: str | None,
    licence: str | None,
    evidence: str | None,
    expires: str | None,
) -> Rights | None:
    """The record that `picture_options` say; None = none is said. Raises DatasetRefused."""
    from calotype.serving.training.dataset.descriptions import parse_rights

    named = {"basis": basis, "holder": holder, "licence": licence, "evidence": evidence}
    given = {name: value for name, value in (named | {"expires": expires}).items() if value}
    return parse_rights(given, "--rights") if given else None


@dataset.command()
@click.argument("source")
@click.option("--resolution", type=int, default=1024, show_default=True, help="Of a square bucket.")
@click.option("--trigger", help="Word that evokes the adapter; put into every caption.")
@click.option("--class-word", help="What the trigger is one of, for pictures without a caption.")
@click.option("--prefix", default="", help="Put before every caption.")
@click.option("--suffix", default="", help="Put after every caption.")
@click.option(
    "--captions-by", "captioner", metavar="FOLDER",
    help="Model folder whose text encoder writes missing captions, if it can see.",
)  # fmt: skip
@picture_options
@click.option(
    "--leave-out-refused", is_flag=True,
    help="Leave out what the safety stage refuses, or whose rights have ended, and go on.",
)  # fmt: skip
@click.option(
    "--without", multiple=True, metavar="SHA256", help="Leave out this picture; may be repeated."
)
@click.option(
    "--html", type=click.Path(path_type=pathlib.Path, dir_okay=False),
    help="Write the report with thumbnails to this file.",
)  # fmt: skip
@click.option("--json", "plain", is_flag=True, help="Print JSON.")
def check(
    source: str,
    resolution: int,
    trigger: str | None,
    class_word: str | None,
    prefix: str,
    suffix: str,
    captioner: str | None,
    holdout: float,
    distance: int,
    basis: str | None,
    holder: str | None,
    licence: str | None,
    evidence: str | None,
    expires: str | None,
    leave_out_refused: bool,
    without: tuple[str, ...],
    html: pathlib.Path | None,
    plain: bool,
) -> None:
    """Say which pictures of SOURCE would be learnt from, and why the others would not.

    SOURCE is a folder, a zip or tar archive (WebDataset too), or s3://BUCKET/PREFIX/. Every picture
    and caption passes the safety stage. Exit code 2: the set cannot be used as it is.
    """
    from calotype.moderation.moderator import Moderator
    from calotype.serving.training.dataset.captions import Wording
    from calotype.serving.training.dataset.opening import open_source
    from calotype.serving.training.dataset.preparation import Options, prepare

    options = Options(
        resolution=resolution,
        wording=Wording(trigger, class_word, prefix, suffix),
        captioner=None if captioner is None else _captioner(captioner),
        holdout=holdout,
        distance=distance,
        rights=given_rights(basis, holder, licence, evidence, expires),
        leave_out_refused=leave_out_refused,
        without=frozenset(without),
    )
    with (
        open_source(source) as opened,
        click.progressbar(length=0, label="Checking", file=sys.stderr, show_eta=True) as bar,
    ):

        def progress(done: int, of: int) -> None:
            bar.length = of
            bar.update(done - bar.pos)

        prepared = prepare(opened, options, screen=Moderator.load(), progress=progress)
        if html is not None:
            from calotype.serving.training.dataset.page import html_page

            write_file(html, html_page(prepared).encode())
    report = prepared.report
    if plain:
        click.echo(json.dumps(report.to_payload(), indent=2))
    else:
        _show(report)
    report.raise_for_errors()


def _captioner(folder: str) -> Callable[[Any], str] | None:
    from calotype.serving.training.dataset.captioner import find_captioner

    found, said = find_captioner(pathlib.Path(folder))
    click.echo(said, err=True)
    return found


def _show(report: DatasetReport) -> None:
    captions = ", ".join(f"{count} {source.value}" for source, count in report.captions.items())
    buckets = ", ".join(f"{w}x{h}: {count}" for (w, h), count in report.buckets.items())
    click.echo(
        f"{report.source}: {report.pictures} pictures, {len(report.used)} used "
        f"({report.held_out} held out), {len(report.refused)} refused, "
        f"{len(report.duplicates)} duplicates"
    )
    click.echo(f"captions: {captions or 'none'}")
    click.echo(f"buckets at {report.resolution}: {buckets or 'none'}")
    for one in report.refused[:_SHOWN]:
        click.echo(f"refused    {one.file}  {one.code}: {one.reason}")
    for copy in report.duplicates[:_SHOWN]:
        click.echo(f"duplicate  {copy.file} of {copy.of}, {copy.distance} of 256 bits differ")
    for warning in report.warnings:
        click.echo(f"note       {warning}")
    click.echo(f"digest     {report.digest}")
