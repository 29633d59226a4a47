"""Second implementations of the Protocols, and tiny models, for tests."""
