"""Settings that name files of a node's machine: written into node.toml there, whose permissions are the authority.

Storage then reads the file again. What it refuses is put back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from shoal_cli.api.client import GatewayClient
from shoal_cli.api.node_answers import NodeSelection
from shoal_cli.api.schema import JsonObject
from shoal_cli.node_home import Home
from shoal_common.config import read_settings_file, saved_node_id, settings_path
from shoal_common.errors import BadInput, Expired, Refused, ShoalError, Unavailable
from shoal_common.settings.declaration import Value
from shoal_common.settings.node import StorageSettings
from shoal_common.settings.values import by_section, changeable, read_settings
from shoal_common.settings_file import change_settings


def own_node(home: Home, gateway: GatewayClient, selection: NodeSelection, is_given: bool) -> str:
    """Return the id of this home's node. Raises BadInput, Refused for a selection that means another one.

    `is_given`: somebody named the gateway, which then must be reachable.
    """
    if selection.all_nodes:
        raise BadInput(
            "libraries and volumes are set on one node at a time: leave out --all, and run this on each node"
        )
    own, meant = saved_node_id(home.root), selection.node
    if not meant:
        try:
            meant = str(gateway.get("/v1/storage", JsonObject).get("node", ""))
        except Unavailable:
            if is_given:
                raise
            meant = own
    if not own or meant != own:
        raise Refused(
            f"libraries and volumes are set on the node itself: run this command on {meant or 'it'}, as the user who "
            f"runs it ({home.root} is the home of {own or 'no node'})"
        )
    return own


def set_on_own_node(
    home: Home, gateway: GatewayClient, node: str, changed: Callable[[StorageSettings], Mapping[str, Value]]
) -> JsonObject:
    """Write settings into this home's node.toml and have storage apply them. Returns the API's answer.

    `changed` returns the new values, by key, for the settings in the file. The answer has no nodes if storage does
    not run: it reads the file when it starts. Raises the refusal of storage, with the file as it was.
    """
    saved = read_settings_file(home.root)
    changes = changed(read_settings(StorageSettings, saved, {}))
    change_settings(home.root, by_section(StorageSettings, changes), lambda s: read_settings(StorageSettings, s, {}))
    try:
        answer = gateway.post("/v1/storage/reload", {"node": node}, JsonObject)
    except Unavailable:
        return {
            "nodes": {},
            "note": f"{settings_path(home.root)} is written; it applies when storage of {node} starts",
        }
    except Expired:
        raise
    except ShoalError:
        _put_back(home, saved, changes)
        raise
    overridden = [key for key in answer.get("nodes", {}).get(node, {}).get("overridden_by_env", []) if key in changes]
    if overridden:
        _put_back(home, saved, changes)
        with suppress(ShoalError):
            gateway.post("/v1/storage/reload", {"node": node}, JsonObject)
        raise Refused(
            f"{overridden[0]} is set by the environment, which overrides the file: unset "
            f"SHOAL_{overridden[0].upper()} for storage and restart it; nothing was changed"
        )
    return answer


def _put_back(home: Home, saved: Mapping[str, Any], changes: Mapping[str, Value]) -> None:
    before = {s.key: saved.get(s.section, {}).get(s.key) for s in changeable(StorageSettings) if s.key in changes}
    change_settings(home.root, by_section(StorageSettings, before), lambda _: None)
