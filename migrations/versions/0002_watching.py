"""What the pipeline is watched by: setbacks, tallies, what a GPU does, and counts that a view would have to add up.

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from migrations.grants import grant

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

# Who takes chunks back, or has them done again, notes it; only what workers do is counted.
GRANTS = {
    "virnucpro_dag": [
        "GRANT SELECT, INSERT, DELETE ON setbacks",
        "GRANT SELECT ON tallies",
    ],
    "virnucpro_worker": [
        "GRANT SELECT, INSERT, DELETE ON setbacks",
        "GRANT SELECT, INSERT, UPDATE ON tallies",
    ],
}

NOW = sa.text("now()")
TIME = postgresql.TIMESTAMP(timezone=True)
WORKER_STATES = "ck_workers_state_known"

# Indexes of chunks that views look for: columns, and which chunks.
CHUNK_INDEXES = {
    "ix_chunks_failed": (["job_id"], "state = 'failed'"),
    "ix_chunks_done_by": (["worker_id", "finished_at"], "state = 'done' AND stage = 'extract'"),
    "ix_chunks_done": (["job_id", "finished_at", "id"], "state = 'done' AND stage = 'extract'"),
    "ix_chunks_with_failures": (["finished_at"], "stage = 'extract' AND failed > 0"),
    "ix_chunks_set_back": (["job_id"], "state = 'pending' AND error IS NOT NULL"),
}


def upgrade() -> None:
    alter_workers()
    make_tallies()
    make_setbacks()
    alter_jobs()
    for name, (columns, chunks) in CHUNK_INDEXES.items():
        op.create_index(name, "chunks", columns, unique=False, postgresql_where=sa.text(chunks))
    op.create_index(
        "ix_failures_reason", "failures", ["job_id", "generation", "reason", "record"], unique=False
    )
    op.add_column("outbox", sa.Column("since", TIME, server_default=NOW, nullable=False))
    op.execute("UPDATE outbox SET since = due_at")
    op.create_index("ix_outbox_since", "outbox", ["queue", "since"], unique=False)
    op.drop_index("ix_outbox_delayed", table_name="outbox")
    op.create_index(
        "ix_outbox_delayed",
        "outbox",
        ["queue", "due_at"],
        unique=False,
        postgresql_where=sa.text("published_at IS NULL"),
    )
    grant(GRANTS)


def alter_workers() -> None:
    op.add_column("workers", sa.Column("gpu_utilization", sa.Double(), nullable=True))
    for name in ("gpu_memory_used", "gpu_memory_total", "gpu_memory_peak"):
        op.add_column("workers", sa.Column(name, sa.BigInteger(), nullable=True))
    op.drop_constraint(op.f(WORKER_STATES), "workers", type_="check")
    op.create_check_constraint(op.f(WORKER_STATES), "workers", "state IN ('live', 'stuck', 'silent', 'gone')")


def make_tallies() -> None:
    op.create_table(
        "tallies",
        sa.Column("worker_id", sa.BigInteger(), nullable=False),
        sa.Column("stage", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("label", sa.Text(), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.CheckConstraint("value >= 0", name=op.f("ck_tallies_value_not_negative")),
        sa.ForeignKeyConstraint(["stage"], ["stages.name"], name=op.f("fk_tallies_stage")),
        sa.ForeignKeyConstraint(["worker_id"], ["workers.id"], name=op.f("fk_tallies_worker_id")),
        sa.PrimaryKeyConstraint("worker_id", "stage", "name", "label", name=op.f("pk_tallies")),
    )


def make_setbacks() -> None:
    op.create_table(
        "setbacks",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("job_id", sa.BigInteger(), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("stage", sa.Text(), nullable=False),
        sa.Column("chunk_id", sa.BigInteger(), nullable=False),
        sa.Column("first_record", sa.BigInteger(), nullable=False),
        sa.Column("records", sa.BigInteger(), nullable=False),
        sa.Column("attempt", sa.BigInteger(), nullable=False),
        sa.Column("worker_id", sa.BigInteger(), nullable=False),
        sa.Column("claimed_at", TIME, nullable=False),
        sa.Column("ended_at", TIME, server_default=NOW, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("error", sa.Text(), nullable=False),
        sa.CheckConstraint(
            "kind IN ('failed', 'died', 'halved', 'handed_back', 'cancelled', 'lost')",
            name=op.f("ck_setbacks_kind_known"),
        ),
        sa.CheckConstraint(
            "first_record >= 1 AND records >= 1 AND attempt >= 1", name=op.f("ck_setbacks_range_not_empty")
        ),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_setbacks_job_id"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["stage"], ["stages.name"], name=op.f("fk_setbacks_stage")),
        sa.ForeignKeyConstraint(["worker_id"], ["workers.id"], name=op.f("fk_setbacks_worker_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_setbacks")),
    )
    op.create_index(
        "ix_setbacks_job", "setbacks", ["job_id", "generation", "stage", "first_record"], unique=False
    )


def alter_jobs() -> None:
    op.add_column("jobs", sa.Column("stage_since", TIME, server_default=NOW, nullable=False))
    op.add_column("jobs", sa.Column("residues_done", sa.BigInteger(), server_default="0", nullable=False))
    op.add_column("jobs", sa.Column("times_failed", sa.BigInteger(), server_default="0", nullable=False))
    op.execute("""
        UPDATE jobs j SET residues_done = done.residues
          FROM (SELECT job_id, sum(residues) AS residues FROM chunks
                 WHERE stage = 'extract' AND state = 'done' GROUP BY job_id) done
         WHERE done.job_id = j.id
    """)


def downgrade() -> None:
    op.drop_index("ix_outbox_delayed", table_name="outbox")
    op.create_index(
        "ix_outbox_delayed",
        "outbox",
        ["due_at"],
        unique=False,
        postgresql_where=sa.text("published_at IS NULL"),
    )
    op.drop_index("ix_outbox_since", table_name="outbox")
    op.drop_column("outbox", "since")
    op.drop_index("ix_failures_reason", table_name="failures")
    for name in CHUNK_INDEXES:
        op.drop_index(name, table_name="chunks")
    for name in ("times_failed", "residues_done", "stage_since"):
        op.drop_column("jobs", name)
    op.drop_table("setbacks")
    op.drop_table("tallies")
    op.drop_constraint(op.f(WORKER_STATES), "workers", type_="check")
    op.execute("UPDATE workers SET state = 'stuck' WHERE state = 'silent'")
    op.create_check_constraint(op.f(WORKER_STATES), "workers", "state IN ('live', 'stuck', 'gone')")
    for name in ("gpu_memory_peak", "gpu_memory_total", "gpu_memory_used", "gpu_utilization"):
        op.drop_column("workers", name)
