"""Commands of `calotype` by purpose; `calotype.serving.commands.cli` puts them together."""
