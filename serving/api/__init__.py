"""HTTP only: the gateway."""
