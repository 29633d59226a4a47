"""What was decided, kept: audit log, vault, export."""
