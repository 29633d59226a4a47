"""Pure decisions: what a status says, which adapters and policies apply."""
