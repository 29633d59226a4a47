"""calotype.moderation: checks every prompt and every image. Imports nothing of serving.

`moderator.Moderator` is the public class, `policy.policy.Policy` its configuration and
`decision.Decision` its result. This module imports nothing, so that reading a policy stays cheap.
"""
