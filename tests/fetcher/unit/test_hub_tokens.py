"""Tokens of who pulls: whose, for what, how long, and that nobody else hands one over."""

from __future__ import annotations

import asyncio
import json
import math
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from shoal_common.errors import BadInput, BadName, Busy, Denied, Refused, ShoalError, Unavailable
from shoal_common.hub_token import DEFAULT_ENDPOINT, MAX_LIFETIME_S, SOCKET_NAME, GivenToken, give_token, peer_uid
from shoal_common.messages.downloads import DownloadPhase, DownloadState
from shoal_common.redaction import MASK, redact
from shoal_fetcher.hub import token_socket
from shoal_fetcher.hub.token_socket import serve_tokens
from shoal_fetcher.hub.tokens import MAX_TOKENS, HubTokens
from shoal_fetcher.sources.source_selection import allowed_by_hub
from tests.harness.forked import fork
from tests.harness.waiting import eventually

TOKEN = "hf_the_persons_own"
GIVEN = GivenToken("org/gated", TOKEN)


def test_a_token_is_of_one_repository_all_its_revisions() -> None:
    tokens = HubTokens(DEFAULT_ENDPOINT, "hf_environment")
    tokens.take(GivenToken("org/gated@v1", f" {TOKEN}\n"))
    assert tokens.of("org/gated") == TOKEN
    assert tokens.of("org/other") == tokens.of("org/gated-2") == "hf_environment"
    tokens.forget("org/gated", math.inf)
    assert tokens.of("org/gated") == "hf_environment"
    assert HubTokens(DEFAULT_ENDPOINT, None).of("org/gated") is None


def test_a_download_that_ends_leaves_the_token_of_the_next() -> None:
    now_s = 100.0
    tokens = HubTokens(DEFAULT_ENDPOINT, None, lambda: now_s)
    tokens.take(GIVEN)
    tokens.forget("org/gated", 99.0)
    assert tokens.use("org/gated") == TOKEN, "given after the download that ended had begun"
    tokens.forget("org/gated", 99.0)
    assert tokens.of("org/gated") is None, "it was used all the same"
    tokens.take(GIVEN)
    tokens.forget("org/gated", 100.0)
    assert tokens.of("org/gated") is None, "given before, and not needed"


def test_a_token_is_kept_for_a_day_at_most() -> None:
    now_s = 100.0
    tokens = HubTokens(DEFAULT_ENDPOINT, None, lambda: now_s)
    tokens.take(GivenToken("org/long", TOKEN, lifetime_s=1e12))
    tokens.take(GivenToken("org/short", TOKEN, lifetime_s=5.0))
    tokens.take(GivenToken("org/past", TOKEN, lifetime_s=float("-inf")))
    assert (tokens.of("org/long"), tokens.of("org/short"), tokens.of("org/past")) == (TOKEN, TOKEN, None)
    now_s += 6
    assert (tokens.of("org/long"), tokens.of("org/short")) == (TOKEN, None)
    now_s += MAX_LIFETIME_S
    assert tokens.of("org/long") is None


def test_the_table_is_bounded_and_what_is_over_makes_room() -> None:
    now_s = 0.0
    tokens = HubTokens(DEFAULT_ENDPOINT, None, lambda: now_s)
    for number in range(MAX_TOKENS):
        tokens.take(GivenToken(f"org/m{number}", TOKEN, lifetime_s=10.0))
    with pytest.raises(Busy, match="256"):
        tokens.take(GIVEN)
    tokens.take(GivenToken("org/m7", "hf_another"))
    assert tokens.of("org/m7") == "hf_another"
    now_s = 11.0
    tokens.take(GIVEN)


@pytest.mark.parametrize("token", ["", " \n", "hf_x\nX-Header: y", "hf_x y", "hf_ü", "hf_x\x00"])
def test_what_is_no_token_is_refused_unquoted(token: str) -> None:
    with pytest.raises(BadInput) as refused:
        HubTokens(DEFAULT_ENDPOINT, None).take(GivenToken("org/gated", token))
    assert "hf_" not in refused.value.message


def test_a_token_is_never_shown_to_another_hub() -> None:
    with pytest.raises(Refused, match=r"for https://huggingface\.co.*hub is http://mirror"):
        HubTokens("http://mirror", None).take(GIVEN)
    with pytest.raises(BadName):
        HubTokens(DEFAULT_ENDPOINT, None).take(GivenToken("../x", TOKEN))


def test_a_tokens_text_is_in_no_repr_and_masked_once_taken() -> None:
    HubTokens(DEFAULT_ENDPOINT, None).take(GivenToken("org/gated", "hf_masked_from_now_on"))
    assert redact("Bearer hf_masked_from_now_on") == f"Bearer {MASK}"
    assert TOKEN not in repr(GIVEN) and TOKEN not in str([GIVEN])


def test_a_refusal_holds_for_the_token_that_was_refused() -> None:
    tokens = HubTokens(DEFAULT_ENDPOINT, None)
    tokens.record_denial("org/gated", None, Denied("gated"))
    assert tokens.denial("org/gated") is not None and tokens.denial("org/other") is None
    tokens.take(GIVEN)
    assert tokens.denial("org/gated") is None
    tokens.record_denial("org/gated", TOKEN, Denied("gated"))
    assert tokens.denial("org/gated") is not None
    tokens.forget_denial("org/gated")
    assert tokens.denial("org/gated") is None


@pytest.mark.parametrize(
    ("phase", "commit", "denied", "live", "may"),
    [
        ("fetching", "c", False, True, True),
        ("queued", "", False, True, True),
        ("verifying", "c", False, True, True),
        ("fetching", "d", False, True, False),
        ("fetching", "c", True, True, False),
        ("fetching", "c", False, False, False),
        ("paused", "c", False, True, False),
        ("blocked", "c", False, True, False),
        ("failed", "c", False, True, False),
    ],
)
def test_who_may_read_from_the_hub_what_it_refuses_us(
    phase: DownloadPhase, commit: str, denied: bool, live: bool, may: bool
) -> None:
    def state(node: str, model: str) -> DownloadState:
        return DownloadState(node=node, model=model, phase=phase, commit=commit, done_bytes=7, denied_by_hub=denied)

    downloads = [state("b", "org/gated@v1"), state("a", "org/gated"), state("c", "org/other")]
    found = allowed_by_hub("org/gated", "c", downloads, ["a", "c", *(["b"] if live else [])], "a")
    assert found == ({"b": 7} if may else {})


@asynccontextmanager
async def listening(run: Path, take: Callable[[GivenToken], None]) -> AsyncIterator[Path]:
    """Serve tokens in a directory whose path is too long for a socket."""
    await asyncio.to_thread(run.mkdir, parents=True)
    before = Path.cwd()
    os.chdir(run)
    serving = asyncio.create_task(serve_tokens(run, take))
    try:

        async def exists() -> bool:
            return (run / SOCKET_NAME).exists() or serving.done()

        await eventually(exists, "it listens")
        yield run / SOCKET_NAME
    finally:
        serving.cancel()
        await asyncio.wait({serving})
        os.chdir(before)


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    return tmp_path / ("long" * 30) / "run"


async def test_the_fetcher_takes_a_token_of_its_own_user(run_directory: Path) -> None:
    taken: list[GivenToken] = []
    async with listening(run_directory, taken.append) as path:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        await asyncio.to_thread(give_token, run_directory, GIVEN)
    assert taken == [GIVEN]
    async with listening(run_directory.parent / "other", taken.append):
        with pytest.raises(Unavailable, match="takes no token"):
            await asyncio.to_thread(give_token, run_directory, GIVEN)


async def test_what_refuses_a_token_is_raised_where_it_came_from(run_directory: Path) -> None:
    async with listening(run_directory, HubTokens("http://mirror", None).take):
        with pytest.raises(Refused, match="hub is http://mirror"):
            await asyncio.to_thread(give_token, run_directory, GIVEN)


async def test_another_user_is_refused_however_it_connected(run_directory: Path) -> None:
    """The directory and the mode keep it out first: here both are opened for it."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    taken: list[GivenToken] = []
    async with listening(run_directory, taken.append):
        child = fork(_connect_as_nobody, str(run_directory))
        await asyncio.to_thread(child.join, 30)
        assert child.exitcode == 0
    assert taken == []


def _connect_as_nobody(run: str) -> None:
    directory = os.open(run, os.O_RDONLY)
    Path(run, SOCKET_NAME).chmod(0o666)
    os.setgid(65534)
    os.setuid(65534)
    os.fchdir(directory)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
        s.settimeout(10)
        s.connect(SOCKET_NAME)
        assert peer_uid(s) == 0
        with suppress(BrokenPipeError):
            s.sendall(json.dumps({"model": "org/gated", "token": TOKEN}).encode() + b"\n")
        answer = s.recv(4096)
    os._exit(0 if b'"denied"' in answer and TOKEN.encode() not in answer else 1)


@pytest.mark.parametrize(
    "line", [b"", b"\n", b"{}\n", b"\xff\xfe\n", b'{"model":1,"token":"hf_x"}\n', b"[" * 100_000, b'"' + b"x" * 9000]
)
async def test_garbage_gets_one_answer_and_the_next_is_served(run_directory: Path, line: bytes) -> None:
    taken: list[GivenToken] = []
    async with listening(run_directory, taken.append):
        reader, writer = await asyncio.open_unix_connection(SOCKET_NAME)
        writer.write(line)
        writer.write_eof()
        answer = await reader.read()
        assert b'"code":"bad_message"' in answer and b"hf_x" not in answer
        writer.close()
        await asyncio.to_thread(give_token, run_directory, GIVEN)
    assert taken == [GIVEN]


async def test_one_that_says_nothing_is_left(run_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_socket, "ANSWER_TIMEOUT_S", 0.1)
    async with listening(run_directory, lambda _: None):
        reader, writer = await asyncio.open_unix_connection(SOCKET_NAME)
        assert await reader.read() == b""
        writer.close()


async def test_many_that_say_nothing_keep_the_socket_bounded(run_directory: Path) -> None:
    async with listening(run_directory, lambda _: None):
        silent = [await asyncio.open_unix_connection(SOCKET_NAME) for _ in range(16)]
        with pytest.raises(ShoalError, match="hand over tokens now"):
            await asyncio.to_thread(give_token, run_directory, GIVEN)
        for _, writer in silent:
            writer.close()


async def test_a_directory_without_room_costs_the_socket_alone(tmp_path: Path) -> None:
    await serve_tokens(tmp_path / "not where this process works", lambda _: None)
