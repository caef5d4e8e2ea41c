"""This node as its home tells: read, never created. Another user's home tells little."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from shoal_cli.doctor.checks.services import SupervisorState
from shoal_cli.node.control import ControlRequest, SupervisorStatus, ask
from shoal_cli.node.logs.log_rotation import tail
from shoal_cli.node.node_plan import without_token
from shoal_cli.node_home import Home, read_or_empty
from shoal_common.config import local_server, read_settings_file, saved_servers, store_directory
from shoal_common.errors import ShoalError
from shoal_common.identity.node_identity import NodeIdentity, load_identity
from shoal_common.messages import decode

_ASK_DEADLINE_S = 3.0
_MAX_TAIL_CHARS = 200


class LocalNode(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of this node without the cluster."""

    home: Path
    node: str = ""
    """ "" while there is no node.toml."""
    settings: dict[str, Any] = {}
    settings_error: str = ""
    environ: dict[str, str] = {}
    """Ours; where systemd runs the node, over what its environment file sets."""
    identity: NodeIdentity | None = None
    """Its keys; None outside a cluster, or where they may not be read."""
    supervisor: SupervisorState = "none"
    pid: int = 0
    status: SupervisorStatus | None = None
    log_tails: dict[str, str] = {}
    servers: list[str] = []
    """NATS servers, with credentials where a URL has them."""
    runs_nats: bool = True

    @property
    def store(self) -> Path:
        """Return where this node's models are, or would be."""
        return store_directory(self.home, self.settings)


def probe(home: Home, environ: Mapping[str, str]) -> LocalNode:
    """Read the home. Blocks until the supervisor answers, at most _ASK_DEADLINE_S."""
    settings, error = _settings(home)
    supervisor, status, pid = _supervisor(home)
    merged = dict(environ)
    if status is None:
        merged = _environment_file(home.root / "environment") | merged
    identity = _identity(home, str(settings.get("id", "")))
    servers, runs_nats = servers_of(status, merged, settings, identity is not None)
    return LocalNode(
        home=home.root,
        node=str(settings.get("id", "")),
        settings=settings,
        settings_error=error,
        environ=merged,
        identity=identity,
        supervisor=supervisor,
        pid=pid,
        status=status,
        log_tails={c.name: _log_tail(home, c.name) for c in (status.children if status else []) if c.last_exit_code},
        servers=servers,
        runs_nats=runs_nats,
    )


def servers_of(
    status: SupervisorStatus | None, environ: Mapping[str, str], settings: Mapping[str, Any], is_member: bool
) -> tuple[list[str], bool]:
    """Return the NATS servers of this node, and whether one of them is its own. Pure.

    The supervisor reports them without credentials: those in a configured URL are put back.
    """
    in_file = saved_servers(settings)
    configured = [u for u in in_file if isinstance(u, str)] if isinstance(in_file, list) else []
    explicit = [u.strip() for u in environ.get("SHOAL_NATS", "").split(",") if u.strip()] or configured
    full = [u if "://" in u else f"nats://{u}" for u in explicit]
    if status is None:
        return (full, False) if full else ([local_server(is_member)], True)
    with_credentials = {_netloc(u): u for u in full}
    runs_nats = any(c.name == "nats" for c in status.children)
    return [with_credentials.get(_netloc(u), u) for u in status.nats], runs_nats


def _netloc(url: str) -> str:
    return urlsplit(without_token(url)).netloc


def _identity(home: Home, node: str) -> NodeIdentity | None:
    try:
        return load_identity(home.root, node) if node else None
    except OSError:
        return None


def _settings(home: Home) -> tuple[dict[str, Any], str]:
    try:
        return read_settings_file(home.root), ""
    except ShoalError as e:
        return {}, e.message
    except OSError as e:
        return {}, f"{home.root / 'node.toml'} cannot be read: {e.strerror}"


def _supervisor(home: Home) -> tuple[SupervisorState, SupervisorStatus | None, int]:
    try:
        if not _is_locked(home.lock):
            return "none", None, 0
        pid_number = home.read_pid()
        try:
            return (
                "running",
                decode(ask(home, ControlRequest(op="status"), _ASK_DEADLINE_S), SupervisorStatus),
                pid_number,
            )
        except ShoalError:
            return "unresponsive", None, pid_number
    except PermissionError:
        return "foreign", None, 0
    except (OSError, ShoalError):
        return "none", None, 0


def _is_locked(lock: Path) -> bool:
    """Return whether a supervisor holds the lock. Unlike RunLock this creates nothing."""
    try:
        fd = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        # Shared, for a moment: two doctors must not take each other for a supervisor.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _read_if_allowed(path: Path) -> str:
    try:
        return read_or_empty(path)
    except (OSError, ShoalError):
        return ""


def _environment_file(path: Path) -> dict[str, str]:
    """Return what systemd's units read: NAME=value, one per line."""
    lines: Sequence[str] = _read_if_allowed(path).splitlines()
    pairs = [line.partition("=") for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return {name.strip(): value.strip().strip("\"'") for name, _, value in pairs}


def _log_tail(home: Home, name: str) -> str:
    try:
        return " ".join(tail(home.log(name), 1))[:_MAX_TAIL_CHARS]
    except OSError:
        return ""
