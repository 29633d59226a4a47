"""Marks that say that an image was generated."""
