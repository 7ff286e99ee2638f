"""The ledger: models, inputs, submissions, jobs, chunks, failures, artifacts, workers, waiters, outbox, rejections.

Revision ID: 0001
Revises:
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from migrations.grants import grant

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

STAGES = [("extract", 1, "extract"), ("merge", 2, "finish"), ("validate", 3, "finish")]

# The DAG registers and reads, and may have chunks done again; a worker claims and commits. Neither may alter the
# schema or the models. The DAG cannot lease a chunk, a worker cannot change what was asked for.
GRANTS = {
    "virnucpro_dag": [
        "GRANT SELECT ON ALL TABLES IN SCHEMA public",
        "GRANT INSERT, UPDATE (location) ON inputs",
        "GRANT INSERT, UPDATE ON jobs, submissions",
        "GRANT INSERT, DELETE ON chunks",
        "GRANT UPDATE (state, attempts, deaths, lease_token, finished_at, error) ON chunks",
        "GRANT UPDATE (embeddings, failed, truncated, unknown, tokens, seconds) ON chunks",
        "GRANT INSERT, UPDATE, DELETE ON outbox, waiters",
        "GRANT DELETE ON artifacts, failures",
    ],
    "virnucpro_worker": [
        "GRANT SELECT ON ALL TABLES IN SCHEMA public",
        "GRANT UPDATE ON jobs",
        "GRANT UPDATE (error, published_generation, published_at) ON submissions",
        "GRANT INSERT, UPDATE ON rejections",
        "GRANT INSERT, UPDATE ON workers",
        "GRANT INSERT, UPDATE, DELETE ON chunks, outbox, artifacts, failures",
        "GRANT USAGE ON SEQUENCE lease_tokens",
    ],
}


def upgrade() -> None:
    op.execute(sa.schema.CreateSequence(sa.Sequence("lease_tokens")))
    op.create_table(
        "inputs",
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("compression", sa.Text(), nullable=False),
        sa.Column("location", sa.Text(), nullable=False),
        sa.Column("records", sa.BigInteger(), nullable=False),
        sa.Column("residues", sa.BigInteger(), nullable=False),
        sa.Column(
            "registered_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.CheckConstraint(
            "compression IN ('plain', 'gzip', 'bgzip', 'zstd')", name=op.f("ck_inputs_compression_known")
        ),
        sa.CheckConstraint("sha256 ~ '^[0-9a-f]{64}$'", name=op.f("ck_inputs_sha256_is_sha256")),
        sa.CheckConstraint("size > 0 AND records > 0 AND residues >= 0", name=op.f("ck_inputs_not_empty")),
        sa.PrimaryKeyConstraint("sha256", name=op.f("pk_inputs")),
    )
    op.create_table(
        "models",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("weights_sha256", sa.Text(), nullable=False),
        sa.Column("layers", sa.BigInteger(), nullable=False),
        sa.Column("token_dropout", sa.Boolean(), nullable=False),
        sa.Column("demonstration", sa.Boolean(), nullable=False),
        sa.Column("config", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("selftest", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column(
            "added_at", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False
        ),
        sa.CheckConstraint(
            "weights_sha256 ~ '^[0-9a-f]{64}$'", name=op.f("ck_models_weights_sha256_is_sha256")
        ),
        sa.CheckConstraint("layers > 0", name=op.f("ck_models_layers_positive")),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_models")),
    )
    op.create_table(
        "rejections",
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("messages", sa.BigInteger(), nullable=False),
        sa.Column(
            "last_at", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False
        ),
        sa.CheckConstraint(
            "reason IN ('format', 'content', 'task', 'chunk', 'stage')",
            name=op.f("ck_rejections_reason_known"),
        ),
        sa.CheckConstraint("messages > 0", name=op.f("ck_rejections_messages_positive")),
        sa.PrimaryKeyConstraint("reason", name=op.f("pk_rejections")),
    )
    op.create_table(
        "stages",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("queue", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_stages")),
        sa.UniqueConstraint("position", name=op.f("uq_stages_position")),
    )
    op.create_table(
        "workers",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("node", sa.Text(), nullable=False),
        sa.Column("queue", sa.Text(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("pid", sa.BigInteger(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), server_default="live", nullable=False),
        sa.Column(
            "started_at", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False
        ),
        sa.Column(
            "heartbeat_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("lease_expires_at", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("progress", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column(
            "progress_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.CheckConstraint("state IN ('live', 'stuck', 'gone')", name=op.f("ck_workers_state_known")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_workers")),
    )
    op.create_index(
        "ix_workers_lease",
        "workers",
        ["lease_expires_at"],
        unique=False,
        postgresql_where=sa.text("state = 'live'"),
    )
    op.create_index(
        "uq_workers_live_node", "workers", ["node"], unique=True, postgresql_where=sa.text("state = 'live'")
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("input_sha256", sa.Text(), nullable=False),
        sa.Column("recipe_sha256", sa.Text(), nullable=False),
        sa.Column("recipe", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("generation", sa.BigInteger(), server_default="1", nullable=False),
        sa.Column("state", sa.Text(), server_default="running", nullable=False),
        sa.Column("stage", sa.Text(), nullable=False),
        sa.Column("chunks_total", sa.BigInteger(), nullable=False),
        sa.Column("chunks_left", sa.BigInteger(), nullable=False),
        sa.Column("records", sa.BigInteger(), nullable=False),
        sa.Column("embeddings", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("failed", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("truncated", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("unknown", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("seconds", sa.Double(), server_default="0", nullable=False),
        sa.Column("execution_class", sa.Text(), nullable=True),
        sa.Column("execution", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("forced_by", sa.Text(), nullable=True),
        sa.Column(
            "created_at", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False
        ),
        sa.Column("finished_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.CheckConstraint("(error IS NULL) = (state <> 'failed')", name=op.f("ck_jobs_failed_says_why")),
        sa.CheckConstraint(
            "(finished_at IS NULL) = (state = 'running')", name=op.f("ck_jobs_finished_unless_running")
        ),
        sa.CheckConstraint("recipe_sha256 ~ '^[0-9a-f]{64}$'", name=op.f("ck_jobs_recipe_sha256_is_sha256")),
        sa.CheckConstraint(
            "state <> 'succeeded' OR (chunks_left = 0 AND embeddings + failed = records)",
            name=op.f("ck_jobs_success_is_complete"),
        ),
        sa.CheckConstraint(
            "state IN ('running', 'succeeded', 'failed', 'cancelled')", name=op.f("ck_jobs_state_known")
        ),
        sa.CheckConstraint(
            "(execution_class IS NULL) = (execution IS NULL)",
            name=op.f("ck_jobs_execution_class_is_described"),
        ),
        sa.CheckConstraint(
            "chunks_left BETWEEN 0 AND chunks_total", name=op.f("ck_jobs_chunks_left_in_range")
        ),
        sa.CheckConstraint(
            "embeddings >= 0 AND failed >= 0 AND embeddings + failed <= records",
            name=op.f("ck_jobs_records_conserved"),
        ),
        sa.CheckConstraint("generation >= 1", name=op.f("ck_jobs_generation_positive")),
        sa.ForeignKeyConstraint(["input_sha256"], ["inputs.sha256"], name=op.f("fk_jobs_input_sha256")),
        sa.ForeignKeyConstraint(["model"], ["models.name"], name=op.f("fk_jobs_model")),
        sa.ForeignKeyConstraint(["stage"], ["stages.name"], name=op.f("fk_jobs_stage")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
        sa.UniqueConstraint("input_sha256", "recipe_sha256", name=op.f("uq_jobs_input_sha256_recipe_sha256")),
    )
    op.create_index(
        "ix_jobs_state", "jobs", ["state"], unique=False, postgresql_where=sa.text("state = 'running'")
    )
    op.create_table(
        "artifacts",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("job_id", sa.BigInteger(), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("stage", sa.Text(), nullable=False),
        sa.Column("ordinal", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("rows", sa.BigInteger(), nullable=False),
        sa.Column("execution", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column(
            "written_at", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False
        ),
        sa.CheckConstraint("sha256 ~ '^[0-9a-f]{64}$'", name=op.f("ck_artifacts_sha256_is_sha256")),
        sa.CheckConstraint("bytes > 0 AND rows >= 0", name=op.f("ck_artifacts_not_empty")),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_artifacts_job_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["stage"], ["stages.name"], name=op.f("fk_artifacts_stage")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_artifacts")),
        sa.UniqueConstraint("path", name=op.f("uq_artifacts_path")),
    )
    op.create_index(
        "ix_artifacts_job", "artifacts", ["job_id", "generation", "stage", "ordinal"], unique=False
    )
    op.create_table(
        "chunks",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("job_id", sa.BigInteger(), nullable=False),
        sa.Column("stage", sa.Text(), nullable=False),
        sa.Column("ordinal", sa.BigInteger(), nullable=False),
        sa.Column("byte_start", sa.BigInteger(), nullable=False),
        sa.Column("byte_end", sa.BigInteger(), nullable=False),
        sa.Column("virtual_start", sa.BigInteger(), nullable=True),
        sa.Column("first_record", sa.BigInteger(), nullable=False),
        sa.Column("records", sa.BigInteger(), nullable=False),
        sa.Column("residues", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), server_default="pending", nullable=False),
        sa.Column("attempts", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("deaths", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("lease_token", sa.BigInteger(), nullable=True),
        sa.Column("worker_id", sa.BigInteger(), nullable=True),
        sa.Column("claimed_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("finished_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("embeddings", sa.BigInteger(), nullable=True),
        sa.Column("failed", sa.BigInteger(), nullable=True),
        sa.Column("truncated", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("unknown", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("seconds", sa.Double(), nullable=True),
        sa.CheckConstraint(
            "(state = 'running') = (lease_token IS NOT NULL) AND (state <> 'running' OR worker_id IS NOT NULL)",
            name=op.f("ck_chunks_lease_while_running"),
        ),
        sa.CheckConstraint(
            "CASE WHEN state = 'done' THEN embeddings + failed = records"
            " ELSE embeddings IS NULL AND failed IS NULL END",
            name=op.f("ck_chunks_records_conserved"),
        ),
        sa.CheckConstraint("state <> 'failed' OR error IS NOT NULL", name=op.f("ck_chunks_failed_says_why")),
        sa.CheckConstraint(
            "state IN ('pending', 'running', 'done', 'failed')", name=op.f("ck_chunks_state_known")
        ),
        sa.CheckConstraint("deaths BETWEEN 0 AND attempts", name=op.f("ck_chunks_deaths_are_attempts")),
        sa.CheckConstraint(
            "byte_end > byte_start AND first_record >= 1 AND records >= 1",
            name=op.f("ck_chunks_range_not_empty"),
        ),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_chunks_job_id"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["stage"], ["stages.name"], name=op.f("fk_chunks_stage")),
        sa.ForeignKeyConstraint(["worker_id"], ["workers.id"], name=op.f("fk_chunks_worker_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_chunks")),
        sa.UniqueConstraint("job_id", "stage", "ordinal", name=op.f("uq_chunks_job_id_stage_ordinal")),
    )
    op.create_index(
        "ix_chunks_worker_id",
        "chunks",
        ["worker_id"],
        unique=False,
        postgresql_where=sa.text("state = 'running'"),
    )
    op.create_index(
        "ix_chunks_suspect", "chunks", ["job_id"], unique=False, postgresql_where=sa.text("deaths > 0")
    )
    op.create_table(
        "failures",
        sa.Column("job_id", sa.BigInteger(), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("record", sa.BigInteger(), nullable=False),
        sa.Column("record_id", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.CheckConstraint(
            "reason IN ('no_id', 'bad_header', 'empty', 'invalid_residue', 'oom', 'non_finite', 'poison')",
            name=op.f("ck_failures_reason_known"),
        ),
        sa.CheckConstraint("record >= 1", name=op.f("ck_failures_record_positive")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_failures_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "generation", "record", name=op.f("pk_failures")),
    )
    op.create_table(
        "submissions",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("job_id", sa.BigInteger(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("stem", sa.Text(), nullable=False),
        sa.Column("label", sa.Text(), server_default="", nullable=False),
        sa.Column("nucleotide_path", sa.Text(), server_default="", nullable=False),
        sa.Column("nucleotide_sha256", sa.Text(), server_default="", nullable=False),
        sa.Column("requested_by", sa.Text(), nullable=False),
        sa.Column("max_failed_share", sa.Double(), nullable=False),
        sa.Column(
            "submitted_at",
            postgresql.TIMESTAMP(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("published_generation", sa.BigInteger(), nullable=True),
        sa.Column("published_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.CheckConstraint("label IN ('', 'host', 'viral')", name=op.f("ck_submissions_label_known")),
        sa.CheckConstraint(
            "(published_at IS NULL) = (published_generation IS NULL)",
            name=op.f("ck_submissions_published_names_generation"),
        ),
        sa.CheckConstraint("max_failed_share BETWEEN 0 AND 1", name=op.f("ck_submissions_share_is_a_share")),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_submissions_job_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_submissions")),
        sa.UniqueConstraint(
            "job_id",
            "path",
            "label",
            "nucleotide_path",
            name=op.f("uq_submissions_job_id_path_label_nucleotide_path"),
        ),
    )
    op.create_table(
        "waiters",
        sa.Column("token", sa.Text(), nullable=False),
        sa.Column("job_id", sa.BigInteger(), nullable=False),
        sa.Column(
            "since", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False
        ),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_waiters_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("token", "job_id", name=op.f("pk_waiters")),
    )
    op.create_index(op.f("ix_waiters_job_id"), "waiters", ["job_id"], unique=False)
    op.create_table(
        "outbox",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("chunk_id", sa.BigInteger(), nullable=False),
        sa.Column("queue", sa.Text(), nullable=False),
        sa.Column(
            "due_at", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False
        ),
        sa.Column("published_at", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["chunk_id"], ["chunks.id"], name=op.f("fk_outbox_chunk_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_outbox")),
        sa.UniqueConstraint("chunk_id", name=op.f("uq_outbox_chunk_id")),
    )
    op.create_index(
        "ix_outbox_delayed",
        "outbox",
        ["due_at"],
        unique=False,
        postgresql_where=sa.text("published_at IS NULL"),
    )
    op.create_index(
        "ix_outbox_due",
        "outbox",
        ["queue", "chunk_id"],
        unique=False,
        postgresql_where=sa.text("published_at IS NULL"),
    )
    op.create_index(
        "ix_outbox_published",
        "outbox",
        ["queue", "published_at"],
        unique=False,
        postgresql_where=sa.text("published_at IS NOT NULL"),
    )
    stages = sa.table("stages", sa.column("name"), sa.column("position"), sa.column("queue"))
    op.bulk_insert(
        stages, [{"name": name, "position": position, "queue": queue} for name, position, queue in STAGES]
    )
    grant(GRANTS)


def downgrade() -> None:
    for table in (
        "outbox",
        "waiters",
        "artifacts",
        "failures",
        "chunks",
        "submissions",
        "jobs",
        "workers",
        "stages",
        "rejections",
        "models",
        "inputs",
    ):
        op.drop_table(table)
    op.execute(sa.schema.DropSequence(sa.Sequence("lease_tokens")))
