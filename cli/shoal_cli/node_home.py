"""A node's directory: where its files are, and the lock of its one supervisor.

Directories have mode 0700 and files 0600: another user of the machine reads none of it.

<home>/
  node.toml                  the node's id and the settings
  node.id                    the id again: a node that loses node.toml is not taken for another one
  identity/                  the node's keys and certificates
  operator/                  the cluster's, on the node that started it
  api.key                    the key of its gateway
  chat_history               lines typed into `shoal run`
  nats/                      JetStream's store, on the node that runs NATS
    ballast                    given up first when its disk is full; none on the disk of the models, which have one
  store/                     the models
  log/<service>.log[.1|.2]   of each service, NATS and the supervisor
  run/                       of this run only:
    lock                       flock: held by the supervisor while it lives
    supervisor.pid  children.json  gateway.url
    control.path               where the control socket is
    control.sock               here, or in a short temporary directory when this path is too long for a socket
    fetcher.sock               takes this user's token for the hub
    nats-server.conf  nats-server_<pid>.ports
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from shoal_common.errors import AlreadyRunning
from shoal_common.host.file_kinds import read_text_file
from shoal_common.host.private_files import make_home, make_private_directory


class Home:
    """Paths of one node's directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.run = root / "run"
        self.logs = root / "log"
        self.nats_store = root / "nats"
        self.nats_ballast = self.nats_store / "ballast"
        self.chat_history = root / "chat_history"
        self.lock = self.run / "lock"
        self.pid = self.run / "supervisor.pid"
        self.children = self.run / "children.json"
        self.gateway_url = self.run / "gateway.url"
        self.control_path = self.run / "control.path"
        self.nats_config = self.run / "nats-server.conf"

    def log(self, name: str) -> Path:
        """Return the log of a service, of `nats`, or of the `supervisor`."""
        return self.logs / f"{name}.log"

    def identity(self) -> str:
        """Return what tells this directory from every other on this machine: a copy of it has another identity."""
        status = self.root.stat()
        return f"{status.st_dev}:{status.st_ino}"

    def create(self) -> None:
        """Create what is missing. Only this user may enter: sockets in `run` take commands, logs hold prompts."""
        make_home(self.root)
        for directory in (self.logs, self.run):
            make_private_directory(directory)

    def clear_run(self) -> None:
        """Remove the files of a run. Call it only while holding the lock."""
        for file in (self.pid, self.children, self.gateway_url, self.control_path):
            file.unlink(missing_ok=True)

    def read_pid(self) -> int:
        """Return the pid in `supervisor.pid`; 0 without one. It may be of a run that has ended."""
        text = read_or_empty(self.pid)
        return int(text) if text.isdecimal() else 0


def read_or_empty(path: Path) -> str:
    """Return a small file's text without its end of line; "" when the file does not exist. Raises BadInput."""
    try:
        return read_text_file(path).strip()
    except FileNotFoundError:
        return ""


_CONTENTION_S = 0.3
"""A command that checks whether a supervisor runs holds the lock for a moment."""
_POLL_INTERVAL_S = 0.02


class RunLock:
    """The lock of a home's one supervisor. The kernel releases it when the process ends, however it ends."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._fd = -1

    def acquire(self) -> None:
        """Become this home's supervisor. Raises AlreadyRunning, naming the one that runs."""
        self._home.create()
        give_up_s = time.monotonic() + _CONTENTION_S
        while not (acquired := self._try()) and time.monotonic() < give_up_s:
            time.sleep(_POLL_INTERVAL_S)
        if not acquired:
            pid = self._home.read_pid() or "unknown"
            raise AlreadyRunning(
                f"a node is already running in {self._home.root} (supervisor pid {pid}): see `shoal status`, "
                "stop it with `shoal down`, or choose another --home"
            )
        self._home.pid.write_text(f"{os.getpid()}\n")

    def is_free(self) -> bool:
        """Return whether no supervisor runs here."""
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
        """Release the lock, if held."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
