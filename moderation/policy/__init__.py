"""Policies, their rules and presets, and the messages of refusals."""
