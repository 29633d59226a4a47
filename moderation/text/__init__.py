"""Checking prompts: views of a text, term lists, classifiers, guard models."""
