"""NATS subjects. Only this module builds them."""

from __future__ import annotations

from shoal_common.names import check_blob, check_id, check_node

ROOT = "shoal.v1"
ANY = "any"

COMMANDS = f"{ROOT}.cmd.>"
EVENTS = f"{ROOT}.evt.>"


def command(service: str, node: str, verb: str) -> str:
    """Return the subject of a command for a service of a node, or for the cluster with node `any`."""
    return f"{ROOT}.cmd.{service}.{check_node(node)}.{verb}"


def all_commands(service: str, node: str) -> str:
    """Return the subject of all commands for a service of a node."""
    return f"{ROOT}.cmd.{service}.{check_node(node)}.*"


def consumer_name(service: str, node: str) -> str:
    """Return the name of the consumer of commands for a service of a node, or of `any`."""
    return f"{service}-{check_node(node)}"


def rpc(service: str, node: str, verb: str) -> str:
    """Return the subject of an RPC request to a service of a node."""
    return f"{ROOT}.svc.{service}.{check_node(node)}.{verb}"


def event(service: str, node: str, name: str) -> str:
    """Return the subject of an event; `*` subscribes to all services, nodes or events."""
    return f"{ROOT}.evt.{service}.{node if node == '*' else check_node(node)}.{name}"


def have(node: str, blob: str) -> str:
    """Return the subject of a node's have messages about a blob; node `*` subscribes to all. Not stored."""
    return f"{ROOT}.have.{node if node == '*' else check_node(node)}.{check_blob(blob)}"


def peer_lost(node: str) -> str:
    """Return the subject of reports that a connection to a node broke; node `*` subscribes to all. Not stored."""
    return f"{ROOT}.lost.{node if node == '*' else check_node(node)}"


def join(invitation: str) -> str:
    """Return the subject on which the holder of an invitation asks to join; `*` for all invitations."""
    return f"{ROOT}.join.{invitation if invitation == '*' else check_id(invitation)}"


def leave(node: str) -> str:
    """Return the subject on which a node leaves the cluster; `*` for all nodes."""
    return f"{ROOT}.leave.{node if node == '*' else check_node(node)}"


def is_from_consumer(reply: str) -> bool:
    """Return whether a message with this reply subject was delivered by a consumer of a stream.

    Whoever may create a consumer can have it deliver to any subject, also to one on which it may not publish. So no
    request, report or token counts that came this way.
    """
    return reply.startswith("$JS.")


def tokens(request: str) -> str:
    """Return the subject of one answer's tokens. Not stored."""
    return f"{ROOT}.tok.{check_id(request)}"
