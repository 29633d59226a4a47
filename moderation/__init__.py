"""calotype.moderation: judges every prompt and every picture. Imports nothing of serving."""
