"""A command can say how it was typed, so that it can be typed again."""

from __future__ import annotations

import click
from click.testing import CliRunner

from calotype.serving.commands.service_options import typed_command


@click.group()
def tool() -> None:
    """As `calotype`."""


@tool.command()
@click.argument("source")
@click.option("-o", "--output")
@click.option("--word", multiple=True)
@click.option("--flag", is_flag=True)
@click.option("--size", default=3)
def make(source: str, output: str, word: tuple[str, ...], flag: bool, size: int) -> None:
    click.echo(typed_command())


def test_options_that_were_not_given_are_not_said() -> None:
    typed = ["make", "a folder", "-o", "x.bin", "--word", "a", "--word", "b c", "--flag"]
    done = CliRunner().invoke(tool, typed, prog_name="python -m tool")
    assert done.output == ("calotype make 'a folder' --output x.bin --word a --word 'b c' --flag\n")
    assert CliRunner().invoke(tool, ["make", "x"]).output == "calotype make x\n"
