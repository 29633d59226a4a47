"""ImageModel, and the parts of its spec."""
