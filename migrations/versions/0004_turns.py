"""How often a message was put off: one that no worker here may run lets others go first.

Revision ID: 0004
Revises: 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

WAITING = sa.text("published_at IS NULL")


def upgrade() -> None:
    op.add_column("outbox", sa.Column("put_off", sa.BigInteger(), server_default="0", nullable=False))
    index_due(["queue", "put_off", "chunk_id"])


def downgrade() -> None:
    index_due(["queue", "chunk_id"])
    op.drop_column("outbox", "put_off")


def index_due(columns: list[str]) -> None:
    op.drop_index("ix_outbox_due", table_name="outbox")
    op.create_index("ix_outbox_due", "outbox", columns, unique=False, postgresql_where=WAITING)
