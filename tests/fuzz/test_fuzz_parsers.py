"""Every parser of what comes from outside, for a share of the time each: no crash, no hang, no growth.

All of it takes TOTAL_S; SHOAL_FUZZ_S sets another time. SHOAL_FUZZ_SEED repeats a run, or begins another one.
"""

from __future__ import annotations

import os

import pytest

from tests.fuzz.engine import fuzz
from tests.fuzz.parser_under_test import Parser
from tests.fuzz.parsers import PARSERS

TOTAL_S = 20 * 60.0


@pytest.mark.long
@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.name)
def test_a_parser_survives_what_nobody_would_send(parser: Parser) -> None:
    budget_s = float(os.environ.get("SHOAL_FUZZ_S", TOTAL_S)) / len(PARSERS)
    count = fuzz(parser, budget_s, int(os.environ.get("SHOAL_FUZZ_SEED", "0")))
    print(f"{parser.name}: {count} inputs in {budget_s:.0f} s")
    assert count > 0
