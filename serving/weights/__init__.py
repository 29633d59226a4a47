"""Weights on disk: resolving a source, fetching it onto a volume, checking it."""
