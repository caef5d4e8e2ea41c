"""Errors cross processes without losing their class or message."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shoal_common import errors
from shoal_common.errors import BY_CODE, ErrorBody, ShoalError, error_body, from_body
from shoal_common.messages import decode, encode


def tree(cls: type[ShoalError]) -> list[type[ShoalError]]:
    return [cls, *(leaf for sub in cls.__subclasses__() for leaf in tree(sub))]


# Services add errors of their own below these; this checks the shared tree.
EVERY = [c for c in tree(ShoalError) if c.__module__ == errors.__name__ and c is not ShoalError]


def test_every_error_has_a_code_of_its_own() -> None:
    codes = [cls.code for cls in EVERY]
    assert sorted(codes) == sorted(set(codes))
    assert {BY_CODE[c] for c in codes} == set(EVERY)


@pytest.mark.parametrize("cls", EVERY, ids=lambda c: c.__name__)
def test_every_error_is_in_the_tree_of_the_module_docstring(cls: type[ShoalError]) -> None:
    assert errors.__doc__ is not None
    assert cls.__name__ in errors.__doc__.split()
    assert cls.__doc__


@pytest.mark.parametrize("cls", EVERY, ids=lambda c: c.__name__)
def test_every_error_has_a_failing_status_and_exit_code(cls: type[ShoalError]) -> None:
    assert 400 <= cls.http_status <= 599
    assert 1 <= cls.exit_code <= 125  # higher ones are the shell's
    if cls.retryable:
        assert cls.http_status in (429, 502, 503, 504)


@pytest.mark.parametrize("cls", EVERY, ids=lambda c: c.__name__)
def test_an_error_crosses_processes_with_class_and_message(cls: type[ShoalError]) -> None:
    sent = cls("node-b has no room; free some", needed_bytes=7, nodes=[{"node": "node-b", "available_bytes": 3}])
    got = from_body(decode(encode(sent.body()), ErrorBody))
    assert type(got) is cls
    assert (got.message, got.details, got.retryable) == (sent.message, sent.details, cls.retryable)


@given(st.text(max_size=20), st.text(), st.dictionaries(st.text(max_size=8), st.integers(), max_size=3))
@example("in_use", "it is", {"message": 1, "self": 2})
def test_any_body_becomes_an_error_with_its_message(code: str, message: str, details: dict[str, int]) -> None:
    got = from_body(ErrorBody(code=code, message=message, details=details))
    assert isinstance(got, BY_CODE.get(code, errors.InternalError))
    assert got.message == message
    assert got.details == details


def test_an_error_of_a_newer_peer_keeps_its_message_as_failed() -> None:
    got = from_body(ErrorBody(code="invented_next_year", message="it said so"))
    assert type(got) is errors.InternalError
    assert got.message == "it said so"


def test_a_strangers_exception_is_named_and_points_at_the_log() -> None:
    body = error_body(KeyError("x"))
    assert body.code == "failed"
    assert "KeyError" in body.message and "log" in body.message
