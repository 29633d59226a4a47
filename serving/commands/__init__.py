"""Commands of `calotype` by purpose; `calotype.serving.cli` puts them together."""
