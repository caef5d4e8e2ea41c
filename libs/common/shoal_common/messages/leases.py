"""Leases of models."""

from __future__ import annotations

from shoal_common.messages import WireStruct


class AcquireLease(WireStruct):
    """`svc.storage.<node>.lease`: a lease on a model, with a view of its own; the model stays while it is held."""

    model: str
    """`org/name@revision`."""
    holder: str
    """Who asks, in words for people."""
    instance: str = ""
    """The instance that uses the model, if any."""
    layers: list[int] = []
    """`[first, last)`: a shard with what a stage with these layers needs is enough, if the model is not complete."""


class LeaseGrant(WireStruct):
    """A lease. It lasts while a process holds a flock on `lock`, and ends when none does, however that came about."""

    id: str
    """The lease's id."""
    commit: str
    """Commit of the model."""
    view: str
    """Absolute path of the directory with the model's files."""
    lock: str
    """Absolute path of the file to take a shared flock on, within 30 s."""
    leaf_ranges: dict[str, list[list[int]]] = {}
    """For a shard: available leaf ranges of each incomplete file, by path in the view. The other bytes are zeros."""


class ReleaseLease(WireStruct):
    """`svc.storage.<node>.release_lease`: end a lease that nobody holds; one that has ended already is fine."""

    id: str
    """The lease's id."""
