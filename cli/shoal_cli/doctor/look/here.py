"""This node as its home has it: read, never made. Another user's home shows little, and that is said."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from shoal_cli.doctor.services import Supervisor
from shoal_cli.home import Home, read_or_empty
from shoal_cli.node.control import Request, Status, ask
from shoal_cli.node.plan import without_token
from shoal_cli.node.rotate import tail
from shoal_common.config import DEFAULT_NATS, read_settings
from shoal_common.errors import ShoalError
from shoal_common.messages import decode

_ASK_DEADLINE_S = 3.0
_LAST_WORDS = 200


class Here(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of this node without asking the cluster."""

    home: Path
    node: str = ""
    """ "" while there is no node.toml."""
    settings: dict[str, Any] = {}
    settings_error: str = ""
    environ: dict[str, str] = {}
    """Ours; where systemd runs the node, what its environment file says beneath it."""
    secret: str = ""
    supervisor: Supervisor = "none"
    pid: int = 0
    status: Status | None = None
    last_words: dict[str, str] = {}
    servers: list[str] = []
    """NATS servers, with credentials where a URL was given with them."""
    runs_nats: bool = True

    @property
    def store(self) -> Path:
        """Where this node's models are, or would be."""
        section = self.settings.get("storage", {})
        path = section.get("path") if isinstance(section, dict) else None
        return (self.home / Path(str(path)).expanduser()) if path else self.home / "store"


def look(home: Home, environ: Mapping[str, str]) -> Here:
    """Read it. Blocks for as long as the supervisor takes to answer, _ASK_DEADLINE_S at most."""
    settings, error = _settings(home)
    supervisor, status, pid = _supervisor(home)
    around = dict(environ)
    if status is None:
        around = _environment_file(home.root / "environment") | around
    secret = around.get("SHOAL_SECRET") or _readable(home.secret)
    servers, runs_nats = servers_of(status, around, settings)
    return Here(
        home=home.root,
        node=str(settings.get("id", "")),
        settings=settings,
        settings_error=error,
        environ=around,
        secret=secret,
        supervisor=supervisor,
        pid=pid,
        status=status,
        last_words={c.name: _last_words(home, c.name) for c in (status.children if status else []) if c.last_code},
        servers=servers,
        runs_nats=runs_nats,
    )


def servers_of(
    status: Status | None, environ: Mapping[str, str], settings: Mapping[str, Any]
) -> tuple[list[str], bool]:
    """The NATS servers of this node, and whether one of them is its own. Pure.

    The supervisor tells them without credentials: those that were given with a URL are put back.
    """
    in_file = settings.get("nats", [])
    named = [u for u in in_file if isinstance(u, str)] if isinstance(in_file, list) else []
    stated = [u.strip() for u in environ.get("SHOAL_NATS", "").split(",") if u.strip()] or named
    full = [u if "://" in u else f"nats://{u}" for u in stated]
    if status is None:
        return (full, False) if full else ([DEFAULT_NATS], True)
    given = {_place(u): u for u in full}
    runs_nats = any(c.name == "nats" for c in status.children)
    return [given.get(_place(u), u) for u in status.nats], runs_nats


def _place(url: str) -> str:
    return urlsplit(without_token(url)).netloc


def with_secret(url: str, secret: str) -> str:
    """A URL that shows the secret, unless it has credentials of its own."""
    parts = urlsplit(url)
    return parts._replace(netloc=f"{secret}@{parts.netloc}").geturl() if secret and "@" not in parts.netloc else url


def _settings(home: Home) -> tuple[dict[str, Any], str]:
    try:
        return read_settings(home.root), ""
    except ShoalError as e:
        return {}, e.message
    except OSError as e:
        return {}, f"{home.root / 'node.toml'} cannot be read: {e.strerror}"


def _supervisor(home: Home) -> tuple[Supervisor, Status | None, int]:
    try:
        if not _is_locked(home.lock):
            return "none", None, 0
        pid = read_or_empty(home.pid)
        found = int(pid) if pid.isdecimal() else 0
        try:
            return "answers", decode(ask(home, Request(op="status"), _ASK_DEADLINE_S), Status), found
        except ShoalError:
            return "silent", None, found
    except PermissionError:
        return "foreign", None, 0
    except OSError:
        return "none", None, 0


def _is_locked(lock: Path) -> bool:
    """Whether a supervisor holds it. Unlike RunLock this makes nothing."""
    try:
        fd = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        # Shared, for a moment: two doctors do not take each other for a supervisor.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _readable(path: Path) -> str:
    try:
        return read_or_empty(path)
    except OSError:
        return ""


def _environment_file(path: Path) -> dict[str, str]:
    """What systemd's units read: NAME=value, one a line."""
    lines: Sequence[str] = _readable(path).splitlines()
    pairs = [line.partition("=") for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return {name.strip(): value.strip().strip("\"'") for name, _, value in pairs}


def _last_words(home: Home, name: str) -> str:
    try:
        return " ".join(tail(home.log(name), 1))[:_LAST_WORDS]
    except OSError:
        return ""
