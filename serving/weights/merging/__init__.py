"""Merging of models and of adapters, by recipe."""
