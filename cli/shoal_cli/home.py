"""Where things are in a node's directory, and who runs there.

<home>/
  node.toml                  the node's id and a person's settings
  secret                     0600: shared by the cluster's nodes
  chat_history               0600: lines typed into `shoal run`
  nats/                      JetStream's store
  store/                     the models
  log/<service>.log[.1|.2]   what the services and NATS write, and supervisor.log
  run/                       0700, of this run only:
    lock                       flock: held by the supervisor as long as it lives
    supervisor.pid  children.json  gateway.url
    control.path               where the control socket is
    control.sock               here, or in a short directory when this path is too long for a socket
    nats-server.conf  nats-server_<pid>.ports
"""

from __future__ import annotations

import fcntl
import os
import secrets
from pathlib import Path

from shoal_common.errors import Claimed

_PRIVATE = 0o700


class Home:
    """Paths of one node's directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.run = root / "run"
        self.logs = root / "log"
        self.nats_store = root / "nats"
        self.secret = root / "secret"
        self.chat_history = root / "chat_history"
        self.lock = self.run / "lock"
        self.pid = self.run / "supervisor.pid"
        self.children = self.run / "children.json"
        self.gateway_url = self.run / "gateway.url"
        self.control_path = self.run / "control.path"
        self.nats_config = self.run / "nats-server.conf"

    def log(self, name: str) -> Path:
        """The log of a service, of `nats`, or of the `supervisor`."""
        return self.logs / f"{name}.log"

    def make(self) -> None:
        """Create what is missing. Only this user may look into `run`: its sockets take orders."""
        for directory in (self.root, self.logs, self.run):
            directory.mkdir(parents=True, exist_ok=True)
        self.run.chmod(_PRIVATE)

    def forget_run(self) -> None:
        """Remove what says that a node runs here. Call it only while holding the lock."""
        for file in (self.pid, self.children, self.gateway_url, self.control_path):
            file.unlink(missing_ok=True)

    def read_secret(self) -> str:
        """The cluster's secret, or "" where there is none."""
        return read_or_empty(self.secret)

    def keep_secret(self, secret: str) -> str:
        """Write the cluster's secret where only this user reads it."""
        fresh = self.secret.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as f:
            f.write(f"{secret}\n")
            f.flush()
            os.fsync(f.fileno())
        fresh.replace(self.secret)
        return secret

    def ensure_secret(self) -> str:
        """The cluster's secret, made once."""
        return self.read_secret() or self.keep_secret(secrets.token_hex(24))


def read_or_empty(path: Path) -> str:
    """A small file's text without its end of line; "" when it is not there."""
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""


class RunLock:
    """The one supervisor of a home. The kernel frees it when the process ends, however it ends."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._fd = -1

    def take(self) -> None:
        """Become this home's supervisor. Raises Claimed, naming the one that is."""
        self._home.make()
        if not self._try():
            pid = read_or_empty(self._home.pid) or "unknown"
            raise Claimed(
                f"a node already runs in {self._home.root} (supervisor pid {pid}): see `shoal status`, "
                "stop it with `shoal down`, or choose another --home"
            )
        self._home.pid.write_text(f"{os.getpid()}\n")

    def is_free(self) -> bool:
        """Whether no supervisor runs here."""
        if not self._home.lock.exists():
            return True
        free = self._try()
        self.release()
        return free

    def _try(self) -> bool:
        self._fd = os.open(self._home.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            return False
        return True

    def release(self) -> None:
        """Give the lock back; without it, nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
