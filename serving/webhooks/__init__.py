"""Webhooks on their way to customers, and requests to addresses that customers chose."""
