"""Teams, API keys, quotas and usage."""
