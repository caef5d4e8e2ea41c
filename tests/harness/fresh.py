"""Names that no other test of a run uses, because services, buckets and logs are shared."""

from __future__ import annotations

from collections.abc import Callable

Fresh = Callable[[str], str]
"""`fresh("node")` is `node-0007`: the fixture `fresh` of all tests."""
