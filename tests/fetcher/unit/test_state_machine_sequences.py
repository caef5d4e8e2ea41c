"""Whatever happens to a download, in any order: it is in a legal phase, and somebody runs it if it is to run."""

from __future__ import annotations

import ast
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

import shoal_fetcher
from shoal_common.errors import QuotaExceeded, ShoalError, Unavailable
from shoal_common.messages.downloads import ENDED_PHASES
from shoal_fetcher.downloads import events as ev
from shoal_fetcher.downloads import state_machine
from shoal_fetcher.downloads.state_machine import ACTIVE_PHASES, MAX_BLOCKED_S, new_state, with_decisions
from shoal_fetcher.errors import BlobHashMismatch, RateLimited
from tests.fetcher.download_life import FULL, HUB_DOWN, LOST, NOW_S, Life

_ERRORS: list[ShoalError] = [FULL, LOST, HUB_DOWN, RateLimited("slower", retry_after_s=1.0), QuotaExceeded("full")]
_FAILURES = st.builds(ev.WorkFailed, st.sampled_from([*_ERRORS, BlobHashMismatch("x")]), st.integers(0, 3))
_LAYERS = st.sampled_from([[], [[0, 2]], [[0, 4]]])
_NOT_STORED = st.just(ev.NotStored(Unavailable("NATS is down")))
_ENDS: dict[type[ev.Action], st.SearchStrategy[ev.DownloadEvent]] = {
    ev.Wait: st.just(ev.WaitOver()),
    ev.Resolve: st.builds(ev.Resolved, _LAYERS) | _FAILURES,
    ev.ReserveSpace: st.builds(ev.Reserved, st.booleans()) | _FAILURES,
    ev.Fetch: st.builds(ev.Fetched, st.booleans()) | _FAILURES,
    ev.Seal: st.just(ev.Sealed()) | _FAILURES,
    ev.AskForSpace: st.sampled_from([ev.SpaceFree(), ev.SpaceShort(None), ev.SpaceShort(FULL.body())]),
    ev.StoreRequest: st.builds(ev.RequestStored, _LAYERS) | _NOT_STORED,
    ev.StorePause: st.just(ev.PauseStored()) | _NOT_STORED,
    ev.StoreResume: st.builds(ev.ResumeStored, _LAYERS) | _NOT_STORED,
    ev.RemoveRequest: st.just(ev.RequestRemoved()) | _NOT_STORED,
    ev.StoreEnd: st.just(ev.EndStored()) | _NOT_STORED,
    ev.Discard: st.just(ev.Discarded()) | _NOT_STORED,
    ev.StoreAgain: st.just(ev.StoredAgain()) | _NOT_STORED,
}
_DOWNLOADS = st.builds(ev.DownloadRequested, st.just("id"), _LAYERS, st.booleans())
_COMMANDS = st.one_of(
    _DOWNLOADS,
    _DOWNLOADS,
    st.builds(ev.CancelRequested, st.booleans()),
    st.just(ev.PauseRequested()),
    st.just(ev.ResumeRequested()),
    st.just(ev.StoreWiped()),
)
_REPORTS = st.builds(ev.SourceWaiting, st.sampled_from(["", "origin b"])) | st.builds(
    ev.ProgressStalled, st.just("f"), st.floats(0, 300), st.just("silence")
)
_NEXT: dict[str, set[str]] = {
    "none": {"queued"},
    "queued": {"reserving", "failed", "rejected", "paused", "discarding"},
    "reserving": {"fetching", "blocked", "failed", "rejected", "queued", "paused", "discarding"},
    "fetching": {"reserving", "verifying", "blocked", "failed", "rejected", "queued", "paused", "discarding"},
    "verifying": {"ready", "reserving", "blocked", "failed", "rejected", "queued", "paused", "discarding"},
    "blocked": {"reserving", "failed", "queued", "paused", "discarding"},
    "paused": {"queued", "discarding"},
    "discarding": {"none", "queued"},
    "ready": {"queued", "discarding"},
    "failed": {"queued", "discarding"},
    "rejected": {"queued", "discarding"},
}
"""The phases that may follow each."""


class Shell:
    """Carries out actions as the task does, with outcomes that are drawn."""

    def __init__(self, data: st.DataObject) -> None:
        self.life, self._draw = Life(), data.draw
        self.work: ev.Work | None = None
        self.answers = 0
        self.is_requested = self.is_paused = False

    def handle(self, event: ev.DownloadEvent) -> None:
        before = self.life.phase
        self.life.on(event)
        after = self.life.phase
        assert after == before or after in _NEXT[before], (before, event, after)
        if before in ENDED_PHASES and after != before:
            assert isinstance(event, ev.RequestStored | ev.RequestRemoved), "an ended download stays ended"
        for action in self.life.actions:
            self._do(action)

    def _do(self, action: ev.Action) -> None:
        if isinstance(action, ev.Work):
            assert self.work is None, "one at a time"
            self.work = action
        elif isinstance(action, ev.StopWork):
            self.work = None
        elif isinstance(action, ev.Answer | ev.Refuse):
            self.answers += 1
        elif isinstance(action, ev.Record):
            outcome = self._draw(_ENDS[type(action)])
            match outcome:
                case ev.RequestStored() | ev.ResumeStored():
                    self.is_requested, self.is_paused = True, False
                case ev.PauseStored():
                    assert self.is_requested
                    self.is_paused = True
                case ev.RequestRemoved() | ev.EndStored():
                    self.is_requested = self.is_paused = False
            self.handle(outcome)

    def finish_work(self) -> None:
        if self.work is not None:
            work, self.work = self.work, None
            self.handle(self._draw(_ENDS[type(work)]))

    def check(self) -> None:
        state, phase = self.life.state, self.life.phase
        assert state.doing == self.work, "what it believes to do is what runs"
        if phase in ACTIVE_PHASES or phase == "discarding":
            assert self.work is not None, "nobody runs it"
        if phase == "paused":
            assert self.work is None and self.is_requested and self.is_paused
        if phase in ACTIVE_PHASES:
            assert self.is_requested and not self.is_paused, "it runs, and nobody wants it"
        if phase in ENDED_PHASES and self.work is None:
            assert not self.is_requested, "an end that nobody stores"
        assert (phase == "blocked") <= (state.blocked_since_s > 0)
        if phase in ("ready", "paused", "none"):
            assert state.waiting_for == "" and state.error is None
        shown = with_decisions(new_state("a", "org/name", NOW_S), state)
        assert shown.phase == (phase if phase not in ("none", "discarding") else "queued")


_STEPS = st.lists(
    st.sampled_from(["work", "work", "command", "command", "report", "stale", "later"]), min_size=20, max_size=60
)


@given(st.data())
def test_any_sequence_of_events_leaves_a_legal_phase(data: st.DataObject) -> None:
    shell = Shell(data)
    shell.handle(ev.Found(None, None))
    for step in data.draw(_STEPS):
        match step:
            case "work":
                shell.finish_work()
            case "command":
                answers = shell.answers
                shell.handle(data.draw(_COMMANDS))
                assert shell.answers == answers + 1, "each command is answered, once"
            case "report" if isinstance(shell.work, ev.Fetch):
                shell.handle(data.draw(_REPORTS))
            case "stale":
                kind = data.draw(st.sampled_from([k for k in _ENDS if issubclass(k, ev.Work)]))
                if not isinstance(shell.work, kind):
                    before = shell.life.state
                    # A failure belongs to any of four kinds of work.
                    event = data.draw(_ENDS[kind])
                    if shell.work is None or not isinstance(event, ev.WorkFailed):
                        shell.handle(event)
                        assert shell.life.state == before, "what belongs to other work is ignored"
            case "later":
                shell.life.now_s += data.draw(st.sampled_from([1.0, 2 * MAX_BLOCKED_S]))
        shell.check()


def test_nothing_else_decides_what_is_published() -> None:
    decided = {"phase", "waiting_for", "blocked_since_s"}
    own = Path(state_machine.__file__)
    found = [
        f"{path.name}:{node.lineno}"
        for path in Path(shoal_fetcher.__path__[0]).rglob("*.py")
        if path != own
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.keyword) and node.arg in decided)
        or (isinstance(node, ast.Attribute) and node.attr in decided and isinstance(node.ctx, ast.Store))
    ]
    assert not found
