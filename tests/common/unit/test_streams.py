"""The streams of the cluster: what tells that one has lost its content."""

from __future__ import annotations

import pytest

from shoal_common.bus.streams import BucketContent, lost_buckets

BEFORE = BucketContent("2026", first_revision=5, last_revision=40, count=9)


@pytest.mark.parametrize(
    ("now", "is_lost"),
    [
        (BEFORE, False),
        (BucketContent("2026", 36, 70, 9), False),
        (BucketContent("2026", 41, 40, 0), True),
        (BucketContent("2026", 41, 60, 3), True),
        (BucketContent("2027", 1, 3, 3), True),
    ],
)
def test_a_bucket_that_holds_nothing_from_before_has_lost_it(now: BucketContent, is_lost: bool) -> None:
    assert lost_buckets({"state": BEFORE}, {"state": now}) == (["state"] if is_lost else [])


def test_an_empty_bucket_has_nothing_to_lose() -> None:
    assert not lost_buckets({"state": BucketContent("2026", 1, 0, 0)}, {"state": BucketContent("2026", 1, 4, 4)})
