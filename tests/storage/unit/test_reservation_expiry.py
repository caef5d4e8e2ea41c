"""Reservations that nobody fetches end, their bytes may be evicted and are later deleted; downloads keep theirs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal_common.messages.downloads import DownloadRequest, DownloadState
from shoal_common.names import ModelId, model_id
from shoal_storage.admission.reservation_expiry import (
    FETCHER_DOWN_AFTER_S,
    RENEW_INTERVAL_S,
    RESERVATION_GRACE_S,
    DownloadRequestView,
    download_requests,
    expiry_actions,
    paused_models,
)
from shoal_storage.eviction.planner import find_garbage, plan_eviction, protected_models
from shoal_storage.ledger.entries import PartialBlobInfo
from shoal_storage.ledger.references import bytes_of_paused_models
from tests.storage.ledger_builder import build_ledger
from tests.storage.unit.test_eviction_planner import manifest_of

NOW_S = 1_800_000_000.0


DAY_S = 86400


COMMIT = "c" * 40


MODEL = model_id("org/model", COMMIT)


SPANS_S = st.sampled_from(
    [0.0, 1.0, RENEW_INTERVAL_S, RESERVATION_GRACE_S - 1, RESERVATION_GRACE_S, FETCHER_DOWN_AFTER_S, 1e6, 1e9]
)


# The decision


@given(
    st.sampled_from(
        [
            None,
            DownloadRequestView("org/model", COMMIT),
            DownloadRequestView("org/model", ""),
            DownloadRequestView("org/model", "d" * 40),
        ]
    ),
    SPANS_S,
    SPANS_S,
    st.sampled_from([0, DAY_S, 7 * DAY_S]),
    st.booleans(),
)
def test_I4_a_requested_model_keeps_its_reservation(
    request: DownloadRequestView | None, unwanted_s: float, down_s: float, retention_s: int, ended: bool
) -> None:
    ledger = build_ledger(
        reservations={MODEL: {"a" * 64}},
        last_wanted_s={MODEL: NOW_S - unwanted_s},
        ended_reservations=[MODEL] if ended else [],
    )
    steps = expiry_actions(ledger, [request] if request else [], down_s, NOW_S, retention_s)
    requested = request is not None and request.commit in (COMMIT, "")
    if requested and down_s < FETCHER_DOWN_AFTER_S and not ended:
        assert not steps.end and not steps.remove
        assert bool(steps.renew) == (down_s == 0 and unwanted_s >= RENEW_INTERVAL_S)
        return
    assert not steps.renew, "a promise that has ended comes back by being reserved"
    if not ended and unwanted_s < RESERVATION_GRACE_S:
        assert not steps.end and not steps.remove
    else:
        assert steps.end == ([] if ended else [MODEL])
        assert steps.remove == ([MODEL] if unwanted_s >= retention_s else [])


@given(SPANS_S, SPANS_S)
def test_I4_a_paused_model_keeps_its_reservation(unwanted_s: float, down_s: float) -> None:
    ledger = build_ledger(reservations={MODEL: {"a" * 64}}, last_wanted_s={MODEL: NOW_S - unwanted_s})
    steps = expiry_actions(ledger, [DownloadRequestView("org/model", COMMIT, paused=True)], down_s, NOW_S, 0)
    assert not steps.end and not steps.remove
    assert bool(steps.renew) == (unwanted_s >= RENEW_INTERVAL_S)


def test_a_model_paused_and_fetched_by_two_names_is_not_paused() -> None:
    ledger = build_ledger(reservations={MODEL: {"a" * 64}})
    paused, fetched = DownloadRequestView("org/model", COMMIT, paused=True), DownloadRequestView("org/model", COMMIT)
    assert paused_models(ledger, [paused]) == {MODEL}
    assert (
        paused_models(ledger, [paused, fetched])
        == paused_models(ledger, [fetched])
        == paused_models(ledger, [])
        == set()
    )


def test_a_paused_models_bytes_exclude_what_others_need() -> None:
    own, shared = "b" * 64, "d" * 64
    other = model_id("org/whole", COMMIT)
    ledger = build_ledger(
        {own: 5, shared: 7},
        manifests=[manifest_of(other, [shared], {shared: 7})],
        partials={"1" * 64: PartialBlobInfo(100, 20, {MODEL})},
        reservations={MODEL: {"1" * 64, own, shared}},
    )
    ledger.arrivals.set_paused({MODEL, model_id("org/gone", COMMIT)})
    assert bytes_of_paused_models(ledger) == {MODEL: 105}
    assert ledger.reserved_bytes == 100 and find_garbage(ledger) == [], "wanted, so no garbage"
    assert not plan_eviction(1000, ledger, {}, protected_models(ledger, {})).ended_downloads


def test_download_requests_get_their_commits_from_the_states() -> None:
    specs = [(f"download.a.{n}", DownloadRequest(model=f"org/{n}", requested_at_s=1.0)) for n in ("x@v1", "y")]
    states = {"download.a.x@v1": DownloadState(node="a", model="org/x@v1", phase="fetching", commit=COMMIT)}
    assert download_requests(specs, states) == [
        DownloadRequestView("org/x", COMMIT),
        DownloadRequestView("org/y", ""),
    ]
    paused = [(key, DownloadRequest(model=spec.model, requested_at_s=1.0, paused=True)) for key, spec in specs]
    assert download_requests(paused, states) == [
        DownloadRequestView("org/x", COMMIT, True),
        DownloadRequestView("org/y", "", True),
    ]


# Ended reservations in the ledger and in plans


def test_I3_an_ended_reservation_counts_only_its_allocated_bytes() -> None:
    ledger = build_ledger(partials={"a" * 64: PartialBlobInfo(100, allocated_bytes=30, models={MODEL})})
    assert (
        ledger.reserved_bytes,
        ledger.arrivals.in_flight_bytes,
        ledger.arrivals.needed_bytes("a" * 64, 100, model_id("org/other", COMMIT)),
    ) == (
        100,
        70,
        0,
    )
    ledger.arrivals.abandon_reservation(MODEL)
    assert (
        ledger.reserved_bytes,
        ledger.arrivals.in_flight_bytes,
        ledger.arrivals.needed_bytes("a" * 64, 100, model_id("org/other", COMMIT)),
    ) == (
        30,
        0,
        70,
    )
    ledger.arrivals.reserve_blob("a" * 64, 100, model_id("org/other", COMMIT))
    assert (ledger.reserved_bytes, ledger.arrivals.in_flight_bytes) == (100, 70), "another still wants it"


def test_a_plan_takes_garbage_then_ended_downloads_then_models() -> None:
    older, newer = model_id("org/older", COMMIT), model_id("org/newer", COMMIT)
    whole = "f" * 64
    model = model_id("org/whole", COMMIT)
    ledger = build_ledger(
        {"b" * 64: 5, "d" * 64: 7, whole: 50},
        manifests=[manifest_of(model, [whole], {whole: 50})],
        partials={"1" * 64: PartialBlobInfo(100, 20, {older}), "2" * 64: PartialBlobInfo(100, 30, {newer})},
        reservations={older: {"1" * 64, "d" * 64}, newer: {"2" * 64}},
        last_wanted_s={older: 1.0, newer: 2.0},
        ended_reservations=[older, newer],
    )
    kept = protected_models(ledger, {})
    assert kept == {} and find_garbage(ledger) == ["b" * 64]

    def unfinished(need: int) -> list[tuple[ModelId, int]]:
        made = plan_eviction(need, ledger, {}, kept)
        assert made.enough and made.freed_bytes >= need
        return [(v.model, v.freed_bytes) for v in made.ended_downloads] + [
            (v.model, v.freed_bytes) for v in made.victims
        ]

    assert unfinished(5) == []
    assert unfinished(6) == [(older, 27)]
    assert unfinished(5 + 27) == [(older, 27)]
    assert unfinished(5 + 28) == [(newer, 30)], "the older one is spared, as the newer alone suffices"
    assert unfinished(5 + 57) == [(older, 27), (newer, 30)]
    assert unfinished(5 + 58) == [(older, 27), (newer, 30), (model, 50)], "never kept at the cost of a model"
    assert not plan_eviction(5 + 57 + 50 + 1, ledger, {}, kept).enough
    assert protected_models(ledger, {}, admitted_model=older) == {older: "being fetched"}
