"""All parsers that are fuzzed."""

from __future__ import annotations

from tests.fuzz import common_parsers, service_parsers

PARSERS = (*common_parsers.PARSERS, *service_parsers.PARSERS)
