"""The tables of what people decide: cases, held images, takedowns, and the log of their deeds."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    String,
    Table,
    Text,
)

from calotype.serving.database.schema.tables import metadata

__all__ = [
    "audit_heads",
    "cases",
    "held_images",
    "image_index",
    "metadata",
    "people_log",
    "picture_places",
    "refusals",
    "taken_down",
]

cases = Table(
    "cases",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("team_id", String(64), ForeignKey("teams.id"), nullable=False),
    # A decision that is appealed against, or an asset that is reported or held.
    Column("subject", String(64), nullable=False),
    # The team whose request or picture it is about: nobody of it decides. NULL = unknown.
    Column("owner_team_id", String(64)),
    Column("reason", Text, nullable=False),
    Column("status", String(16), nullable=False),
    Column("created", Float, nullable=False),
    # The reviewer that works on it, until then.
    Column("held_by", String(255)),
    Column("held_until", Float),
    Column("note", Text),
    Column("decided", Float),
    Index("ix_cases_status_created", "status", "created"),
    Index("ix_cases_team_id_subject", "team_id", "subject"),
)

# Decisions that refused something of a team: what its appeals may be about.
refusals = Table(
    "refusals",
    metadata,
    Column("team_id", String(64), ForeignKey("teams.id"), primary_key=True),
    Column("decision_id", String(64), primary_key=True),
    Column("job_id", String(64), nullable=False, index=True),
    Column("created", Float, nullable=False),
)

# Where the bytes of a picture went besides its asset: see `review.picture_places`.
picture_places = Table(
    "picture_places",
    metadata,
    # Of the picture's file.
    Column("sha256", String(64), primary_key=True),
    Column("kind", String(16), primary_key=True),
    # A job or a file.
    Column("holder", String(64), primary_key=True, index=True),
    # Which picture of the job it is.
    Column("position", Integer, primary_key=True),
)

held_images = Table(
    "held_pictures",
    metadata,
    # The id that the image will have as an asset.
    Column("asset_id", String(64), primary_key=True),
    Column("case_id", String(64), ForeignKey("cases.id"), nullable=False),
    # Of a job that may be forgotten before anybody decides.
    Column("job_id", String(64), nullable=False),
    Column("team_id", String(64), ForeignKey("teams.id"), nullable=False),
    Column("position", Integer, nullable=False),
    # The sealed file, and the key to it: when the row goes, nobody can read the file again.
    Column("blob_key", String(512), nullable=False, index=True),
    Column("seal", String(64), nullable=False),
    Column("content_type", String(64), nullable=False),
    Column("width", Integer, nullable=False),
    Column("height", Integer, nullable=False),
    Column("seed", BigInteger, nullable=False),
    # Of the file itself.
    Column("sha256", String(64), nullable=False),
    Column("created", Float, nullable=False),
    Column("expires", Float, nullable=False, index=True),
)

# How long audit logs were at moments, and the hash of their last line: see `review.audit_heads`.
audit_heads = Table(
    "audit_heads",
    metadata,
    Column("log", String(255), primary_key=True),
    Column("lines", BigInteger, primary_key=True, autoincrement=False),
    Column("hash", String(64), nullable=False),
    Column("time", Float, nullable=False),
    # Ed25519, by a key that no writer of a log has; NULL = not signed yet.
    Column("signature", String(128), index=True),
    Column("key", String(64)),
    # The model whose moderators write the log; NULL = the service's own.
    Column("model", String(255)),
)

# What people did in the safety stage's name: each row holds the hash of the one before.
people_log = Table(
    "people_log",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("time", Float, nullable=False),
    Column("actor", String(64), nullable=False),
    Column("action", String(64), nullable=False),
    Column("subject", String(128), nullable=False),
    Column("details", JSON(none_as_null=True), nullable=False),
    Column("previous", String(64), nullable=False),
    Column("hash", String(64), nullable=False),
)

# Images that must not come again: by PDQ, and by the payload that an exact copy would carry.
taken_down = Table(
    "taken_down",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("pdq", String(64)),
    Column("payload", String(12)),
    Column("category", String(64), nullable=False),
    Column("reason", Text, nullable=False),
    Column("actor", String(64), nullable=False),
    Column("created", Float, nullable=False),
    # Whose it was: nobody of these teams lets it come again.
    Column("team_ids", JSON(none_as_null=True)),
    # Grows with each takedown; of the row in the log of what people do. NULL in old rows.
    Column("number", Integer),
    # When no copy could be on its way to the store any more, and all were searched.
    Column("settled", Float),
)

# What stored images are recognised by; NULL where they have no such mark.
image_index = Table(
    "picture_index",
    metadata,
    Column("asset_id", String(64), ForeignKey("assets.id", ondelete="CASCADE"), primary_key=True),
    Column("pdq", String(64)),
    Column("payload", String(12), index=True),
)
