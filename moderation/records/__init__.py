"""Records of decisions: audit log, prompt vault, export."""
