"""What a model needs, computed from its configuration; imports no torch."""
