"""The command `calotype`.

Thin: each command reads its options, calls one function and prints. Heavy libraries are imported
inside the commands that need them, so that ``calotype --help`` answers at once.
"""

from __future__ import annotations

import sys

import click

from calotype.serving.commands.cluster import gateway, model_app
from calotype.serving.commands.customisation.adapters import adapters
from calotype.serving.commands.customisation.dataset import dataset
from calotype.serving.commands.customisation.merge import merge
from calotype.serving.commands.customisation.rights import rights
from calotype.serving.commands.customisation.train import train
from calotype.serving.commands.fetch import fetch
from calotype.serving.commands.generate import generate
from calotype.serving.commands.jobs import jobs
from calotype.serving.commands.keys import keys
from calotype.serving.commands.plan import plan
from calotype.serving.commands.profiling import profile
from calotype.serving.commands.provenance import provenance
from calotype.serving.commands.safety.moderation import moderate, moderation
from calotype.serving.commands.serve import serve
from calotype.serving.core.errors import CalotypeError


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Try: calotype generate 'a red circle on a blue background' -o circle.png",
)
@click.version_option(package_name="calotype")
def cli() -> None:
    """Image generation with FLUX.2 that you run yourself, behind the API of OpenAI's SDKs."""


for _command in (
    *(serve, generate, train, adapters, merge, plan, profile),
    *(jobs, keys, moderate, moderation, provenance),
    *(dataset, rights, gateway, model_app, fetch),
):
    cli.add_command(_command)


def main() -> None:
    """Runs the command; an error is one sentence and exit code 2, an interrupt 130."""
    from calotype.moderation.errors import ModerationError

    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("Interrupted.", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (CalotypeError, ModerationError) as error:
        click.echo(f"calotype: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        click.echo("Interrupted.", err=True)
        sys.exit(130)
