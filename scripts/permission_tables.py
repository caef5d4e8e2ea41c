"""Render what each user of NATS may do into docs/permissions.md, between `<!-- permissions:… -->` and its end.

`--check` fails if the page is stale.
"""

from __future__ import annotations

from pathlib import Path

from scripts.generated_page import update
from shoal_cli.membership.permissions import Permissions, invitation_permissions, permissions
from shoal_common.identity.node_identity import USERS

PAGE = Path(__file__).parents[1] / "docs" / "permissions.md"
_NODE, _INVITATION = "nodename", "invitation"


def render(allowed: Permissions) -> str:
    """Return the lists of one user; `<node>` stands for its node."""
    lines = ["| may publish | may subscribe to |", "| --- | --- |"]
    publish, subscribe = (
        "<br>".join(f"`{s.replace(_NODE, '<node>').replace(_INVITATION, '<invitation>')}`" for s in sorted(subjects))
        for subjects in (allowed.publish, allowed.subscribe)
    )
    return "\n".join([*lines, f"| {publish} | {subscribe} |"])


def main() -> None:
    """Write the page, or check it."""
    texts = {user: render(permissions(user, _NODE)) for user in USERS}
    texts["invitation"] = render(invitation_permissions(_INVITATION))
    update(PAGE, "permissions", texts, "the table in cli/shoal_cli/membership/permissions.py")


if __name__ == "__main__":
    main()
