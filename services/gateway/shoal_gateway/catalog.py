"""Models as OpenAI lists them: one entry for each repo that is held or placed somewhere. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec

from shoal_common.errors import NotFound
from shoal_common.messages.records import InstancePhase, ModelState
from shoal_common.names import DEFAULT_REVISION, LOCAL_REVISION, ModelRef
from shoal_gateway.picture import Picture


class PlacedView(msgspec.Struct, frozen=True):
    """An instance of a model."""

    id: str
    phase: InstancePhase


class ShoalFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What OpenAI's shape has no place for. `commit` and `nodes` are of the newest commit that is held."""

    commit: str
    nodes: list[str]
    instances: list[PlacedView]
    ready: bool
    """Whether an instance of it answers now."""
    size_bytes: int


class CatalogEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    shoal: ShoalFacts


class Catalog(msgspec.Struct, frozen=True, kw_only=True):
    """All models."""

    object: Literal["list"] = "list"
    data: list[CatalogEntry]


def catalog(picture: Picture) -> Catalog:
    """All models, by name."""
    return Catalog(data=[_entry(picture, repo, name, commit) for repo, name, commit in _names(picture)])


def _names(picture: Picture) -> Iterator[tuple[str, str, str | None]]:
    """Each repo, what it is called, and its commit where that name alone would not say."""
    for repo in sorted(_repos(picture)):
        local = commit_of(picture.models, ModelRef(repo, LOCAL_REVISION))
        if local and commit_of(picture.models, ModelRef(repo)) is None:
            yield repo, f"{repo}@{LOCAL_REVISION}", local
        else:
            yield repo, repo, None


def catalog_entry(picture: Picture, ref: ModelRef) -> CatalogEntry:
    """One model, by `org/name[@revision]`. Raises NotFound."""
    commit = None
    if ref.revision != DEFAULT_REVISION:
        commit = commit_of(picture.models, ref)
        commit = commit or next((s.commit for s in picture.specs.values() if is_of(s.repo, s.commit, ref)), None)
        if commit is None:
            raise _unknown(ref)
    elif ref.repo not in _repos(picture):
        raise _unknown(ref)
    return _entry(picture, ref.repo, str(ref), commit)


def _repos(picture: Picture) -> set[str]:
    return {m.repo for m in picture.models} | {s.repo for s in picture.specs.values()}


def is_of(repo: str, commit: str, ref: ModelRef) -> bool:
    """Whether something of this repo and commit is what `ref` names, as far as names alone tell."""
    return repo == ref.repo and ref.revision in (DEFAULT_REVISION, commit)


def commit_of(models: list[ModelState], ref: ModelRef) -> str | None:
    """The newest held commit that a revision (a commit, a branch, a tag) names, or None."""
    of_repo = [m for m in models if m.repo == ref.repo]
    named = [m for m in of_repo if ref.revision == m.commit or ref.revision in m.revisions]
    if ref.revision == DEFAULT_REVISION:
        named = named or [m for m in of_repo if m.revisions != [LOCAL_REVISION]]
    return max(named, key=lambda m: m.ready_at_s).commit if named else None


def _unknown(ref: ModelRef) -> NotFound:
    return NotFound(f"no node holds {ref}, and it is not placed; `shoal pull {ref}` brings it here", model=str(ref))


def _entry(picture: Picture, repo: str, name: str, commit: str | None) -> CatalogEntry:
    commit = commit or commit_of(picture.models, ModelRef(repo))
    held = [m for m in picture.models if m.repo == repo and m.commit == commit]
    specs = [s for s in picture.specs.values() if s.repo == repo and (commit == s.commit or name == repo)]
    states = picture.instances
    placed = [PlacedView(s.id, states[s.id].phase if s.id in states else "starting") for s in specs]
    moments = [m.ready_at_s for m in held] or [s.created_at_s for s in specs]
    return CatalogEntry(
        id=name,
        created=int(min(moments, default=0.0)),
        owned_by=repo.partition("/")[0],
        shoal=ShoalFacts(
            commit=commit or (specs[0].commit if specs else ""),
            nodes=sorted(m.node for m in held),
            instances=placed,
            ready=any(p.phase == "ready" for p in placed),
            size_bytes=max((m.size_bytes for m in held), default=0),
        ),
    )
