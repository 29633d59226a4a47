"""`calotype moderation export`: an account of a period, for a regulator."""

from __future__ import annotations

import datetime
import getpass
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import click

from calotype.serving.core.errors import InvalidRequest

if TYPE_CHECKING:
    from calotype.moderation.records.export import Summary

DAY = click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"])


@click.command()
@click.argument("logs", type=click.Path(path_type=pathlib.Path, file_okay=False, exists=True))
@click.option("--from", "since", required=True, type=DAY, help="First day, in UTC.")
@click.option("--to", "until", required=True, type=DAY, help="Last day, all of it, or a moment.")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=pathlib.Path, file_okay=False),
    help="New folder for the account.",
)  # fmt: skip
@click.option(
    "--policy", "policies", multiple=True, type=click.Path(path_type=pathlib.Path, dir_okay=False),
    help="A policy's file, to be put in if decisions were made under it; may be repeated.",
)  # fmt: skip
@click.option(
    "--key", "trusted_keys", multiple=True,
    help="Public key that signs heads of audit logs, as for audit verify; may be repeated.",
)  # fmt: skip
@click.option(
    "--unseal", is_flag=True,
    help="Prompts in clear, where the policy kept copies. Who opened them is on record.",
)  # fmt: skip
def export(
    logs: pathlib.Path,
    since: datetime.datetime,
    until: datetime.datetime,
    output: pathlib.Path,
    policies: tuple[pathlib.Path, ...],
    trusted_keys: tuple[str, ...],
    unseal: bool,
) -> None:
    """Write an account of what the safety stage did: decisions, people's deeds, policies, proof.

    LOGS is the audit folder of the service, DATA_DIR/audit. The log of what reviewers did is read
    from the database beside it, or from CALOTYPE_DATABASE_URL.
    """
    from calotype.moderation.policy.policy import Policy
    from calotype.moderation.records.export import Period, write
    from calotype.serving.commands.safety.open_records import open_records
    from calotype.serving.config.environment import DATA_DIR
    from calotype.serving.images.provenance import installation_keys

    whole_day = until.time() == datetime.time() and since.time() == datetime.time()
    end = until + datetime.timedelta(days=1) if whole_day else until
    period = Period(_seconds(since), _seconds(end))
    if period.until <= period.since:
        raise InvalidRequest("--to must not be before --from.")
    keys = installation_keys(dict(os.environ) | {DATA_DIR: str(logs.parent)}, make=False)
    known = [Policy.packaged("default"), Policy.packaged("floor"), *map(Policy.load, policies)]
    with open_records(logs.parent) as records, _unsealing(logs, unseal) as opener:
        if records.database is None:
            click.echo(f"{logs.parent} has no database: what reviewers did is left out.", err=True)
        heads = records.heads(trusted_keys)
        summary = write(
            output,
            logs,
            period,
            heads=heads,
            reviewer_actions=records.actions(heads),
            policies=known,
            signer=None if keys is None else keys.signer(),
            unseal=opener,
        )
    click.echo(f"{output}: {_line(summary)}")
    if keys is None:
        click.echo("It is not signed: the data folder has no keys yet.", err=True)


@click.command("check-export")
@click.argument("folder", type=click.Path(path_type=pathlib.Path, file_okay=False, exists=True))
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def check_export(folder: pathlib.Path, as_json: bool) -> None:
    """Check that an account is as it was written: signature, files and chains of hashes."""
    from calotype.moderation.records.export import SIGNATURE, check

    try:
        summary = check(folder)
    except OSError as error:
        raise InvalidRequest(f"{error.filename} cannot be read: {error.strerror}.") from None
    if as_json:
        click.echo(json.dumps(summary.model_dump(mode="json"), indent=2))
        return
    signed = "the signature fits" if (folder / SIGNATURE).exists() else "it is not signed"
    click.echo(f"{folder}: {_line(summary)}; {signed}, the chains are whole.")


def _line(summary: Summary) -> str:
    refused = sum(summary.verdict.get(name, 0) for name in ("BLOCK", "ERROR", "REVIEW"))
    policies = ", ".join(sorted({found.policy for found in summary.policies})) or "none"
    return f"{summary.decisions} decisions, {refused} not served, under {policies}"


def _seconds(moment: datetime.datetime) -> float:
    return moment.replace(tzinfo=datetime.UTC).timestamp()


def _unsealing(
    logs: pathlib.Path, unseal: bool
) -> AbstractContextManager[Callable[[str], str | None] | None]:
    return _opener(logs) if unseal else nullcontext()


@contextmanager
def _opener(logs: pathlib.Path) -> Iterator[Callable[[str], str | None]]:
    """Opens prompts, each written down before it is given out."""
    from calotype.moderation.errors import AuditError
    from calotype.moderation.records.audit import AuditLog
    from calotype.moderation.records.vault import PromptVault

    vault = PromptVault(logs / "prompts", "reader")
    opened = AuditLog(logs / "opened" / "audit.jsonl")

    def unseal(decision: str) -> str | None:
        try:
            prompt = vault.read(decision)
        except AuditError:
            return None
        opened.append({"id": decision, "stage": "exported", "verdict": getpass.getuser()})
        return prompt

    try:
        yield unseal
    finally:
        opened.close()
