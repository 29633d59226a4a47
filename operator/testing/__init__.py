"""A fake API server and fake model apps, with faults."""
