"""Workers put the tallies of those long gone together.

Revision ID: 0005
Revises: 0004
"""

from __future__ import annotations

from migrations.grants import grant, revoke

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    grant({"virnucpro_worker": ["GRANT DELETE ON tallies"]})


def downgrade() -> None:
    revoke({"virnucpro_worker": ["REVOKE DELETE ON tallies"]})
