"""The tables of the job database, in SQLAlchemy Core.

Times are seconds since the epoch. Changing a table here needs a migration in ``migrations/``; a
test compares the two.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _json(name: str, *, nullable: bool = True) -> Column[object]:
    return Column(name, JSON(none_as_null=True), nullable=nullable)


teams = Table(
    "teams",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", String(255), nullable=False, unique=True),
    Column("weight", Float, nullable=False),
    Column("created", Float, nullable=False),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("team_id", String(64), ForeignKey("teams.id"), nullable=False, index=True),
    Column("name", String(255), nullable=False),
    Column("prefix", String(32), nullable=False),
    # sha256 of the key; the key itself is shown once and kept nowhere.
    Column("digest", String(64), nullable=False, unique=True),
    _json("scopes", nullable=False),
    Column("created", Float, nullable=False),
    Column("revoked", Float),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("team_id", String(64), ForeignKey("teams.id"), nullable=False),
    Column("api_key_id", String(64), ForeignKey("api_keys.id")),
    Column("type", String(32), nullable=False),
    Column("model", String(255), nullable=False),
    Column("status", String(16), nullable=False),
    _json("input", nullable=False),
    _json("request", nullable=False),
    _json("metadata", nullable=False),
    Column("priority", Integer, nullable=False),
    Column("fence", Integer, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("step", Integer, nullable=False),
    Column("steps", Integer, nullable=False),
    Column("created", Float, nullable=False),
    Column("started", Float),
    Column("completed", Float),
    Column("deadline", Float),
    Column("expires", Float),
    Column("lease_replica", String(255)),
    Column("lease_expires", Float),
    _json("error"),
    _json("output"),
    _json("moderation"),
    _json("usage"),
    _json("metrics"),
    Column("body_sha256", String(64)),
    # Hash of (API key, route, Idempotency-Key); unique, so that two racing requests make one job.
    Column("idempotency", String(64), unique=True),
    Index("ix_jobs_status_model", "status", "model"),
    Index("ix_jobs_team_id_created", "team_id", "created"),
    Index("ix_jobs_api_key_id_body_sha256", "api_key_id", "body_sha256"),
)

assets = Table(
    "assets",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("job_id", String(64), ForeignKey("jobs.id"), nullable=False, index=True),
    Column("team_id", String(64), ForeignKey("teams.id"), nullable=False),
    Column("blob_key", String(512), nullable=False),
    Column("content_type", String(64), nullable=False),
    Column("width", Integer, nullable=False),
    Column("height", Integer, nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("created", Float, nullable=False),
    Column("expires", Float, index=True),
)

service_secrets = Table(
    "service_secrets",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("value", LargeBinary, nullable=False),
)
