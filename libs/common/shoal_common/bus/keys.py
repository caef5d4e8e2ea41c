"""The keys of the buckets: the only place that spells them."""

from __future__ import annotations

from shoal_common.names import ModelId, check_id, check_node, quote_key


def liveness_key(node: str, service: str) -> str:
    """Key in `live` of a node's service."""
    return f"{check_node(node)}.{service}"


def download_key(node: str, model: str) -> str:
    """Key in `spec` and `state` of a download of a model (`org/name[@revision]`) to a node."""
    return f"download.{check_node(node)}.{quote_key(model)}"


def model_key(node: str, model: ModelId) -> str:
    """Key in `state` of a model that a node holds."""
    return f"model.{check_node(node)}.{quote_key(model)}"


def shard_key(node: str, model: ModelId) -> str:
    """Key in `state` of a node's shard of a model."""
    return f"shard.{check_node(node)}.{quote_key(model)}"


def node_key(node: str) -> str:
    """Key in `state` of a node that is down, and in `spec` of a drained one."""
    return f"node.{check_node(node)}"


def member_key(node: str) -> str:
    """Key in `spec` of a node that belongs to the cluster."""
    return f"member.{check_node(node)}"


def storage_key(node: str) -> str:
    """Key in `state` of a node's disk."""
    return f"storage.{check_node(node)}"


def links_key(node: str) -> str:
    """Key in `state` of a node's link measurements."""
    return f"links.{check_node(node)}"


def instance_key(instance: str) -> str:
    """Key in `spec` and `state` of an instance."""
    return f"instance.{check_id(instance)}"


def stage_key(instance: str, rank: int) -> str:
    """Key in `state` of a stage of an instance."""
    return f"stage.{check_id(instance)}.{rank}"


def origin_key(blob: str) -> str:
    """Key in `lease` of the node that reads a blob from the hub."""
    return f"origin.{blob}"


def leader_key(service: str) -> str:
    """Key in `lease` of a service's leader."""
    return f"leader.{service}"


def done_key(command: str) -> str:
    """Key in `done` of a command's outcome."""
    return check_id(command)


MEMBERS_KEY = "members.placement"
"""In `state`; the leader writes it."""
