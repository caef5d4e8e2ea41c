"""The key with which people and their programs use a node: the file `api.key` in its home.

Whoever needs it first makes it: the gateway, the fileserver, `shoal key`. It stays on the node, and it is no secret
of the cluster: each node has its own.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import secrets
from pathlib import Path

from shoal_common.errors import BadInput, ShoalError
from shoal_common.host.file_kinds import read_text_file, wrong_kind
from shoal_common.host.private_files import directory_locked, make_home, replace_private
from shoal_common.logs import StructuredLogger
from shoal_common.redaction import remember_secret

log = StructuredLogger("api_key")

API_KEY_VARIABLE = "SHOAL_API_KEY"
"""Holds the key of another node for the command line."""
CHECK_INTERVAL_S = 1.0
"""A replaced key is in force after this time at most."""
_KEY = re.compile(r"shoal-[A-Za-z0-9_-]{43}")


def api_key_path(home: Path) -> Path:
    """Return the path of a node's key."""
    return home / "api.key"


def read_api_key(home: Path) -> str:
    """Return a node's key, or "" without one. Raises BadInput, without the text, for a damaged file. Blocking."""
    path = api_key_path(home)
    try:
        key = read_text_file(path).strip()
    except FileNotFoundError:
        return ""
    if not _KEY.fullmatch(key):
        raise BadInput(
            f"{path} does not hold a key: put it back from a copy, or make a new one with `shoal key --new`"
        )
    remember_secret(key)
    return key


def ensure_api_key(home: Path) -> str:
    """Return a node's key, made at the first call. Raises BadInput for a damaged file. Blocking."""
    make_home(home)
    with directory_locked(home):
        return read_api_key(home) or _write(home)


def replace_api_key(home: Path) -> str:
    """Return a new key of a node; the old one, and logins with it, are refused from now on. Blocking."""
    make_home(home)
    with directory_locked(home):
        return _write(home)


def _write(home: Path) -> str:
    key = f"shoal-{secrets.token_urlsafe(32)}"
    remember_secret(key)
    replace_private(api_key_path(home), f"{key}\n".encode())
    return key


class ApiKeyFile:
    """The key in force: that of the file, which may be replaced at any time."""

    def __init__(self, home: Path) -> None:
        """Read the key, or make one. Raises BadInput for a damaged file. Blocking."""
        self._home = home
        self._read_at: tuple[int, int, int] | None = None
        self.key = ensure_api_key(home)
        """The key in force; "" while the file is damaged: nothing is a key then."""

    def is_key(self, text: str) -> bool:
        """Return whether a text is the key, in a time that reveals nothing about it."""
        return hmac.compare_digest(text.encode(errors="replace"), self.key.encode()) and bool(self.key)

    async def follow_forever(self) -> None:
        """Keep the key current. A file that was removed is made again, with another key."""
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            await asyncio.to_thread(self.refresh)

    def refresh(self) -> None:
        """Read the file if it has changed. Blocking."""
        stamp = self._read_at
        try:
            stamp = self._stamp()
            if stamp is not None and stamp == self._read_at:
                return
            key = ensure_api_key(self._home)
            if key != self.key:
                log.info("key replaced")
            self.key = key
        except (ShoalError, OSError) as e:
            if self.key or stamp != self._read_at:
                log.error("no key is accepted until this is mended", reason=str(wrong_kind(e) or e))
            self.key = ""
        self._read_at = stamp

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            status = api_key_path(self._home).stat()
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size
