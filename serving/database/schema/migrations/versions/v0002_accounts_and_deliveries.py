"""Quotas, recipes, promises, webhooks, files, batches, checkpoints, previews, usage."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision: str | None = "0001"
branch_labels: str | None = None
depends_on: str | None = None

_FRESH: dict[str, list[sa.Column[Any]]] = {
    "teams": [
        sa.Column("requests_per_minute", sa.Integer()),
        sa.Column("concurrent_jobs", sa.Integer()),
        sa.Column("gpu_seconds_per_day", sa.Float()),
        sa.Column("budget_per_month", sa.Float()),
        sa.Column("allowed_models", sa.JSON()),
        sa.Column("policy", sa.String(255)),
        sa.Column("prompt_in_files", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("bucket_tokens", sa.Float()),
        sa.Column("bucket_time", sa.Float()),
        sa.Column("webhook_secret", sa.String(128)),
    ],
    "api_keys": [
        sa.Column("expires", sa.Float()),
        sa.Column("declared", sa.Boolean(), nullable=False, server_default=sa.false()),
    ],
    "jobs": [
        sa.Column("recipe", sa.JSON()),
        sa.Column("recipe_hash", sa.String(64)),
        sa.Column("reserved_seconds", sa.Float(), nullable=False, server_default="0"),
        sa.Column("reserved_day", sa.String(10)),
        sa.Column("price", sa.Float(), nullable=False, server_default="0"),
        sa.Column("promised", sa.Float()),
        sa.Column("webhook", sa.JSON()),
        sa.Column("batch_id", sa.String(64)),
        sa.Column("purged", sa.Float()),
    ],
}
_INDEXES: dict[str, tuple[list[str], ...]] = {
    "jobs": (["status", "created"], ["team_id", "status"], ["expires"]),
    "assets": (["blob_key"],),
    "usage_records": (["team_id", "day"], ["day"]),
    "webhook_endpoints": (["team_id"],),
    "webhook_deliveries": (["status", "due"], ["team_id", "created"]),
    "files": (["blob_key"], ["expires"], ["team_id", "created"]),
    "batches": (["status"], ["team_id", "created"]),
    "blob_garbage": (["since"],),
}
_TABLES = (
    "blob_garbage",
    "batch_lines",
    "batches",
    "files",
    "webhook_attempts",
    "webhook_deliveries",
    "webhook_endpoints",
    "usage_records",
    "team_days",
    "forecasts",
    "previews",
    "checkpoints",
)


def upgrade() -> None:
    for table, columns in _FRESH.items():
        for column in columns:
            op.add_column(table, column)
    _create_hand_over()
    _create_accounting()
    _create_webhooks()
    _create_files_and_batches()
    for table, indexes in _INDEXES.items():
        for names in indexes:
            op.create_index(f"ix_{table}_{'_'.join(names)}", table, names)


def downgrade() -> None:
    for table, indexes in _INDEXES.items():
        for names in indexes:
            op.drop_index(f"ix_{table}_{'_'.join(names)}", table)
    for table in _TABLES:
        op.drop_table(table)
    for table, columns in _FRESH.items():
        for column in columns:
            op.drop_column(table, column.name)


def _text(name: str, length: int = 64, nullable: bool = False) -> sa.Column[Any]:
    return sa.Column(name, sa.String(length), nullable=nullable)


def _number(name: str, nullable: bool = False) -> sa.Column[Any]:
    return sa.Column(name, sa.Float(), nullable=nullable)


def _whole(name: str, nullable: bool = False) -> sa.Column[Any]:
    return sa.Column(name, sa.Integer(), nullable=nullable)


def _json(name: str, nullable: bool = False) -> sa.Column[Any]:
    return sa.Column(name, sa.JSON(), nullable=nullable)


def _key(table: str, *columns: str) -> sa.PrimaryKeyConstraint:
    return sa.PrimaryKeyConstraint(*columns, name=f"pk_{table}")


def _reference(table: str, column: str, target: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint([column], [f"{target}.id"], name=f"fk_{table}_{column}")


def _create_hand_over() -> None:
    op.create_table(
        "checkpoints",
        *(_text("job_id"), _whole("fence"), _whole("step"), _text("blob_key", 512)),
        _reference("checkpoints", "job_id", "jobs"),
        _key("checkpoints", "job_id"),
    )
    op.create_table(
        "previews",
        *(_text("job_id"), _whole("image_index"), _whole("partial_index"), _whole("fence")),
        *(_whole("step"), _text("blob_key", 512), _text("content_type")),
        _reference("previews", "job_id", "jobs"),
        _key("previews", "job_id", "image_index", "partial_index"),
    )
    op.create_table(
        "forecasts",
        *(_text("model", 255), _number("updated"), _json("figures")),
        _key("forecasts", "model"),
    )
    op.create_table(
        "blob_garbage",
        *(_text("blob_key", 512), _number("since")),
        _key("blob_garbage", "blob_key"),
    )


def _create_accounting() -> None:
    op.create_table(
        "team_days",
        *(_text("team_id"), _text("day", 10)),
        *(_number("reserved_seconds"), _number("used_seconds"), _number("used_cost")),
        _reference("team_days", "team_id", "teams"),
        _key("team_days", "team_id", "day"),
    )
    op.create_table(
        "usage_records",
        *(_text("job_id"), _text("team_id"), _text("api_key_id", nullable=True)),
        *(_text("model", 255), _text("adapters", 512), _number("time"), _text("day", 10)),
        *(_text("status", 16), _whole("images"), _number("megapixels")),
        *(_number("gpu_seconds"), _number("cost")),
        sa.Column("input_tokens", sa.BigInteger(), nullable=False),
        sa.Column("output_tokens", sa.BigInteger(), nullable=False),
        sa.Column("promise_kept", sa.Boolean()),
        _reference("usage_records", "team_id", "teams"),
        _key("usage_records", "job_id"),
    )


def _create_webhooks() -> None:
    op.create_table(
        "webhook_endpoints",
        *(_text("id"), _text("team_id"), _text("name", 255), _text("url", 2048)),
        *(_json("event_types"), _text("secret", 128), _text("old_secret", 128, nullable=True)),
        *(_number("old_secret_expires", nullable=True), _number("disabled", nullable=True)),
        *(_text("disabled_reason", 512, nullable=True), _number("created"), _number("updated")),
        _reference("webhook_endpoints", "team_id", "teams"),
        _key("webhook_endpoints", "id"),
    )
    op.create_table(
        "webhook_deliveries",
        *(_text("id"), _text("team_id"), _text("endpoint_id", nullable=True)),
        *(_text("job_id", nullable=True), _text("event_type"), _text("url", 2048)),
        sa.Column("body", sa.Text()),
        *(_text("status", 16), _whole("attempts"), _number("due", nullable=True)),
        *(_number("created"), _number("completed", nullable=True)),
        _reference("webhook_deliveries", "team_id", "teams"),
        _key("webhook_deliveries", "id"),
    )
    op.create_table(
        "webhook_attempts",
        *(_text("delivery_id"), _whole("number"), _number("time"), _number("seconds")),
        *(_whole("http_status", nullable=True), _text("error", 512, nullable=True)),
        _reference("webhook_attempts", "delivery_id", "webhook_deliveries"),
        _key("webhook_attempts", "delivery_id", "number"),
    )


def _create_files_and_batches() -> None:
    op.create_table(
        "files",
        *(_text("id"), _text("team_id"), _text("purpose", 32), _text("filename", 255)),
        *(_text("content_type"), sa.Column("size", sa.BigInteger(), nullable=False)),
        *(_text("sha256"), _text("blob_key", 512), _number("created")),
        _number("expires", nullable=True),
        _reference("files", "team_id", "teams"),
        _key("files", "id"),
    )
    op.create_table(
        "batches",
        *(_text("id"), _text("team_id"), _text("api_key_id"), _text("endpoint")),
        *(_text("input_file_id"), _text("output_file_id", nullable=True)),
        *(_text("error_file_id", nullable=True), _text("status", 16), _json("metadata")),
        *(_json("errors", nullable=True), _number("created"), _json("moments")),
        *(_number("deadline"), _number("claimed_until", nullable=True)),
        _reference("batches", "team_id", "teams"),
        _key("batches", "id"),
    )
    op.create_table(
        "batch_lines",
        *(_text("batch_id"), _whole("line"), _text("custom_id", 512), _json("body")),
        *(_text("job_id", nullable=True), _json("answer", nullable=True)),
        _reference("batch_lines", "batch_id", "batches"),
        _key("batch_lines", "batch_id", "line"),
    )
