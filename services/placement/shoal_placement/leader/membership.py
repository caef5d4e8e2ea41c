"""Which nodes joined, were lost or returned: compare two states of the cluster. Pure."""

from __future__ import annotations

from collections.abc import Set

import msgspec

from shoal_common.messages.placement import MembersState


class MemberChanges(msgspec.Struct, frozen=True):
    """The next record, and what to emit once it is published."""

    members: MembersState
    joined: list[str]
    lost: list[str]
    returned: list[str]


def compare_members(before: MembersState, named: Set[str], live: Set[str], now_s: float) -> MemberChanges:
    """Return what has changed. `named`: nodes that have published state; `live`: nodes with a service that answers.

    A node joins once it is live and has published state. One that is neither is dropped: it was retired, which has an
    event of its own, and joins again if it comes back.
    """
    joined = sorted((live & named) - before.lost_since_s.keys())
    lost = sorted(node for node, since_s in before.lost_since_s.items() if since_s == 0 and node not in live)
    returned = sorted(node for node, since_s in before.lost_since_s.items() if since_s > 0 and node in live)
    kept = {node: since_s for node, since_s in before.lost_since_s.items() if node in named or node in live}
    kept.update(dict.fromkeys([*joined, *returned], 0.0))
    kept.update({node: now_s for node in lost if node in kept})
    return MemberChanges(MembersState(lost_since_s=kept), joined, lost, returned)


def answering_nodes(live: Set[str], unresponsive: Set[str]) -> set[str]:
    """Return the nodes with a service that is live and answers, by keys of `live`."""
    return {key.partition(".")[0] for key in live - unresponsive}
