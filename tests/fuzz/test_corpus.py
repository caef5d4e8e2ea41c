"""Every parser takes what is kept of it: valid inputs, and those that once broke something."""

from __future__ import annotations

import pytest

from tests.fuzz.engine import replay
from tests.fuzz.parser_under_test import CORPUS, Parser
from tests.fuzz.parsers import PARSERS

MAX_CORPUS_BYTES = 200 << 10


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.name)
def test_a_parser_takes_its_corpus(parser: Parser) -> None:
    assert replay(parser) > 0


def test_the_corpus_is_small_and_belongs_to_parsers() -> None:
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < MAX_CORPUS_BYTES
    assert {path.name for path in CORPUS.iterdir()} == {parser.name for parser in PARSERS}
