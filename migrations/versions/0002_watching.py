"""What the pipeline is watched by: setbacks, tallies, what a GPU does, and since when a job is in its stage.

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


def upgrade() -> None:
    # For a while 0001 made all of this itself: a ledger of that time has it already.
    if sa.inspect(op.get_bind()).has_table("tallies"):
        return
    alter_workers()
    make_tallies()
    make_setbacks()
    op.add_column("jobs", sa.Column("stage_since", TIME, server_default=NOW, nullable=False))
    op.create_index(
        "ix_chunks_failed", "chunks", ["job_id"], unique=False, postgresql_where=sa.text("state = 'failed'")
    )
    op.create_index(
        "ix_chunks_done_by",
        "chunks",
        ["worker_id", "finished_at"],
        unique=False,
        postgresql_where=sa.text("state = 'done' AND stage = 'extract'"),
    )
    index_delayed(["queue", "due_at"])
    grant(GRANTS)


def index_delayed(columns: list[str]) -> None:
    op.drop_index("ix_outbox_delayed", table_name="outbox")
    op.create_index(
        "ix_outbox_delayed",
        "outbox",
        columns,
        unique=False,
        postgresql_where=sa.text("published_at IS NULL"),
    )


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


def downgrade() -> None:
    index_delayed(["due_at"])
    op.drop_index("ix_chunks_done_by", table_name="chunks")
    op.drop_index("ix_chunks_failed", table_name="chunks")
    op.drop_column("jobs", "stage_since")
    op.drop_table("setbacks")
    op.drop_table("tallies")
    op.drop_constraint(op.f(WORKER_STATES), "workers", type_="check")
    op.execute("UPDATE workers SET state = 'stuck' WHERE state = 'silent'")
    op.create_check_constraint(op.f(WORKER_STATES), "workers", "state IN ('live', 'stuck', 'gone')")
    for name in ("gpu_memory_peak", "gpu_memory_total", "gpu_memory_used", "gpu_utilization"):
        op.drop_column("workers", name)
