"""`calotype moderation audit`: the record of every decision, and whether it is whole."""

from __future__ import annotations

import datetime
import getpass
import pathlib
from typing import TYPE_CHECKING

import click

from calotype.serving.commands.safety.export import check_export
from calotype.serving.core.errors import InvalidRequest, NotFound

if TYPE_CHECKING:
    from calotype.moderation.records.heads import Head


@click.group()
def audit() -> None:
    """The record of every decision."""


audit.add_command(check_export)


@audit.command()
@click.argument(
    "logs", nargs=-1, required=True, type=click.Path(path_type=pathlib.Path, exists=True)
)
@click.option(
    "--key", "keys", multiple=True,
    help="Public key that signs heads (calotype moderation audit key prints it); may be repeated. "
    "Default: the one of the data folder, or of CALOTYPE_AUDIT_KEY.",
)  # fmt: skip
@click.option(
    "--since", type=click.DateTime(["%Y-%m-%d"]),
    help="Logs that ended before this day (UTC) may have been removed.",
)  # fmt: skip
def verify(
    logs: tuple[pathlib.Path, ...], keys: tuple[str, ...], since: datetime.datetime | None
) -> None:
    """Check that no line of LOGS was changed, removed, moved or cut off.

    LOGS is one audit log, or the folders with all logs of the service: DATA_DIR/audit, and in a
    cluster the claim of each namespace that has models. With folders also the log of what
    reviewers did is checked, and that none is missing. Signed heads are read from the database and
    the object store, which CALOTYPE_DATABASE_URL and CALOTYPE_BLOB_URL name, or those of the
    data folder.
    """
    from calotype.moderation.records.audit import verify as check
    from calotype.moderation.records.audit import verify_all
    from calotype.serving.commands.safety.open_records import open_records

    folders = [path for path in logs if path.is_dir()]
    if folders and len(folders) < len(logs):
        raise InvalidRequest("Give either logs or folders of logs, not both.")
    with open_records((logs[0] if folders else logs[0].parent).parent) as records:
        heads = records.heads(keys)
        start = 0.0 if since is None else since.replace(tzinfo=datetime.UTC).timestamp()
        found = verify_all(folders, heads, start) if folders else {p: check(p, heads) for p in logs}
        for path, count in found.items():
            click.echo(f"{path}: {count} decisions, the chain is whole{_seen(path.name, heads)}.")
        if folders and records.database is None:
            click.echo("There is no database: what reviewers did is not checked.", err=True)
        elif folders:
            rows = sum(1 for _ in records.actions(heads))
            click.echo(f"people_log: {rows} deeds, the chain is whole{_seen('people_log', heads)}.")


def _seen(name: str, heads: list[Head]) -> str:
    signed = max((head.lines for head in heads if head.log == name), default=0)
    if not signed:
        return "; no head of it was signed yet, so a cut end would not be seen"
    return f", and the first {signed} are as they were signed"


@audit.command()
@click.argument(
    "data_dir", required=False, type=click.Path(path_type=pathlib.Path, file_okay=False)
)
def key(data_dir: pathlib.Path | None) -> None:
    """Print the public key that signs audit logs: of CALOTYPE_AUDIT_KEY, or of DATA_DIR."""
    from calotype.serving.api.background.head_signer import AUDIT_KEY, head_key

    found = head_key(data_dir)
    if found is None:
        raise NotFound(
            f"There is no key: set {AUDIT_KEY}, or name the data folder of a service that has run."
        )
    click.echo(found.public)


@audit.command()
@click.argument("decision")
@click.argument("folder", type=click.Path(path_type=pathlib.Path, file_okay=False, exists=True))
def prompt(decision: str, folder: pathlib.Path) -> None:
    """Open the prompt of DECISION, where the policy keeps encrypted copies.

    FOLDER is the audit folder of the service, DATA_DIR/audit. Whoever opens one is on record.
    """
    from calotype.moderation.records.audit import AuditLog
    from calotype.moderation.records.vault import PromptVault

    text = PromptVault(folder / "prompts", "reader").read(decision)
    opened = AuditLog(folder / "opened" / "audit.jsonl")
    opened.append({"id": decision, "stage": "opened", "verdict": getpass.getuser()})
    opened.close()
    click.echo(text)
