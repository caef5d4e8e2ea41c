"""Who owns the home and the store, who may read its secrets, and whether we may write. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from shoal_cli.doctor.finding import Finding, listed, or_ok

CHECK = "permissions"
_OTHERS = 0o077
ROOT = "root"


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A file or directory of the node."""

    path: str
    mode: int
    owner: str
    private: bool = False
    """Whether only its owner may read it."""
    writable: bool = True
    """By us."""


class PermissionFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What the file system says of them."""

    home: str
    me: str
    owner: str = ""
    """Of the home; "" where there is none."""
    unreadable: str = ""
    """Why the home cannot be looked into, where it cannot."""
    creatable: bool = True
    """Whether a home that is not there could be made."""
    entries: Sequence[Entry] = ()


def judge(facts: PermissionFacts) -> list[Finding]:
    """What is wrong with them."""
    if not facts.owner and not facts.unreadable:
        if facts.creatable:
            return [Finding(CHECK, "ok", f"there is no {facts.home} yet, and {facts.me} may make it")]
        words = f"{facts.me} may not make {facts.home}"
        return [Finding(CHECK, "problem", words, "give another --home or SHOAL_HOME", facts.home)]
    wrong: list[Finding] = []
    stranger = facts.owner not in ("", facts.me) and facts.me != ROOT
    if stranger or facts.unreadable:
        words = f"{facts.home} belongs to {facts.owner or 'another user'}, and this is {facts.me}"
        who = facts.owner or "its owner"
        remedy = f"much cannot be seen so: `sudo -u {who} shoal doctor --home {facts.home}`"
        wrong.append(Finding(CHECK, "warning", words, remedy, facts.home))
    others = [e.path for e in facts.entries if e.owner != facts.owner]
    if others:
        words = (
            f"the home is {facts.owner}'s, and others own {listed(others)}: somebody started Shoal as another user"
        )
        remedy = f"`sudo chown -R {facts.owner} {' '.join(others[:5])}`"
        wrong.append(Finding(CHECK, "problem", words, remedy, others[0]))
    for entry in facts.entries:
        if entry.private and entry.mode & _OTHERS:
            words = f"{entry.path} has mode {entry.mode:04o}: other users of this machine may read the secret in it"
            wrong.append(Finding(CHECK, "problem", words, f"`chmod go= {entry.path}`", entry.path))
        if not entry.writable and not stranger and entry.path not in others:
            words = f"{facts.me} may not write {entry.path} (mode {entry.mode:04o})"
            wrong.append(Finding(CHECK, "problem", words, f"`chmod u+rwX {entry.path}`", entry.path))
    return or_ok(CHECK, wrong, f"{facts.home} is {facts.owner}'s, and its secrets are for its owner only")
