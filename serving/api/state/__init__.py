"""What the gateway knows while it runs: settings, catalog, estimates, open connections."""
