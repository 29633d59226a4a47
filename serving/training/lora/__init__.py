"""Trains a LoRA adapter: validate, cache, train, and what the run tells on its way."""
