"""The command line and a real gateway: its key, and TLS beyond loopback."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal_cli.cli import run
from shoal_common.errors import Denied
from shoal_common.identity.api_key import read_api_key
from tests.gateway.running_gateway import NODE, RunningGateway, running_gateway
from tests.harness.member import make_member, member_nats
from tests.harness.nats import NatsServer
from tests.harness.other_user import OTHER_UID

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def with_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningGateway]:
    """A gateway that speaks TLS; `localhost` is in its certificate, 127.0.0.1 is not."""
    home = tmp_path / "home"
    identity = make_member(home, NODE, "localhost")
    monkeypatch.delenv("SHOAL_GATEWAY", raising=False)
    monkeypatch.setenv("SHOAL_HOME", str(home))
    with (
        member_nats(tmp_path / "nats", identity) as nats,
        running_gateway(home, nats, SHOAL_BIND="0.0.0.0") as gateway,
    ):
        (home / "run").mkdir(exist_ok=True)
        (home / "run" / "gateway.url").write_text(gateway.url.replace("http://", "https://") + "\n")
        yield gateway


def test_the_own_gateway_is_known_by_its_certificate(with_tls: RunningGateway, capsys: Capture) -> None:
    assert run(["status"]) == 0
    assert NODE in capsys.readouterr().out
    url = (with_tls.log.parent / "run" / "gateway.url").read_text().strip()
    assert run(["status", "--gateway", url.replace("127.0.0.1", "localhost")]) == 0


def test_I12_a_gateway_with_another_certificate_gets_no_key(
    with_tls: RunningGateway, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = (with_tls.log.parent / "run" / "gateway.url").read_text().strip()
    capsys.readouterr()
    assert run(["status", "--gateway", url]) == Denied.exit_code, "its certificate does not name this address"
    assert "nothing was sent" in capsys.readouterr().err
    make_member(tmp_path / "stranger", NODE)
    (tmp_path / "stranger" / "node.toml").write_text(f'id = "{NODE}"\n')
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "stranger"))
    assert run(["status", "--gateway", url.replace("127.0.0.1", "localhost")]) == Denied.exit_code
    assert "nothing was sent" in capsys.readouterr().err


def test_the_key_of_another_users_node_opens_it(
    tmp_path: Path, own_nats: NatsServer, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    home = tmp_path / "home"
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "none"))
    with running_gateway(home, own_nats) as gateway:
        key = read_api_key(home)
        # Sockets are of the user who makes them, whoever owns the process.
        os.setegid(OTHER_UID)
        os.seteuid(OTHER_UID)
        try:
            assert run(["status", "--gateway", gateway.url]) == Denied.exit_code
            assert "SHOAL_API_KEY" in capsys.readouterr().err
            monkeypatch.setenv("SHOAL_API_KEY", key)
            assert run(["status", "--gateway", gateway.url]) == 0
        finally:
            os.seteuid(0)
            os.setegid(0)
