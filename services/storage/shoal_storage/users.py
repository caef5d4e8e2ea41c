"""Who uses the models of a node, in words and by name. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from shoal_common.messages.records import InstanceSpec
from shoal_storage.leases import Lease, words_of

_NAMED_AT_MOST = 10


class User(msgspec.Struct, frozen=True):
    """Somebody who uses a model. `instance` is what to stop so that it ends, "" for what is no instance of ours."""

    words: str
    instance: str = ""
    leaving: bool = False
    """Whether it is about to end by itself: a stage of an instance that was stopped."""


def users_of(specs: Iterable[InstanceSpec], leases: Iterable[Lease], node: str) -> dict[str, list[User]]:
    """The models in use on a node, and who uses each.

    An instance with a stage here is named by the leases of its stages once these have some.
    """
    placed = {s.id: s for s in specs if any(stage.node == node for stage in s.stages)}
    found: dict[str, list[User]] = {}
    leased = set[tuple[str, str]]()
    for lease in sorted(leases, key=lambda x: (x.since_s, x.id)):
        leased.add((lease.model, lease.instance))
        leaving = bool(lease.instance) and lease.instance not in placed
        user = User(words_of(lease), "" if leaving else lease.instance, leaving)
        found.setdefault(lease.model, []).append(user)
    for spec in placed.values():
        if (spec.model, spec.id) not in leased:
            found.setdefault(spec.model, []).append(User(f"instance {spec.id}", spec.id))
    return found


def words(users: Sequence[User]) -> str:
    """`a`, `a and b`, `a, b and c`; of very many the first ones."""
    said = [user.words for user in users[:_NAMED_AT_MOST]]
    said += [f"{len(users) - _NAMED_AT_MOST} more"] if len(users) > _NAMED_AT_MOST else []
    return " and ".join(filter(None, (", ".join(said[:-1]), *said[-1:])))


def how_to_end(users: Iterable[User]) -> str:
    """What a person does so that these let go."""
    stops = [f"`shoal stop {instance}`" for instance in dict.fromkeys(u.instance for u in users if u.instance)]
    first = [f"stop it first with {' and '.join(stops)}"] if stops else []
    others = ["end that program first"] if any(not u.instance and not u.leaving for u in users) else []
    return ", and ".join([*first, *others]) or "it is ending; try again in a moment"
