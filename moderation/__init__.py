"""calotype.moderation: judges every prompt and every picture. Imports nothing of serving.

`moderator.Moderator` is the entrance, `policy.Policy` what it goes by, `decision.Decision` what it
says. Import those modules by name: this one imports nothing, so that reading a policy stays cheap.
"""
