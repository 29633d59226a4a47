"""Runs the steps that the scheduler chose: admission, forward pass, decoding."""
