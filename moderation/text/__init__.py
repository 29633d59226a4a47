"""Judging prompts: readings of a text, term lists, classifiers."""
