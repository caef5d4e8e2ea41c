"""Whose token `shoal pull` hands to which fetcher, and what a person reads when it could not."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from shoal_cli.api.hub_token import hand_over_token, read_token
from shoal_cli.node_home import Home
from shoal_common.errors import BadInput, ErrorBody, Refused
from shoal_common.hub_token import DEFAULT_ENDPOINT, SOCKET_NAME, GivenToken, TokenAnswer

TOKEN = "hf_the_persons_own"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """The home of node a, and a person who has logged in nowhere."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    home = Home(tmp_path / "home")
    home.create()
    (home.root / "node.toml").write_text('id = "a"\n')
    return home


class Fetcher:
    """Takes tokens as the fetcher does."""

    def __init__(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken: list[GivenToken] = []
        self.error: ErrorBody | None = None
        monkeypatch.chdir(run)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(SOCKET_NAME)
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, connection.makefile("rwb") as lines:
                self.taken.append(msgspec.json.decode(lines.readline(), type=GivenToken))
                lines.write(msgspec.json.encode(TokenAnswer(self.error)) + b"\n")

    def close(self) -> None:
        with suppress(OSError):  # it was closed before
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def fetcher(home: Home, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fetcher]:
    fetcher = Fetcher(home.run, monkeypatch)
    yield fetcher
    fetcher.close()


def give(home: Home, nodes: Sequence[str] | None = (), is_own_gateway: bool = True, **environ: str) -> str:
    return hand_over_token(home, "org/gated", nodes, is_own_gateway, environ)


@pytest.mark.parametrize(
    ("nodes", "is_own_gateway"), [((), True), (("a",), True), (("b", "a"), False), (None, True), (None, False)]
)
def test_the_nodes_own_fetcher_gets_the_token(
    home: Home, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch, nodes: Sequence[str] | None, is_own_gateway: bool
) -> None:
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}\n")
    assert give(home, nodes, is_own_gateway, HF_ENDPOINT="http://hub/") == ""
    assert fetcher.taken == [GivenToken("org/gated", TOKEN, "http://hub")]


@pytest.mark.parametrize(("nodes", "is_own_gateway"), [(("b",), True), (("b", "c"), False), ((), False)])
def test_a_pull_elsewhere_keeps_the_token_here_and_says_so(
    home: Home, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch, nodes: Sequence[str], is_own_gateway: bool
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "--node a" in give(home, nodes, is_own_gateway)
    assert fetcher.taken == []


def test_who_has_logged_in_has_a_token(home: Home, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = home.root.parent / "token"
    stored.write_text(TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(stored))
    assert give(home) == ""
    assert fetcher.taken == [GivenToken("org/gated", TOKEN, DEFAULT_ENDPOINT)]


def test_without_a_token_nothing_is_said(home: Home, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(home.root / "none"))
    assert give(home, ("b",)) == "" and fetcher.taken == []


def test_a_machine_without_a_node_hands_over_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "runs no node" in give(Home(tmp_path / "none"))


def test_what_keeps_a_token_from_being_used_is_one_line(
    home: Home, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fetcher.error = Refused("your token is for another hub").body()
    assert give(home) == "your token was not used: your token is for another hub"
    fetcher.close()
    not_given = give(home)
    assert "takes no token" in not_given and TOKEN not in not_given and "\n" not in not_given


def test_a_token_that_is_none_is_refused_unquoted(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x y")
    with pytest.raises(BadInput) as refused:
        read_token()
    assert "hf_x" not in refused.value.message
    assert "was not used" in give(home)


def test_a_token_that_cannot_be_renewed_counts_as_none(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_OIDC_RESOURCE", "no such service")
    assert read_token() == "" and give(home) == ""


def test_a_login_service_that_hangs_delays_a_pull_by_seconds(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr("huggingface_hub.get_token", released.wait)
    monkeypatch.setattr("shoal_cli.api.hub_token._READ_TIMEOUT_S", 0.1)
    assert read_token() == ""
    released.set()
