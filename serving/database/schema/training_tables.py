"""The tables of training: data sets, where adapters come from, and consent that was taken back."""

from __future__ import annotations

from sqlalchemy import JSON, Column, Float, ForeignKey, Index, Integer, String, Table, Text

from calotype.serving.database.schema.review_tables import metadata

__all__ = [
    "adapter_draws",
    "adapter_origins",
    "datasets",
    "metadata",
    "revocations",
    "trained_adapters",
    "training_events",
    "trainings",
]

datasets = Table(
    "datasets",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("team_id", String(64), ForeignKey("teams.id"), nullable=False),
    Column("name", String(255), nullable=False),
    # The archive, a row of `files`.
    Column("file_id", String(64), nullable=False),
    Column("sha256", String(64), nullable=False),
    # What was asked of it: resolution, trigger, rights ...
    Column("settings", JSON(none_as_null=True), nullable=False),
    Column("status", String(16), nullable=False),
    # `DatasetReport.to_payload`, when it was checked.
    Column("report", JSON(none_as_null=True)),
    # `CalotypeError.to_payload`, where it could not even be read.
    Column("error", JSON(none_as_null=True)),
    Column("created", Float, nullable=False),
    Column("checked", Float),
    # The gateway that checks it, until then.
    Column("claimed_until", Float),
    Index("ix_datasets_team_id_created", "team_id", "created"),
    Index("ix_datasets_status", "status"),
)

# Adapters whose origins are known.
trained_adapters = Table(
    "trained_adapters",
    metadata,
    # As recipes name it, for example sha256:...
    Column("digest", String(255), primary_key=True),
    Column("name", String(255), nullable=False),
    # Of all that was learnt: `DatasetReport.digest`.
    Column("dataset_digest", String(64), nullable=False),
    # The command that trained it; NULL = not told.
    Column("command", Text),
    Column("created", Float, nullable=False),
)

# One row for each picture that an adapter learnt from.
adapter_origins = Table(
    "adapter_origins",
    metadata,
    Column("adapter_digest", String(255), ForeignKey("trained_adapters.digest"), primary_key=True),
    # Of the picture's file.
    Column("picture_sha256", String(64), primary_key=True, index=True),
    # `config.rights.Rights`; NULL = none was recorded.
    Column("rights", JSON(none_as_null=True)),
)

# Which jobs are drawn with which adapters: written when a job is made, from its recipe.
adapter_draws = Table(
    "adapter_draws",
    metadata,
    Column("adapter_digest", String(255), primary_key=True),
    Column("job_id", String(64), primary_key=True, index=True),
)

# Pictures whose consent was taken back. What was learnt and drawn from them follows by the tables
# above, so that one row quarantines all of it at once, also what is drawn just now.
revocations = Table(
    "revocations",
    metadata,
    Column("picture_sha256", String(64), primary_key=True),
    Column("reason", Text, nullable=False),
    Column("actor", String(64), nullable=False),
    Column("created", Float, nullable=False),
)

# Runs of the trainer: a job like a picture's, with a lease and a fence.
trainings = Table(
    "trainings",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("team_id", String(64), ForeignKey("teams.id"), nullable=False),
    Column("api_key_id", String(64), nullable=False),
    Column("model", String(253), nullable=False),
    # Of the adapter to be made.
    Column("name", String(253), nullable=False),
    Column("dataset_id", String(64), nullable=False),
    # What was asked for: preset, steps, trigger, acceptance ...
    Column("settings", JSON(none_as_null=True), nullable=False),
    Column("status", String(16), nullable=False),
    # What its owner wants of the worker: run, suspend or cancel.
    Column("wanted", String(16), nullable=False),
    # The fields of the last events that say how far it is.
    Column("progress", JSON(none_as_null=True), nullable=False),
    Column("checkpoints", JSON(none_as_null=True), nullable=False),
    Column("samples", JSON(none_as_null=True), nullable=False),
    # The report of its acceptance set, `acceptance.Report`.
    Column("acceptance", JSON(none_as_null=True)),
    Column("promoted", Float),
    # Rows of `files`: the finished adapter, and the report of its acceptance set with pictures.
    Column("adapter_file_id", String(64)),
    Column("report_file_id", String(64)),
    Column("adapter_sha256", String(64)),
    # `CalotypeError.to_payload`
    Column("error", JSON(none_as_null=True)),
    Column("device_seconds", Float, nullable=False),
    # Of a device second, when it was asked for.
    Column("price", Float, nullable=False),
    # Device seconds after which it is stopped; NULL = no limit.
    Column("budget_seconds", Float),
    Column("fence", Integer, nullable=False),
    Column("leased_until", Float),
    Column("created", Float, nullable=False),
    Column("started", Float),
    Column("ended", Float),
    Index("ix_trainings_team_id_created", "team_id", "created"),
    Index("ix_trainings_status", "status"),
)

training_events = Table(
    "training_events",
    metadata,
    Column("training_id", String(64), ForeignKey("trainings.id"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("type", String(64), nullable=False),
    Column("data", JSON(none_as_null=True), nullable=False),
    Column("created", Float, nullable=False),
)
