"""Pausing, resuming and cancelling downloads."""

from __future__ import annotations

from typing import Any

import msgspec

from shoal_cli.api.client import GatewayClient
from shoal_cli.api.names import known_model, resolve_model
from shoal_cli.api.schema import DownloadControlView, JsonObject
from shoal_cli.cli_context import CommandResult
from shoal_common.names import ModelRef, check_node

_TEXTS = {
    "paused": "is paused; its bytes are kept, and `shoal resume {model}` continues it",
    "was_paused": "was already paused",
    "resumed": "continues",
    "under_way": "is already running",
    "unknown": "is not being downloaded",
    "rejected": "was rejected and is not retried: `shoal pull {model}` requests it again",
    "failed": "has failed: `shoal pull {model}` tries again",
}


def control_downloads(
    gateway: GatewayClient, verb: str, model: str, nodes: list[str], all_nodes: bool
) -> CommandResult:
    """Send `pause`, `resume` or `cancel` for one model, or for all (""). Raises NotFound for a model that no node
    downloads and nobody knows."""
    named = [check_node(n) for n in nodes]
    model = str(ModelRef.parse(resolve_model(gateway, model))) if model else ""
    body: dict[str, Any] = {"model": model}
    if all_nodes or nodes:
        body["nodes"] = "all" if all_nodes else named
    answer = gateway.post(f"/v1/downloads/{verb}", body, JsonObject)
    lines = list[str]()
    if model and all(_is_unknown(fields, verb) for fields in answer.get("nodes", {}).values()):
        known_model(gateway, model)
    for node, fields in answer.get("nodes", {}).items():
        result = msgspec.convert(fields, DownloadControlView)
        if verb == "cancel":
            text = (
                "cancelled; what had arrived is deleted"
                if result.cancelled
                else control_result_text(model, result.was)
            )
            lines.append(f"{node}: {model} {text}")
            continue
        lines += [f"{node}: {name} {control_result_text(name, now)}" for name, now in sorted(result.models.items())]
        if not result.models:
            lines.append(f"{node}: nothing is being downloaded")
    return CommandResult(
        answer, lines or [f"no download of {model} is running" if model else "no download is running"]
    )


def _is_unknown(fields: dict[str, Any], verb: str) -> bool:
    result = msgspec.convert(fields, DownloadControlView)
    if verb == "cancel":
        return not result.cancelled and result.was in ("", "unknown")
    return set(result.models.values()) <= {"unknown"}


def control_result_text(model: str, now: str) -> str:
    """Return what became of a download. Pure."""
    return _TEXTS.get(now, f"is {now}").format(model=model)
