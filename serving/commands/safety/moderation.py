"""`calotype moderate` and `calotype moderation`: ask the safety stage, measure it, look it over."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import click

from calotype.serving.commands.safety.audit import audit
from calotype.serving.commands.safety.export import export
from calotype.serving.commands.safety.review import appeal, report, review
from calotype.serving.commands.safety.shadow import shadow
from calotype.serving.commands.safety.takedown import takedown
from calotype.serving.core.errors import InvalidRequest

policy_option = click.option(
    "--policy", type=click.Path(path_type=pathlib.Path, dir_okay=False), help="A policy file."
)


@click.command()
@click.argument("text", required=False)
@click.option(
    "--image", type=click.Path(path_type=pathlib.Path, dir_okay=False), help="Check a picture."
)
@policy_option
def moderate(text: str | None, image: pathlib.Path | None, policy: pathlib.Path | None) -> None:
    """Check TEXT or a picture; print the decision as JSON."""
    if (text is None) == (image is None):
        raise InvalidRequest("Give either a text or --image FILE.")
    moderator = _moderator(policy)
    if image is not None:
        from calotype.moderation.images.decode import decode_image

        try:
            views = decode_image(image.read_bytes(), str(image))
        except OSError as error:
            raise InvalidRequest(f"{image} cannot be read: {error.strerror}.") from None
        # Transparent and animated pictures look several ways: the worst counts.
        decision = max(map(moderator.check_image, views), key=lambda found: found.verdict.severity)
    else:
        decision = moderator.check_prompt(text or "")
    click.echo(json.dumps(decision.to_payload(), indent=2))


@click.group()
def moderation() -> None:
    """Look after the safety stage."""


moderation.add_command(appeal)
moderation.add_command(audit)
moderation.add_command(export)
moderation.add_command(report)
moderation.add_command(review)
moderation.add_command(takedown)
moderation.add_command(shadow)


@moderation.command()
@click.option(
    "--dataset", required=True, type=click.Path(path_type=pathlib.Path, dir_okay=False),
    help="CSV with the columns text,label; 'benign' is the label of what must pass.",
)  # fmt: skip
@click.option(
    "--evasions", is_flag=True,
    help="Also write what was refused in twelve disguises, and count what is refused still.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@policy_option
def evaluate(
    dataset: pathlib.Path, evasions: bool, as_json: bool, policy: pathlib.Path | None
) -> None:
    """Measure block rates on labelled prompts, with 95 % bootstrap intervals.

    A column ``language`` in the data adds a table per language.
    """
    from calotype.moderation.evaluation.evaluation import evaluate as measure

    with click.progressbar(length=1, label="Checking", file=sys.stderr, show_eta=True) as bar:

        def progress(done: int, rows: int) -> None:
            bar.length = rows
            bar.update(done - bar.pos)

        report = measure(dataset, _moderator(policy), progress, evasions=evasions)
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2))
        return
    for line in report.lines():
        click.echo(line)


@moderation.command()
@click.argument("logs", type=click.Path(path_type=pathlib.Path, exists=True))
@click.option(
    "--policy", required=True, type=click.Path(path_type=pathlib.Path, dir_okay=False),
    help="The policy to try.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def replay(logs: pathlib.Path, policy: pathlib.Path, as_json: bool) -> None:
    """Check logged decisions again under another policy, before anybody meets it.

    LOGS is an audit log or a folder of them, for example DATA_DIR/audit.
    """
    from calotype.moderation.evaluation.replay import replay as replay_log
    from calotype.moderation.policy.policy import Policy

    found = replay_log(logs, Policy.load(policy))
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
        return
    for line in found.lines():
        click.echo(line)


def _moderator(policy: pathlib.Path | None) -> Any:
    from calotype.moderation.moderator import Moderator
    from calotype.moderation.policy.policy import Policy

    return Moderator.load(Policy.load(policy) if policy is not None else None)
