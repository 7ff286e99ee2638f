"""Counts that a view would have to add up, indexes of what views look for, and since when a chunk waits.

Revision ID: 0003
Revises: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

# Indexes of chunks: columns, and which chunks.
CHUNK_INDEXES = {
    "ix_chunks_done": (["job_id", "finished_at", "id"], "state = 'done' AND stage = 'extract'"),
    "ix_chunks_with_failures": (["finished_at"], "stage = 'extract' AND failed > 0"),
    "ix_chunks_set_back": (["job_id"], "state = 'pending' AND error IS NOT NULL"),
}


def upgrade() -> None:
    for name in ("residues_done", "times_failed"):
        op.add_column("jobs", sa.Column(name, sa.BigInteger(), server_default="0", nullable=False))
    op.execute("""
        UPDATE jobs j SET residues_done = done.residues
          FROM (SELECT job_id, sum(residues) AS residues FROM chunks
                 WHERE stage = 'extract' AND state = 'done' GROUP BY job_id) done
         WHERE done.job_id = j.id
    """)
    for name, (columns, chunks) in CHUNK_INDEXES.items():
        op.create_index(name, "chunks", columns, unique=False, postgresql_where=sa.text(chunks))
    op.create_index(
        "ix_failures_reason", "failures", ["job_id", "generation", "reason", "record"], unique=False
    )
    op.add_column(
        "outbox",
        sa.Column(
            "since", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False
        ),
    )
    op.execute("UPDATE outbox SET since = due_at")
    op.create_index("ix_outbox_since", "outbox", ["queue", "since"], unique=False)


def downgrade() -> None:
    op.drop_index("ix_outbox_since", table_name="outbox")
    op.drop_column("outbox", "since")
    op.drop_index("ix_failures_reason", table_name="failures")
    for name in CHUNK_INDEXES:
        op.drop_index(name, table_name="chunks")
    for name in ("times_failed", "residues_done"):
        op.drop_column("jobs", name)
