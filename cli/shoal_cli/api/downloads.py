"""One download on one or more nodes: requested, then followed until every node's command has ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from shoal_cli.api.client import GatewayClient
from shoal_cli.api.schema import DownloadsView, JsonObject
from shoal_common.errors import NotFound, ShoalError, Unavailable, from_body
from shoal_common.messages.downloads import ENDED_PHASES
from shoal_common.messages.envelope import Outcome
from shoal_common.messages.views import DownloadView
from shoal_common.names import ModelRef

POLL_INTERVAL_S = 0.5
_SETTLED = ENDED_PHASES | {"paused"}
"""Phases in which the waiting command may have its outcome."""
_OUTAGE_TIMEOUT_S = 30.0
"""A gateway that restarts meanwhile is no reason to stop watching."""


class ProgressDisplay(Protocol):
    """Where progress is shown."""

    def show(self, state: DownloadView, before: dict[str, int]) -> None:
        """Show a node's download as it is now; `before`: bytes by source when it was last shown."""


class ModelPull:
    """One model's download."""

    def __init__(self, gateway: GatewayClient, model: str) -> None:
        self._gateway = gateway
        self.model = str(ModelRef.parse(model))
        self.states: dict[str, DownloadView] = {}
        self.errors: dict[str, ShoalError] = {}
        """What went wrong, by node."""
        self._commands: dict[str, str] = {}

    @property
    def nodes(self) -> list[str]:
        """The nodes that were asked."""
        return list(self._commands)

    def request(self, nodes: Sequence[str], all_nodes: bool, force: bool = False) -> None:
        """Send the download request; `force`: also for a model that cannot run here.

        Raises the error of the first node that refuses.
        """
        body: dict[str, Any] = {"model": self.model, **({"force": True} if force else {})}
        if all_nodes or nodes:
            body["nodes"] = "all" if all_nodes else list(nodes)
        answer = self._gateway.post("/v1/downloads", body, DownloadsView)
        self._commands = answer.commands
        self.states = self._latest(answer)

    def follow(self, display: ProgressDisplay, pause: Callable[[float], None] = time.sleep) -> None:
        """Show progress until the download has ended on every node; `errors` then holds what went wrong."""
        running, before = set(self.nodes), dict[str, dict[str, int]]()
        answered_s = time.monotonic()
        while True:
            try:
                self.states |= self._latest(self._gateway.get("/v1/downloads", DownloadsView))
                for node in sorted(running):
                    state = self.states.get(node)
                    if state is not None:
                        display.show(state, before.get(node, {}))
                        before[node] = dict(state.sources)
                    # An old state may say "ready" or "failed" of an earlier request: the command's outcome decides.
                    if (state is None or state.phase in _SETTLED) and self._has_ended(node):
                        running.discard(node)
                answered_s = time.monotonic()
            except Unavailable:
                if time.monotonic() - answered_s > _OUTAGE_TIMEOUT_S:
                    raise
            if not running:
                return
            pause(POLL_INTERVAL_S)

    def _latest(self, answer: DownloadsView) -> dict[str, DownloadView]:
        return {s.node: s for s in answer.downloads if s.model == self.model and s.node in self._commands}

    def _has_ended(self, node: str) -> bool:
        try:
            outcome = self._gateway.get(f"/v1/commands/{self._commands[node]}", Outcome)
        except NotFound:
            return False
        if outcome.error is not None:
            self.errors[node] = from_body(outcome.error)
        return True

    def to_json(self) -> JsonObject:
        """Return the document that `--json` prints."""
        answer = self._gateway.get("/v1/downloads", JsonObject)
        own = [d for d in answer["downloads"] if d["model"] == self.model and d["node"] in self._commands]
        return {"downloads": own, "commands": self._commands}
