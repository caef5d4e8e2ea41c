"""The streams of the cluster: what tells that one has lost its content."""

from __future__ import annotations

import pytest

from shoal_common.bus.streams import BucketMark, lost_buckets


@pytest.mark.parametrize(
    ("before", "now", "is_lost"),
    [
        (BucketMark("2026", 5), BucketMark("2026", 5), False),
        (BucketMark("2026", 5), BucketMark("2026", 0), True),
        (BucketMark("2026", 5), BucketMark("2026", 9), True),
        (BucketMark("2026", 0), BucketMark("2026", 9), False),
        (BucketMark("2026", 5), BucketMark("2027", 5), True),
        (BucketMark("2026", 0), BucketMark("2027", 1), True),
    ],
)
def test_a_bucket_without_its_mark_has_lost_everything(before: BucketMark, now: BucketMark, is_lost: bool) -> None:
    assert lost_buckets({"state": before}, {"state": now}) == (["state"] if is_lost else [])
