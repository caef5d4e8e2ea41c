"""Who uses the models of a node, as text for people. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from shoal_common.messages.instances import InstanceSpec
from shoal_common.names import ModelId
from shoal_storage.ledger.lease import ModelLease, describe_holder

_MAX_NAMED = 10


class ModelUser(msgspec.Struct, frozen=True):
    """A user of a model. `instance` is what to stop so that it releases the model, "" for a user of another kind."""

    description: str
    instance: str = ""
    is_ending: bool = False
    """Whether it is about to end by itself: a stage of a stopped instance."""


def users_of(
    specs: Iterable[InstanceSpec], leases: Iterable[ModelLease], node: str
) -> dict[ModelId, list[ModelUser]]:
    """Return the users of each model in use on a node.

    An instance with a stage on the node is represented by the leases of its stages, once these have any.
    """
    placed = {s.id: s for s in specs if any(stage.node == node for stage in s.stages)}
    users: dict[ModelId, list[ModelUser]] = {}
    leased = set[tuple[str, str]]()
    for lease in sorted(leases, key=lambda x: (x.since_s, x.id)):
        leased.add((lease.model, lease.instance))
        leaving = bool(lease.instance) and lease.instance not in placed
        user = ModelUser(describe_holder(lease), "" if leaving else lease.instance, leaving)
        users.setdefault(lease.model, []).append(user)
    for spec in placed.values():
        if (spec.model, spec.id) not in leased:
            users.setdefault(spec.model, []).append(ModelUser(f"instance {spec.id}", spec.id))
    return users


def join_names(users: Sequence[ModelUser]) -> str:
    """Return `a`, `a and b`, or `a, b and c`; of many users, the first ten and a count."""
    names = [user.description for user in users[:_MAX_NAMED]]
    names += [f"{len(users) - _MAX_NAMED} more"] if len(users) > _MAX_NAMED else []
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def release_hint(users: Iterable[ModelUser]) -> str:
    """Return what to do so that these users release the model."""
    commands = [f"`shoal stop {instance}`" for instance in dict.fromkeys(u.instance for u in users if u.instance)]
    stops = [f"stop it first with {' and '.join(commands)}"] if commands else []
    others = ["end that program first"] if any(not u.instance and not u.is_ending for u in users) else []
    return ", and ".join([*stops, *others]) or "it is ending; try again in a moment"
