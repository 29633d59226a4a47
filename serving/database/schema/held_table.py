"""The table of images that wait for a person."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Float, ForeignKey, Integer, String, Table

from calotype.serving.database.schema.tables import metadata

__all__ = ["held_images", "metadata"]

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
