"""Who owns the home and the store, who can read what is in it, and whether this user can write. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from shoal_cli.doctor.finding import Finding, join_names, or_ok

CHECK = "permissions"
_GROUP_AND_OTHERS = 0o077
ROOT_USER = "root"


class PathPermission(msgspec.Struct, frozen=True, kw_only=True):
    """A file or directory of the node."""

    path: str
    mode: int
    owner: str
    private: bool = False
    """Whether only its owner should be able to read it."""
    writable: bool = True
    """By this user."""


class PermissionFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The owners and modes of a home."""

    home: str
    user: str
    owner: str = ""
    """Of the home; "" where there is none."""
    read_error: str = ""
    """Why the home cannot be listed, where it cannot."""
    creatable: bool = True
    """Whether this user could create a missing home."""
    entries: Sequence[PathPermission] = ()


def check(facts: PermissionFacts) -> list[Finding]:
    """Return what is wrong with them."""
    if not facts.owner and not facts.read_error:
        if facts.creatable:
            return [Finding(CHECK, "ok", f"{facts.home} does not exist yet; {facts.user} can create it")]
        what = f"{facts.user} cannot create {facts.home}"
        return [Finding(CHECK, "problem", what, "choose another --home or SHOAL_HOME", facts.home)]
    wrong: list[Finding] = []
    is_foreign = facts.owner not in ("", facts.user) and facts.user != ROOT_USER
    if is_foreign or facts.read_error:
        what = f"{facts.home} belongs to {facts.owner or 'another user'}, this is {facts.user}"
        owner = facts.owner or "its owner"
        remedy = f"much cannot be checked as {facts.user}: `sudo -u {owner} shoal doctor --home {facts.home}`"
        wrong.append(Finding(CHECK, "warning", what, remedy, facts.home))
    others = [e.path for e in facts.entries if e.owner != facts.owner]
    if others:
        what = f"the home is {facts.owner}'s, but others own {join_names(others)}: Shoal was started as another user"
        remedy = f"`sudo chown -R {facts.owner} {' '.join(others[:5])}`"
        wrong.append(Finding(CHECK, "problem", what, remedy, others[0]))
    for entry in facts.entries:
        if entry.private and entry.mode & _GROUP_AND_OTHERS:
            what = f"{entry.path} has mode {entry.mode:04o}: other users of this machine can read what is in it"
            wrong.append(Finding(CHECK, "problem", what, f"`chmod go= {entry.path}`", entry.path))
        if not entry.writable and not is_foreign and entry.path not in others:
            what = f"{facts.user} cannot write {entry.path} (mode {entry.mode:04o})"
            wrong.append(Finding(CHECK, "problem", what, f"`chmod u+rwX {entry.path}`", entry.path))
    return or_ok(CHECK, wrong, f"{facts.home} is {facts.owner}'s, only its owner can read what is in it")
