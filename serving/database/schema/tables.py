"""The tables of the job database, in SQLAlchemy Core.

Times are seconds since the epoch. Changing a table here needs a migration in ``migrations/``; a
test compares the two.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
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
    # Limits; NULL is none.
    Column("requests_per_minute", Integer),
    Column("concurrent_jobs", Integer),
    Column("gpu_seconds_per_day", Float),
    Column("budget_per_month", Float),
    _json("allowed_models"),
    Column("policy", String(255)),
    Column("prompt_in_files", Boolean, nullable=False),
    # The bucket of requests_per_minute: how full it was, and when.
    Column("bucket_tokens", Float),
    Column("bucket_time", Float),
    # The Team object that it belongs to; NULL for one that an administrator made.
    Column("namespace", String(255)),
    Column("uid", String(64)),
    # Signs the webhooks that a job itself names; made at first use.
    Column("webhook_secret", String(128)),
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
    # After a rotation the old key works until then.
    Column("expires", Float),
    # Declared by a manifest, which also takes it away again.
    Column("declared", Boolean, nullable=False),
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
    # What it waits for, or waited for last, because a part that it needs was away.
    _json("outage"),
    # Device time that its last lease has measured so far.
    Column("gpu_seconds", Float, nullable=False, server_default="0"),
    Column("body_sha256", String(64)),
    # Hash of (API key, route, Idempotency-Key); unique, so that two racing requests make one job.
    Column("idempotency", String(64), unique=True),
    # Canonical JSON of all that decides the image, and its sha256.
    _json("recipe"),
    Column("recipe_hash", String(64)),
    # Predicted device seconds, reserved from the team's day until the job is over.
    Column("reserved_seconds", Float, nullable=False),
    Column("reserved_day", String(10)),
    # What one device second of it costs.
    Column("price", Float, nullable=False),
    # When the job was said to be over at the latest.
    Column("promised", Float),
    # {"url", "events"} of the job's own webhook.
    _json("webhook"),
    Column("batch_id", String(64)),
    # When prompt and images were removed.
    Column("purged", Float),
    Index("ix_jobs_status_model", "status", "model"),
    Index("ix_jobs_status_created", "status", "created"),
    Index("ix_jobs_team_id_status", "team_id", "status"),
    Index("ix_jobs_expires", "expires"),
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
    Index("ix_assets_blob_key", "blob_key"),
)

service_secrets = Table(
    "service_secrets",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("value", LargeBinary, nullable=False),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("job_id", String(64), ForeignKey("jobs.id"), primary_key=True),
    Column("fence", Integer, nullable=False),
    Column("step", Integer, nullable=False),
    Column("blob_key", String(512), nullable=False),
)

previews = Table(
    "previews",
    metadata,
    Column("job_id", String(64), ForeignKey("jobs.id"), primary_key=True),
    Column("image_index", Integer, primary_key=True),
    Column("partial_index", Integer, primary_key=True),
    Column("fence", Integer, nullable=False),
    Column("step", Integer, nullable=False),
    Column("blob_key", String(512), nullable=False),
    Column("content_type", String(64), nullable=False),
)

# One row a model: what the dispatcher thinks of the time to come.
forecasts = Table(
    "forecasts",
    metadata,
    Column("model", String(255), primary_key=True),
    Column("updated", Float, nullable=False),
    _json("figures", nullable=False),
)

# What a team has taken of its quota on one day (UTC): reserved by open jobs, used by ended ones.
team_days = Table(
    "team_days",
    metadata,
    Column("team_id", String(64), ForeignKey("teams.id"), primary_key=True),
    Column("day", String(10), primary_key=True),
    Column("reserved_seconds", Float, nullable=False),
    Column("used_seconds", Float, nullable=False),
    Column("used_cost", Float, nullable=False),
)

# Append-only: one row for every job that ended.
usage_records = Table(
    "usage_records",
    metadata,
    Column("job_id", String(64), primary_key=True),
    Column("team_id", String(64), ForeignKey("teams.id"), nullable=False),
    Column("api_key_id", String(64)),
    Column("model", String(255), nullable=False),
    Column("adapters", String(512), nullable=False),
    Column("time", Float, nullable=False),
    Column("day", String(10), nullable=False),
    Column("status", String(16), nullable=False),
    Column("images", Integer, nullable=False),
    Column("megapixels", Float, nullable=False),
    Column("gpu_seconds", Float, nullable=False),
    Column("cost", Float, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("promise_kept", Boolean),
    Index("ix_usage_records_team_id_day", "team_id", "day"),
    Index("ix_usage_records_day", "day"),
)

webhook_endpoints = Table(
    "webhook_endpoints",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("team_id", String(64), ForeignKey("teams.id"), nullable=False, index=True),
    Column("name", String(255), nullable=False),
    Column("url", String(2048), nullable=False),
    _json("event_types", nullable=False),
    Column("secret", String(128), nullable=False),
    # After a rotation both secrets sign until then.
    Column("old_secret", String(128)),
    Column("old_secret_expires", Float),
    Column("disabled", Float),
    Column("disabled_reason", String(512)),
    Column("created", Float, nullable=False),
    Column("updated", Float, nullable=False),
)

webhook_deliveries = Table(
    "webhook_deliveries",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("team_id", String(64), ForeignKey("teams.id"), nullable=False),
    # NULL: the job's own webhook.
    Column("endpoint_id", String(64)),
    Column("job_id", String(64)),
    Column("event_type", String(64), nullable=False),
    Column("url", String(2048), nullable=False),
    # Written at the first attempt and the same at every one.
    Column("body", Text),
    Column("status", String(16), nullable=False),
    Column("attempts", Integer, nullable=False),
    # When the next attempt is due; while one runs, when it counts as lost.
    Column("due", Float),
    Column("created", Float, nullable=False),
    Column("completed", Float),
    Index("ix_webhook_deliveries_status_due", "status", "due"),
    Index("ix_webhook_deliveries_team_id_created", "team_id", "created"),
)

webhook_attempts = Table(
    "webhook_attempts",
    metadata,
    Column("delivery_id", String(64), ForeignKey("webhook_deliveries.id"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("time", Float, nullable=False),
    Column("seconds", Float, nullable=False),
    Column("http_status", Integer),
    Column("error", String(512)),
)

files = Table(
    "files",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("team_id", String(64), ForeignKey("teams.id"), nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("filename", String(255), nullable=False),
    Column("content_type", String(64), nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("blob_key", String(512), nullable=False, index=True),
    Column("created", Float, nullable=False),
    Column("expires", Float, index=True),
    Index("ix_files_team_id_created", "team_id", "created"),
)

batches = Table(
    "batches",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("team_id", String(64), ForeignKey("teams.id"), nullable=False),
    Column("api_key_id", String(64), nullable=False),
    Column("endpoint", String(64), nullable=False),
    Column("input_file_id", String(64), nullable=False),
    Column("output_file_id", String(64)),
    Column("error_file_id", String(64)),
    Column("status", String(16), nullable=False),
    _json("metadata", nullable=False),
    _json("errors"),
    Column("created", Float, nullable=False),
    # Name of a moment -> when it was: in_progress, finalizing, completed, failed, canceling ...
    _json("moments", nullable=False),
    Column("deadline", Float, nullable=False),
    # The gateway that works on it, until then.
    Column("claimed_until", Float),
    Index("ix_batches_status", "status"),
    Index("ix_batches_team_id_created", "team_id", "created"),
)

batch_lines = Table(
    "batch_lines",
    metadata,
    Column("batch_id", String(64), ForeignKey("batches.id"), primary_key=True),
    Column("line", Integer, primary_key=True),
    Column("custom_id", String(512), nullable=False),
    _json("body", nullable=False),
    Column("job_id", String(64)),
    # The answer of a line that is over: {"status_code", "body"}.
    _json("answer"),
)

# Blobs whose last reference went, and when; removed for good after a while.
blob_garbage = Table(
    "blob_garbage",
    metadata,
    Column("blob_key", String(512), primary_key=True),
    Column("since", Float, nullable=False, index=True),
)
