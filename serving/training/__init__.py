"""How the embedded model and its example adapter were made."""
