"""The life of a download, rule by rule."""

from __future__ import annotations

import pytest
from msgspec import structs

from shoal_common.errors import (
    Corrupt,
    Denied,
    DiskFull,
    HubUnavailable,
    InternalError,
    NatsDown,
    NotFound,
    QuotaExceeded,
    ShoalError,
    Unavailable,
)
from shoal_common.messages.downloads import ENDED_PHASES, DownloadRequest, DownloadState
from shoal_fetcher.downloads import events as ev
from shoal_fetcher.downloads.state_machine import (
    MAX_BLOCKED_S,
    NO_PROGRESS_TIMEOUT_S,
    end_phase,
    merge_layers,
)
from shoal_fetcher.errors import BlobHashMismatch, RateLimited
from tests.fetcher.download_life import FULL, HUB_DOWN, LOST, NOW_S, Life, failed, fetching, published, requested

# The way to the end


def test_a_download_goes_from_queued_to_ready() -> None:
    life = Life()
    assert life.on(ev.Found(None, None)) == ()
    assert life.on(ev.DownloadRequested("id", [])) == [ev.StoreRequest("id", [])]
    assert life.phase == "none", "nothing begins before the request is stored"
    *_, publish, resolve, answer = life.on(ev.RequestStored([]))
    assert (life.phase, publish, resolve, answer) == ("queued", ev.Publish(), ev.Resolve(), ev.Answer())
    assert life.on(ev.Resolved([])) == (ev.Publish(), ev.ReserveSpace())
    assert (life.phase, life.state.waiting_for) == ("reserving", "storage")
    assert life.on(ev.Reserved()) == (ev.Publish(), ev.Fetch())
    assert (life.phase, life.state.waiting_for) == ("fetching", "")
    assert life.on(ev.Fetched()) == (ev.Publish(), ev.Seal())
    assert life.phase == "verifying"
    assert life.on(ev.Sealed()) == (ev.StoreEnd(),)
    assert life.on(ev.EndStored()) == () and life.phase == "ready" and life.state.doing is None


def test_a_shard_is_reserved_and_fetched_in_rounds() -> None:
    life = fetching([[0, 2]])
    assert life.on(ev.Fetched(has_more=True)) == (ev.Publish(), ev.ReserveSpace()) and life.phase == "reserving"
    life.on(ev.Reserved(), ev.Fetched())
    assert life.phase == "verifying"


def test_a_whole_model_that_is_present_ends_a_shards_rounds() -> None:
    life = requested([[0, 2]], ev.Resolved([[0, 2]]))
    assert life.on(ev.Reserved(is_whole_model=True)) == (ev.Publish(), ev.ReserveSpace())
    assert life.state.layers == [] and life.phase == "reserving"


def test_without_leaf_lists_all_layers_are_fetched() -> None:
    assert requested([[0, 2]], ev.Resolved([])).state.layers == []


# Retries


def test_an_outage_of_NATS_ends_no_download() -> None:
    out, life = NatsDown("NATS has not answered for 60 s"), requested([])
    for _ in range(50):
        assert isinstance(life.on(failed(out))[-1], ev.Wait) and life.phase == "queued"
        life.on(ev.WaitOver())
    life.on(ev.Resolved([]))
    for at_work in ((), (ev.Reserved(),), (ev.Reserved(), ev.Fetched())):
        for _ in range(50):
            assert life.on(*at_work, failed(out))[-1] == ev.ReserveSpace(again=True)
            assert life.phase == "reserving"


def test_a_down_hub_is_asked_four_times() -> None:
    life = requested()
    for wait_s in (0.25, 0.5, 1.0):
        assert life.on(failed(HUB_DOWN)) == (ev.Wait(wait_s),)
        assert (life.phase, life.state.waiting_for) == ("queued", HUB_DOWN.message)
        assert life.on(ev.WaitOver()) == (ev.Resolve(),)
    assert life.on(failed(HUB_DOWN)) == (ev.StoreEnd(release=False),) and life.phase == "failed"


def test_a_hub_that_limits_us_is_waited_for_as_it_asks() -> None:
    assert requested().on(failed(RateLimited("slower", retry_after_s=77.0))) == (ev.Wait(77.0),)


def test_a_hub_that_is_switched_off_is_not_asked_again() -> None:
    life = requested()
    life.on(ev.WorkFailed(HUB_DOWN, 0, may_retry=False))
    assert life.phase == "failed"


@pytest.mark.parametrize("error", [NotFound("no such model"), Denied("gated"), InternalError("x")])
def test_other_errors_of_the_listing_end_the_download(error: ShoalError) -> None:
    life = requested()
    life.on(failed(error))
    assert life.phase == "failed" and life.state.error == error.body()


def test_a_new_request_has_its_own_attempts_at_the_hub() -> None:
    life = requested(None, *[failed(HUB_DOWN), ev.WaitOver()] * 3, failed(HUB_DOWN), ev.EndStored())
    assert life.phase == "failed"
    life.on(ev.RequestStored([]))
    assert life.on(failed(HUB_DOWN)) == (ev.Wait(0.25),)


def test_a_reservation_lost_three_times_ends_the_download() -> None:
    life = fetching()
    for _ in range(2):
        assert life.on(failed(LOST)) == (ev.Publish(), ev.ReserveSpace(again=True)) and life.phase == "reserving"
        life.on(ev.Reserved())
    life.on(failed(LOST))
    assert life.phase == "failed"


def test_a_new_leaf_resets_the_count_of_lost_reservations() -> None:
    life = fetching()
    for done_bytes in (1, 1, 2, 2, 3, 3, 4):
        life.on(failed(LOST, done_bytes), ev.Reserved())
        assert life.phase == "fetching"
    life.on(failed(LOST, 4), ev.Reserved(), failed(LOST, 3))
    assert life.phase == "failed", "fewer durable bytes are no progress"


def test_corrupt_leaves_of_a_shard_are_fetched_twice_again() -> None:
    life = fetching([[0, 2]])
    for _ in range(2):
        life.on(ev.Fetched())
        assert life.on(failed(BlobHashMismatch("corrupt"))) == (ev.Publish(), ev.ReserveSpace(again=True))
        life.on(ev.Reserved())
    life.on(ev.Fetched(), failed(BlobHashMismatch("corrupt")))
    assert life.phase == "failed"


def test_a_corrupt_blob_of_a_whole_model_ends_it() -> None:
    life = fetching()
    life.on(failed(BlobHashMismatch("corrupt")))
    assert life.phase == "failed"


def test_I7_no_progress_for_two_minutes_ends_the_work() -> None:
    life = fetching()
    assert life.on(ev.ProgressStalled("model.safetensors", NO_PROGRESS_TIMEOUT_S, "broke off")) == ()
    (fail,) = life.on(ev.ProgressStalled("model.safetensors", NO_PROGRESS_TIMEOUT_S + 1, "broke off"))
    assert isinstance(fail, ev.FailWork) and isinstance(fail.error, Unavailable)
    assert fail.error.message == "no progress on model.safetensors for 120 s (broke off); pull again to resume"
    life.on(failed(fail.error))
    assert life.phase == "failed"


@pytest.mark.parametrize("done_bytes", [0, 1])
def test_a_failure_without_a_durable_byte_releases_all(done_bytes: int) -> None:
    assert fetching().on(failed(Corrupt("x"), done_bytes)) == (ev.StoreEnd(release=not done_bytes),)


def test_an_exceeded_quota_rejects_and_everything_else_fails() -> None:
    assert end_phase(QuotaExceeded("full")) == "rejected"
    assert {end_phase(e("x")) for e in (InternalError, NotFound, Denied, Corrupt, HubUnavailable)} == {"failed"}


# A full disk


def test_a_full_disk_blocks_until_there_is_space() -> None:
    life = fetching()
    assert life.on(failed(FULL)) == (ev.Publish(), ev.AskForSpace(0.0, "a" * 64))
    assert life.phase == "blocked" and life.state.error == FULL.body() and life.state.blocked_since_s == NOW_S
    shortage = DiskFull("disk full: 7 B more needed").body()
    assert life.on(ev.SpaceShort(shortage)) == (ev.AskForSpace(5.0, "a" * 64),)
    assert (life.state.waiting_for, life.state.error) == (shortage.message, shortage)
    assert life.on(ev.SpaceShort(None)) == (ev.AskForSpace(10.0, "a" * 64),), "storage restarts, and is asked again"
    assert life.on(ev.SpaceFree()) == (ev.Publish(), ev.ReserveSpace(again=True))
    assert life.phase == "reserving" and life.state.error is None


def test_attempts_that_write_nothing_come_after_longer_waits() -> None:
    life = fetching()
    life.on(failed(FULL), ev.SpaceFree(), ev.Reserved())
    for wait_s in (1.0, 2.0, 4.0):
        assert life.on(failed(FULL)) == (ev.Publish(), ev.Wait(wait_s))
        assert life.on(ev.WaitOver()) == (ev.AskForSpace(0.0, "a" * 64),)
        life.on(ev.SpaceFree(), ev.Reserved())
    assert life.on(failed(FULL, 2)) == (ev.Publish(), ev.AskForSpace(0.0, "a" * 64)), "a new leaf: no wait"


def test_I7_a_day_without_space_ends_in_an_error_that_names_it() -> None:
    life = fetching()
    life.on(failed(FULL), ev.SpaceShort(DiskFull("disk full: 7 B more needed").body()))
    life.now_s += MAX_BLOCKED_S
    life.on(ev.SpaceShort(None))
    assert life.phase == "blocked"
    life.now_s += 1
    assert life.on(ev.SpaceShort(None)) == (ev.StoreEnd(release=False),)
    assert life.phase == "failed" and life.state.error is not None and life.state.error.code == "disk_full"
    assert life.state.error.message.startswith(
        "the disk was full for 24 h while org/name arrived (disk full: 7 B more needed)"
    )


@pytest.mark.parametrize("moved", [False, True])
def test_I7_the_deadline_moves_only_with_durable_bytes(moved: bool) -> None:
    before = published("blocked", done_bytes=10, blocked_since_s=NOW_S - 100)
    life = Life()
    life.on(ev.Found(DownloadRequest(model="org/name", requested_at_s=0), before), ev.Resolved([]), ev.Reserved())
    life.on(failed(FULL, 11 if moved else 10))
    assert life.phase == "blocked" and life.state.blocked_since_s == (NOW_S if moved else NOW_S - 100)


# Commands


def test_a_pause_stops_the_work_once_it_is_stored() -> None:
    life = fetching()
    before = life.state
    (store,) = life.on(ev.PauseRequested())
    assert isinstance(store, ev.StorePause) and "`shoal resume org/name` continues it" in store.error.message
    assert life.state == before, "it runs until the pause is stored"
    assert life.on(ev.PauseStored()) == [ev.StopWork(), ev.Publish(), ev.EmitPaused(), ev.Answer("paused")]
    assert life.phase == "paused" and life.state.doing is None
    assert life.on(ev.PauseRequested()) == [ev.Answer("was_paused")]


@pytest.mark.parametrize(
    "command",
    [ev.DownloadRequested("id", []), ev.PauseRequested(), ev.CancelRequested()],
    ids=lambda c: type(c).__name__,
)
def test_a_command_that_cannot_be_stored_changes_nothing(command: ev.DownloadEvent) -> None:
    life, error = fetching(), Unavailable("NATS is down")
    before = life.state
    life.on(command)
    assert life.on(ev.NotStored(error)) == [ev.Refuse(error)] and life.state == before


def test_a_resumed_download_begins_again() -> None:
    life = fetching()
    life.on(ev.PauseStored())
    assert life.on(ev.ResumeRequested()) == [ev.StoreResume()] and life.phase == "paused"
    actions = life.on(ev.ResumeStored([]))
    assert life.phase == "queued" and ev.Begin(forget_sources=False) in actions and ev.Resolve() in actions
    assert actions[-1] == ev.Answer("resumed")
    assert life.on(ev.ResumeRequested()) == [ev.Answer("under_way")]


def test_services_leave_a_paused_download_paused() -> None:
    life = fetching()
    life.on(ev.PauseStored())
    (refuse,) = life.on(ev.DownloadRequested("id", [], keep_paused=True))
    assert isinstance(refuse, ev.Refuse) and refuse.error.code == "paused"
    assert life.on(ev.DownloadRequested("id", [])) == [ev.StoreRequest("id", [])]


def test_more_layers_restart_a_download_and_fewer_do_not() -> None:
    life = fetching([[0, 4]])
    before = life.state
    assert life.on(ev.RequestStored([[0, 4]])) == [ev.Answer()] and life.state == before
    assert ev.StopWork() in life.on(ev.RequestStored([[0, 8]]))
    assert life.phase == "queued" and life.state.layers == [[0, 8]]
    life.on(ev.RequestStored([]))
    assert life.phase == "queued" and life.state.layers == []


@pytest.mark.parametrize(("layers", "more"), [([], [[0, 2]]), ([[0, 2]], [])])
def test_layers_and_the_whole_model_are_the_whole_model(layers: list[list[int]], more: list[list[int]]) -> None:
    assert merge_layers(layers, more) == []


def test_a_cancelled_download_is_discarded_until_it_is() -> None:
    life = fetching()
    assert life.on(ev.CancelRequested()) == [ev.RemoveRequest()] and life.phase == "fetching"
    assert life.on(ev.RequestRemoved()) == (ev.StopWork(), ev.Discard()) and life.phase == "discarding"
    down = Unavailable("storage is down")
    assert life.on(ev.NotStored(down)) == (ev.Refuse(down), ev.Wait(0.25))
    assert life.on(ev.WaitOver()) == (ev.Discard(),)
    assert life.on(ev.Discarded()) == [ev.Answer("cancelled")] and life.phase == "none"


def test_a_cancelled_download_that_is_wanted_again_begins() -> None:
    life = fetching()
    life.on(ev.RequestRemoved(), ev.NotStored(Unavailable("storage is down")), ev.RequestStored([]))
    assert life.phase == "queued" and isinstance(life.state.doing, ev.Resolve)


@pytest.mark.parametrize("deletes_model", [False, True])
def test_only_a_deletion_forgets_a_ready_download(deletes_model: bool) -> None:
    life = Life()
    life.on(ev.Found(None, published("ready")))
    expected = ev.RemoveRequest() if deletes_model else ev.Answer()
    assert life.on(ev.CancelRequested(deletes_model)) == [expected]


@pytest.mark.parametrize("command", [ev.PauseRequested(), ev.ResumeRequested()], ids=["pause", "resume"])
def test_what_does_not_run_is_answered_by_its_phase(command: ev.DownloadEvent) -> None:
    for phase in ENDED_PHASES:
        life = Life()
        life.on(ev.Found(None, published(phase)))
        assert life.on(command) == [ev.Answer(phase)]
    assert Life().on(command) == [ev.Answer("unknown")]


def test_an_end_that_cannot_be_stored_is_stored_later() -> None:
    life = fetching()
    life.on(ev.Fetched(), ev.Sealed())
    error = Unavailable("NATS is down")
    assert life.on(ev.NotStored(error)) == (ev.Refuse(error), ev.Wait(0.25)) and life.phase == "ready"
    assert life.on(ev.WaitOver()) == (ev.StoreEnd(),)


# What is found at the start

REQUEST = DownloadRequest(model="org/name", requested_at_s=NOW_S)
PAUSED = structs.replace(REQUEST, paused=True)


@pytest.mark.parametrize(
    ("request_", "state", "phase", "doing"),
    [
        (REQUEST, None, "queued", ev.Resolve()),
        (REQUEST, published("fetching"), "queued", ev.Resolve()),
        (REQUEST, published("failed", updated_at_s=NOW_S - 1), "queued", ev.Resolve()),
        (REQUEST, published("failed", updated_at_s=NOW_S), "failed", ev.StoreEnd()),
        (PAUSED, published("fetching"), "paused", None),
        (PAUSED, published("ready"), "ready", ev.StoreEnd()),
        (None, published("fetching"), "discarding", ev.Discard()),
        (None, published("paused"), "discarding", ev.Discard()),
        (None, published("rejected"), "rejected", None),
        (None, None, "none", None),
    ],
)
def test_a_start_goes_on_where_the_last_one_ended(
    request_: DownloadRequest | None, state: DownloadState | None, phase: str, doing: ev.Action | None
) -> None:
    life = Life()
    life.on(ev.Found(request_, state))
    assert (life.phase, life.state.doing) == (phase, doing)
