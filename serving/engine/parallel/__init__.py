"""One image on several devices."""
