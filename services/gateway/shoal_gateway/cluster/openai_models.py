"""The model list in OpenAI's shape: one entry for each repo that a node holds or that is placed. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec

from shoal_common.errors import NotFound
from shoal_common.messages.instances import InstancePhase
from shoal_common.messages.storage import ModelState
from shoal_common.names import DEFAULT_REVISION, LOCAL_REVISION, ModelRef
from shoal_gateway.cluster.snapshot import ClusterSnapshot


class PlacedInstance(msgspec.Struct, frozen=True):
    """An instance of a model."""

    id: str
    phase: InstancePhase


class ShoalModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What OpenAI's shape lacks. `commit` and `nodes` are those of the newest commit that a node holds."""

    commit: str
    nodes: list[str]
    instances: list[PlacedInstance]
    ready: bool
    """Whether an instance of the model is ready."""
    size_bytes: int


class OpenAiModel(msgspec.Struct, frozen=True, kw_only=True):
    """One model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    shoal: ShoalModelInfo


class OpenAiModelList(msgspec.Struct, frozen=True, kw_only=True):
    """All models."""

    object: Literal["list"] = "list"
    data: list[OpenAiModel]


def list_models(snapshot: ClusterSnapshot) -> OpenAiModelList:
    """Return all models, sorted by name."""
    return OpenAiModelList(data=[_entry(snapshot, repo, name, commit) for repo, name, commit in _names(snapshot)])


def _names(snapshot: ClusterSnapshot) -> Iterator[tuple[str, str, str | None]]:
    """Yield each repo, its id in the list, and its commit where the id alone does not determine it."""
    for repo in sorted(_repos(snapshot)):
        local = resolve_commit(snapshot.models, ModelRef(repo, LOCAL_REVISION))
        if local and resolve_commit(snapshot.models, ModelRef(repo)) is None:
            yield repo, f"{repo}@{LOCAL_REVISION}", local
        else:
            yield repo, repo, None


def get_model(snapshot: ClusterSnapshot, ref: ModelRef) -> OpenAiModel:
    """Return one model, by `org/name[@revision]`. Raises NotFound."""
    commit = None
    if ref.revision != DEFAULT_REVISION:
        commit = resolve_commit(snapshot.models, ref)
        commit = commit or next(
            (s.commit for s in snapshot.specs.values() if names_model(s.repo, s.commit, ref)), None
        )
        if commit is None:
            raise _unknown(ref)
    elif ref.repo not in _repos(snapshot):
        raise _unknown(ref)
    return _entry(snapshot, ref.repo, str(ref), commit)


def _repos(snapshot: ClusterSnapshot) -> set[str]:
    return {m.repo for m in snapshot.models} | {s.repo for s in snapshot.specs.values()}


def names_model(repo: str, commit: str, ref: ModelRef) -> bool:
    """Return whether `ref` names this repo and commit, as far as the names alone tell."""
    return repo == ref.repo and ref.revision in (DEFAULT_REVISION, commit)


def resolve_commit(models: list[ModelState], ref: ModelRef) -> str | None:
    """Return the newest held commit that a revision (a commit, branch or tag) names, or None."""
    of_repo = [m for m in models if m.repo == ref.repo]
    named = [m for m in of_repo if ref.revision == m.commit or ref.revision in m.revisions]
    if ref.revision == DEFAULT_REVISION:
        named = named or [m for m in of_repo if m.revisions != [LOCAL_REVISION]]
    return max(named, key=lambda m: m.ready_at_s).commit if named else None


def _unknown(ref: ModelRef) -> NotFound:
    return NotFound(f"{ref} is not downloaded on any node; download it with `shoal pull {ref}`", model=str(ref))


def _entry(snapshot: ClusterSnapshot, repo: str, name: str, commit: str | None) -> OpenAiModel:
    commit = commit or resolve_commit(snapshot.models, ModelRef(repo))
    copies = [m for m in snapshot.models if m.repo == repo and m.commit == commit]
    specs = [s for s in snapshot.specs.values() if s.repo == repo and (commit == s.commit or name == repo)]
    states = snapshot.instances
    placed = [PlacedInstance(s.id, states[s.id].phase if s.id in states else "starting") for s in specs]
    times_s = [m.ready_at_s for m in copies] or [s.created_at_s for s in specs]
    return OpenAiModel(
        id=name,
        created=int(min(times_s, default=0.0)),
        owned_by=repo.partition("/")[0],
        shoal=ShoalModelInfo(
            commit=commit or (specs[0].commit if specs else ""),
            nodes=sorted(m.node for m in copies),
            instances=placed,
            ready=any(p.phase == "ready" for p in placed),
            size_bytes=max((m.size_bytes for m in copies), default=0),
        ),
    )
