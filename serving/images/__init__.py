"""Image files: encoding, provenance marks, recipe metadata, sealing."""
