"""Who may do what, for the roles that a server knows: one without them serves its owner alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sqlalchemy as sa
from alembic import op


def grant(grants: Mapping[str, Sequence[str]]) -> None:
    """Carry out each role's statements, to which `TO role` is added."""
    known = set(op.get_bind().scalars(sa.text("SELECT rolname FROM pg_roles")))
    for role, statements in grants.items():
        if role in known:
            for statement in statements:
                op.execute(f"{statement} TO {role}")
