"""The cluster as the planner sees it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence, Set

import msgspec

from shoal_common.errors import BadInput, NotFound
from shoal_common.messages.downloads import DownloadState
from shoal_common.messages.instances import InstanceSpec
from shoal_common.messages.liveness import NodeFacts
from shoal_common.messages.model_shape import ModelShape
from shoal_common.messages.storage import ModelState, ShardState
from shoal_common.models.model_shape import DEFAULT_CONTEXT_TOKENS
from shoal_common.names import DEFAULT_REVISION, LOCAL_REVISION, ModelRef
from shoal_placement.network.model import NetworkModel


class ClusterFacts(msgspec.Struct, frozen=True):
    """The facts about the cluster that a layout is chosen by."""

    inference_facts: Mapping[str, NodeFacts]
    """Of every inference service that is live and answers, by node."""
    models: Sequence[ModelState]
    instances: Sequence[InstanceSpec]
    live_nodes: Set[str]
    """Nodes with any live service. A model that only other nodes hold is not available now."""
    shards: Sequence[ShardState] = ()
    downloads: Sequence[DownloadState] = ()
    drained_nodes: Set[str] = frozenset()
    """Nodes where nothing may be placed."""
    links: NetworkModel = NetworkModel()


def find_model(text: str, cluster: ClusterFacts) -> ModelState:
    """Return the model that a name means: the named commit or revision, else the newest of the repository.

    Only models on live nodes count. Raises NotFound when there is none.
    """
    ref = ModelRef.parse(text)
    models = [m for m in cluster.models if m.repo == ref.repo and m.node in cluster.live_nodes]
    if "@" in text:
        models = [m for m in models if ref.revision == m.commit or ref.revision in m.revisions]
    elif any(DEFAULT_REVISION in m.revisions for m in models):
        models = [m for m in models if DEFAULT_REVISION in m.revisions]
    else:
        models = [m for m in models if m.revisions != [LOCAL_REVISION]]
    if not models:
        raise NotFound(f"no live node holds {ref}: download it with `shoal pull {ref}`")
    # Some nodes may have failed to read the model's shape; one that could is enough.
    return max(models, key=lambda m: (m.shape is not None, m.ready_at_s, m.node))


def resolve_context_tokens(requested_tokens: int, shape: ModelShape) -> int:
    """Return the context length in tokens; 0 requested means the default. Raises BadInput above the model's limit."""
    if not 0 <= requested_tokens <= shape.context_tokens:
        raise BadInput(
            f"the model's context is at most {shape.context_tokens} tokens; {requested_tokens} were requested"
        )
    return requested_tokens or min(shape.context_tokens, DEFAULT_CONTEXT_TOKENS)


def instance_id(repo: str, command: str) -> str:
    """Return a short readable id, the same for the same command: `tiny-fish-3f2a1c`."""
    stem = re.sub(r"[^a-z0-9]+", "-", repo.rpartition("/")[2].lower()).strip("-")[:40].strip("-")
    return f"{stem or 'model'}-{hashlib.sha256(command.encode()).hexdigest()[:6]}"
