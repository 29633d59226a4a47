"""How the embedded model's control branch was made, and how well it obeys."""
