"""The Ray Serve deployments: dispatcher, moderator, text encoder, generator, ingress."""
