"""Who may do what, for the roles that a server knows: one without them serves its owner alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sqlalchemy as sa
from alembic import op


def grant(grants: Mapping[str, Sequence[str]]) -> None:
    """Carry out each role's statements, to which `TO role` is added."""
    carry_out(grants, "TO")


def revoke(revocations: Mapping[str, Sequence[str]]) -> None:
    """Carry out each role's statements, to which `FROM role` is added."""
    carry_out(revocations, "FROM")


def carry_out(statements: Mapping[str, Sequence[str]], preposition: str) -> None:
    known = set(op.get_bind().scalars(sa.text("SELECT rolname FROM pg_roles")))
    for role in known & statements.keys():
        for statement in statements[role]:
            op.execute(f"{statement} {preposition} {role}")
