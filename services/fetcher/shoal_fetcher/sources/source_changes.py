"""Notices when another source serves a file of a download. Pure: time arrives as `now_s`.

A file may come from several sources at a time. One of them counts as its source until it fails, or sends nothing for
STALE_S while another one does.
"""

from __future__ import annotations

import msgspec

STALE_S = 5.0
MIN_INTERVAL_S = 30.0
"""Between two reported changes of one file."""


class SourceChange(msgspec.Struct, frozen=True):
    """A file comes from another source now: the hub or a node."""

    path: str
    before: str
    now: str


class _Serving(msgspec.Struct):
    source: str
    received_at_s: float
    has_failed: bool = False
    reported_at_s: float = float("-inf")


class SourceChanges:
    """The source of each file of one download."""

    def __init__(self) -> None:
        self._serving: dict[str, _Serving] = {}

    def received(self, path: str, source: str, now_s: float) -> SourceChange | None:
        """Record bytes of a file. Returns the change of its source, if there is one to report."""
        serving = self._serving.get(path)
        if serving is None:
            self._serving[path] = _Serving(source, now_s)
            return None
        before = serving.source
        is_change = source != before and (serving.has_failed or now_s - serving.received_at_s >= STALE_S)
        if source == before or is_change:
            serving.source, serving.received_at_s, serving.has_failed = source, now_s, False
        if not is_change or now_s - serving.reported_at_s < MIN_INTERVAL_S:
            return None
        serving.reported_at_s = now_s
        return SourceChange(path, before, source)

    def failed(self, path: str, source: str = "") -> None:
        """Record that a source of a file failed; without `source`, the one that counts as its source."""
        serving = self._serving.get(path)
        if serving is not None and source in ("", serving.source):
            serving.has_failed = True
