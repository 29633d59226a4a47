"""calotype.serving: from a request to pictures."""
