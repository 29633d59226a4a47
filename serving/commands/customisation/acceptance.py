"""`calotype adapters accept`: the acceptance set of an adapter, measured on this machine."""

from __future__ import annotations

import os
import pathlib
import sys
from typing import TYPE_CHECKING

import click

from calotype.serving.core.errors import InvalidRequest

if TYPE_CHECKING:
    from calotype.serving.acceptance.report import Report
    from calotype.serving.config.model.acceptance import Acceptance

FAILED = 1
"""Exit code of a candidate that did not pass."""


@click.command()
@click.argument("file", type=click.Path(path_type=pathlib.Path))
@click.option("--model", default="shapes", show_default=True, help="shapes, or a FLUX.2 folder.")
@click.option(
    "--dataset", required=True, metavar="FOLDER",
    help="The pictures that it was trained on: a folder, an archive or s3://bucket/prefix.",
)  # fmt: skip
@click.option("--trigger", required=True, help="The word that evokes it.")
@click.option("--name", help="What it is to be called.  [default: the name of the file]")
@click.option(
    "--spec", type=click.Path(path_type=pathlib.Path, dir_okay=False),
    help="YAML or JSON file with prompts and thresholds, as spec.acceptance of a LoRAAdapter.",
)  # fmt: skip
@click.option("--scale", type=click.FloatRange(-10, 10), default=1.0, show_default=True)
@click.option(
    "--against", type=click.Path(path_type=pathlib.Path, dir_okay=False),
    help="JSON report of the revision that it replaces, for comparison.",
)  # fmt: skip
@click.option(
    "--embedder", type=click.Path(path_type=pathlib.Path, file_okay=False),
    help="Folder of a CLIP or SigLIP model, which judges pictures of other models than shapes.",
)  # fmt: skip
@click.option(
    "--html", type=click.Path(path_type=pathlib.Path, dir_okay=False),
    help="Write the report with its pictures here.",
)  # fmt: skip
@click.option(
    "--json", "json_file", type=click.Path(path_type=pathlib.Path, dir_okay=False),
    help="Write the report for programs here.",
)  # fmt: skip
@click.option("--threads", type=click.IntRange(1, 256), help="Torch threads.")
def accept(
    file: pathlib.Path,
    model: str,
    dataset: str,
    trigger: str,
    name: str | None,
    spec: pathlib.Path | None,
    scale: float,
    against: pathlib.Path | None,
    embedder: pathlib.Path | None,
    html: pathlib.Path | None,
    json_file: pathlib.Path | None,
    threads: int | None,
) -> None:
    """Draw the acceptance set of the adapter FILE and say whether it may serve.

    Ends with 0 when it passes, with 1 when a gate refuses it.
    """
    from calotype.moderation.moderator import Moderator
    from calotype.serving.acceptance.embedding_judge import VisionTower
    from calotype.serving.acceptance.gate import (
        Candidate,
        accept_adapter,
        file_sha256,
        training_pictures,
    )
    from calotype.serving.config import local_model

    acceptance, before = _acceptance(spec), _report(against)
    resource, moderator, digest = local_model(model), Moderator.load(), file_sha256(file)
    pictures = training_pictures(dataset, resource, moderator)
    candidate = Candidate(name or file.stem, digest, trigger, tuple(pictures))
    with click.progressbar(
        length=3 * acceptance.pictures, label="Drawing", file=sys.stderr, show_eta=True
    ) as bar:
        accepted = accept_adapter(
            *(file, candidate, resource, acceptance),
            moderator=moderator,
            embedding=None if embedder is None else VisionTower(embedder),
            scale=scale,
            replaces=before,
            threads=threads,
            on_picture=lambda: bar.update(1),
        )
    report = accepted.report
    if html is not None:
        _write(html, accepted.html(), "--html")
    if json_file is not None:
        _write(json_file, report.to_json(), "--json")
    for gate in report.gates:
        mark = "passed" if gate.passed else "REFUSED"
        click.echo(
            f"{gate.name:<13} mean {gate.score:6.3f}  lower bound {gate.lower_bound:6.3f}  "
            f"threshold {gate.threshold:5.2f}  {mark}"
        )
    for reason in report.reasons:
        click.echo(reason, err=True)
    click.echo(f"{report.name} {report.sha256[:12]}: {report.outcome}")
    if not report.passed:
        raise click.exceptions.Exit(FAILED)


@click.command()
@click.argument("name")
@click.option(
    "--data-dir", type=click.Path(path_type=pathlib.Path, file_okay=False),
    default=pathlib.Path(os.environ.get("CALOTYPE_DATA_DIR", "calotype-data")), show_default=True,
    help="Data folder of the service (or CALOTYPE_DATA_DIR).",
)  # fmt: skip
def rollback(name: str, data_dir: pathlib.Path) -> None:
    """Let the revision of the adapter NAME serve that served before the present one.

    A running service takes it within seconds. Typed again it goes back to the revision before that.
    """
    from calotype.serving.weights.shelf import FOLDER, Shelf

    click.echo(f"{name} serves with {Shelf(data_dir / FOLDER).rollback(name)}")


def _acceptance(path: pathlib.Path | None) -> Acceptance:
    import yaml
    from pydantic import ValidationError

    from calotype.serving.config import describe
    from calotype.serving.config.model.acceptance import Acceptance

    if path is None:
        return Acceptance()
    try:
        return Acceptance.model_validate(yaml.safe_load(_read(path, "--spec")) or {})
    except yaml.YAMLError as error:
        raise InvalidRequest(f"--spec {path} is no YAML: {error}.", param="spec") from None
    except ValidationError as error:
        raise InvalidRequest(f"--spec {path}: {describe(error)}", param="spec") from None


def _report(path: pathlib.Path | None) -> Report | None:
    from pydantic import ValidationError

    from calotype.serving.acceptance.report import Report

    if path is None:
        return None
    try:
        return Report.model_validate_json(_read(path, "--against"))
    except ValidationError:
        raise InvalidRequest(
            f"--against {path} is no report: give a file that --json has written.", param="against"
        ) from None


def _read(path: pathlib.Path, option: str) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{option} {path} cannot be read: {error}.") from None


def _write(path: pathlib.Path, text: str, option: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise InvalidRequest(f"{option} {path} cannot be written: {error.strerror}.") from None
