"""Names that a person typed, against those that the cluster knows: short names of models, and typos, are told here.

The API knows neither: to it a model is `org/name`, and deleting what is not there succeeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shoal_cli.api.client import GatewayClient
from shoal_common.errors import BadInput, BadName, NotFound
from shoal_common.messages.downloads import ENDED_PHASES
from shoal_common.messages.views import InstanceView, StatusView
from shoal_common.names import ModelRef, check_node, repo_of, unknown_name

_MODELS = "`shoal ls` lists the models"


def resolve_model(gateway: GatewayClient, text: str) -> str:
    """Return a model as `org/name[@revision]`. A short name is one of the models that the cluster holds, downloads or
    runs. Raises BadName, NotFound for an unknown short name, BadInput for an ambiguous one.
    """
    if not _is_short(text):
        ModelRef.parse(text)
        return text
    return _resolve(text, _status(gateway))


def known_model(gateway: GatewayClient, text: str) -> str:
    """Return a model that the cluster knows, as `resolve_model`. Raises NotFound for one that it does not."""
    status, model = _status(gateway), text
    if _is_short(text):
        model = _resolve(text, status)
    if ModelRef.parse(model).repo not in _repos(status):
        raise _unknown_model(status, model)
    return model


def model_not_found(gateway: GatewayClient, text: str) -> NotFound:
    """Return the error for a model that a command did not find, with the names that are near if nothing has its."""
    status = _status(gateway)
    if ModelRef.parse(text).repo in _repos(status):
        return NotFound(f"{text} is on no node")
    return _unknown_model(status, text)


def node_not_found(gateway: GatewayClient, node: str) -> NotFound:
    """Return the error for a node that a command did not find."""
    return unknown_node(_status(gateway), node)


def known_nodes(gateway: GatewayClient, nodes: Sequence[str]) -> list[str]:
    """Return nodes that the cluster knows. Raises BadName, NotFound."""
    names = [check_node(node) for node in nodes]
    if names:
        status = _status(gateway)
        known = {n.node for n in status.nodes}
        for node in names:
            if node not in known:
                raise unknown_node(status, node)
    return names


def unknown_node(status: StatusView, node: str) -> NotFound:
    """Return the error for a node that the cluster does not know."""
    return unknown_name("node", node, (n.node for n in status.nodes), "`shoal status` lists them")


def resolve_instance(gateway: GatewayClient, text: str) -> str:
    """Return the id of an instance, named by its id or by its model. Raises NotFound; BadInput if a model has
    several instances."""
    instances = _status(gateway).instances
    found = [i for i in instances if i.id == text] or [i for i in instances if _is_of(i, text)]
    if len(found) > 1:
        listed = ", ".join(f"{i.id} ({i.repo} on {', '.join(i.nodes)})" for i in found)
        raise BadInput(f"{text} has several instances: give the id of one: {listed}")
    if not found:
        names = [name for i in instances for name in (i.id, i.repo)]
        raise unknown_name("instance", text, dict.fromkeys(names), "`shoal ps` lists the instances")
    return found[0].id


def _unknown_model(status: StatusView, text: str) -> NotFound:
    return unknown_name("model", text, _repos(status), _MODELS)


def _is_of(instance: InstanceView, text: str) -> bool:
    name, _, revision = text.partition("@")
    return name in (instance.repo, instance.repo.partition("/")[2]) and revision in ("", instance.commit)


def _is_short(text: str) -> bool:
    if "/" in text.partition("@")[0]:
        return False
    try:
        ModelRef.parse(f"org/{text}")
    except BadName:
        ModelRef.parse(text)  # says what a model is
        raise
    return True


def _resolve(text: str, status: StatusView) -> str:
    name, at, revision = text.partition("@")
    live = _named(name, _live_repos(status)) or _named(name, _repos(status))
    if len(live) > 1:
        raise BadInput(f"{name} is ambiguous: write {' or '.join(live)}")
    if not live:
        raise unknown_name("model", name, _repos(status), f"{_MODELS}; write org/name for one that is not here yet")
    return f"{live[0]}{at}{revision}"


def _named(name: str, repos: Iterable[str]) -> list[str]:
    return [repo for repo in repos if repo.partition("/")[2] == name]


def _live_repos(status: StatusView) -> list[str]:
    """Return what the cluster holds, downloads or runs."""
    downloads = (ModelRef.parse(d.model).repo for d in status.downloads if d.phase not in ENDED_PHASES)
    held = (*(m.repo for m in status.models), *(s.repo for s in status.shards))
    return sorted({*held, *downloads, *(i.repo for i in status.instances)})


def _repos(status: StatusView) -> list[str]:
    """Return every model that something in the cluster names, such as a failed download or a pin."""
    storages = [n.storage for n in status.nodes if n.storage is not None]
    kept = (repo_of(m) for s in storages for m in (*s.pinned, *s.ended_downloads, *s.paused_downloads))
    return sorted({*_live_repos(status), *(ModelRef.parse(d.model).repo for d in status.downloads), *kept})


def _status(gateway: GatewayClient) -> StatusView:
    return gateway.get("/v1/status", StatusView)
