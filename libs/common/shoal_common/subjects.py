"""The only place where subject strings are made."""

from __future__ import annotations

from shoal_common.names import check_blob, check_id, check_node

ROOT = "shoal.v1"
ANY = "any"
SERVICES = ("storage", "fetcher", "fileserver", "placement", "inference", "gateway")

COMMANDS = f"{ROOT}.cmd.>"
EVENTS = f"{ROOT}.evt.>"


def command(service: str, node: str, verb: str) -> str:
    """Where a command for a service of a node goes; node `any` lets the cluster answer."""
    return f"{ROOT}.cmd.{service}.{check_node(node)}.{verb}"


def commands_of(service: str, node: str) -> str:
    """All commands for a service of a node."""
    return f"{ROOT}.cmd.{service}.{check_node(node)}.*"


def durable(service: str, node: str) -> str:
    """The consumer that brings a service of a node (or `any`) its commands."""
    return f"{service}-{check_node(node)}"


def question(service: str, node: str, verb: str) -> str:
    """Where a question to a service of a node goes."""
    return f"{ROOT}.svc.{service}.{check_node(node)}.{verb}"


def event(service: str, node: str, name: str) -> str:
    """Where a service tells what happened; `*` listens to all services, nodes or events."""
    return f"{ROOT}.evt.{service}.{node if node == '*' else check_node(node)}.{name}"


def have(node: str, blob: str) -> str:
    """Where a node tells what it has of a blob that it is fetching; node `*` listens to all."""
    return f"{ROOT}.have.{node if node == '*' else check_node(node)}.{check_blob(blob)}"


def lost(node: str) -> str:
    """Where somebody tells that a connection to a node broke; node `*` listens to all. Core NATS, kept nowhere."""
    return f"{ROOT}.lost.{node if node == '*' else check_node(node)}"


def tokens(request: str) -> str:
    """Where the tokens of one answer go: core NATS, kept nowhere."""
    return f"{ROOT}.tok.{check_id(request)}"
