"""What a gateway does between requests: batches, webhooks, removal of what expired."""
