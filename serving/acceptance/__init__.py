"""The gate: a new adapter or model revision serves only after its acceptance set."""
