"""The Kubernetes API: client, kinds, names and labels."""
