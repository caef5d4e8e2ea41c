"""Faults that can be injected into a running hub.

A fault with `times` occurs that often and is then off; `times` null (None) means always. `GET /_faults` shows how
often each still occurs.
"""

import threading
from fnmatch import fnmatchcase
from typing import Literal, TypeVar

import msgspec

Kind = Literal["api", "head", "get"]
"""api: metadata as JSON. head: HEAD of a file. get: GET of a file, redirects included."""

ALL_KINDS: tuple[Kind, ...] = ("api", "head", "get")


class RateLimit(msgspec.Struct, forbid_unknown_fields=True):
    """Answer 429 with Retry-After and the RateLimit headers."""

    times: int | None = 1
    retry_after_s: int = 1
    kinds: tuple[Kind, ...] = ALL_KINDS


class UnavailableFault(msgspec.Struct, forbid_unknown_fields=True):
    """Answer 503."""

    times: int | None = 1
    kinds: tuple[Kind, ...] = ALL_KINDS


class DropAtByte(msgspec.Struct, forbid_unknown_fields=True):
    """Close the connection after `after_bytes` of a longer body. `glob` is matched against org/name/path."""

    after_bytes: int
    times: int | None = 1
    glob: str = "*"


class WrongBytes(msgspec.Struct, forbid_unknown_fields=True):
    """Flip the byte at `offset` of a file in each response with it. `glob` is matched against org/name/path."""

    glob: str = "*"
    offset: int = 0
    times: int | None = None


class Faults(msgspec.Struct, forbid_unknown_fields=True):
    """All faults. The default is a healthy hub."""

    rate_limit: RateLimit | None = None
    unavailable: UnavailableFault | None = None
    drop_at_byte: DropAtByte | None = None
    wrong_bytes: WrongBytes | None = None
    bytes_per_s: float | None = None
    """Total rate of all file bodies."""
    no_range: bool = False
    """Answer a Range with 200 and the whole body."""
    require_token: str | None = None
    """Answer 401 without this bearer token. Overrides the token the hub was started with."""
    gated: tuple[str, ...] = ()
    """Globs of models whose files answer 403 GatedRepo; their metadata stays readable."""
    gated_token: str | None = None
    """The bearer token that may read the files of gated models; null: none may."""
    private: tuple[str, ...] = ()
    """Globs of models that do not exist without `gated_token`."""


_Limited = TypeVar("_Limited", RateLimit, UnavailableFault, DropAtByte, WrongBytes)


def _spend(fault: _Limited) -> _Limited | None:
    """Return a fault after one more occurrence; None when it is used up."""
    if fault.times is None:
        return fault
    fault.times -= 1
    return fault if fault.times > 0 else None


class ActiveFaults:
    """The current faults: set from any thread, read by the hub."""

    def __init__(self, faults: Faults | None = None) -> None:
        self._lock = threading.Lock()
        self._faults = Faults()
        self.set(faults or Faults())

    def set(self, faults: Faults) -> None:
        """Replace all faults; one with `times` 0 is off."""
        copied = msgspec.convert(msgspec.to_builtins(faults), Faults)
        for name in ("rate_limit", "unavailable", "drop_at_byte", "wrong_bytes"):
            fault = getattr(copied, name)
            if fault is not None and fault.times is not None and fault.times <= 0:
                setattr(copied, name, None)
        with self._lock:
            self._faults = copied

    def get(self) -> Faults:
        """Return a copy of the faults with their remaining `times`."""
        with self._lock:
            return msgspec.convert(msgspec.to_builtins(self._faults), Faults)

    def rate_bytes_per_s(self) -> float | None:
        """Return the total rate of all file bodies; None is unlimited. Copies nothing: called for every piece."""
        rate = self._faults.bytes_per_s
        return rate if rate is not None and rate > 0 else None

    def take_unavailable(self, kind: Kind) -> bool:
        """Return whether to answer this request with 503, and count it."""
        with self._lock:
            fault = self._faults.unavailable
            if fault is None or kind not in fault.kinds:
                return False
            self._faults.unavailable = _spend(fault)
            return True

    def take_rate_limit(self, kind: Kind) -> int | None:
        """Return the Retry-After seconds if this request is to be answered with 429, and count it."""
        with self._lock:
            fault = self._faults.rate_limit
            if fault is None or kind not in fault.kinds:
                return None
            self._faults.rate_limit = _spend(fault)
            return fault.retry_after_s

    def take_drop(self, name: str, body_bytes: int) -> int | None:
        """Return the bytes after which to drop this body, and count it; None: do not."""
        with self._lock:
            fault = self._faults.drop_at_byte
            if fault is None or fault.after_bytes >= body_bytes or not fnmatchcase(name, fault.glob):
                return None
            self._faults.drop_at_byte = _spend(fault)
            return fault.after_bytes

    def take_wrong_byte(self, name: str, first: int, last: int) -> int | None:
        """Return the file offset of the byte to flip in a response with the bytes first..last, and count it."""
        with self._lock:
            fault = self._faults.wrong_bytes
            if fault is None or not first <= fault.offset <= last or not fnmatchcase(name, fault.glob):
                return None
            self._faults.wrong_bytes = _spend(fault)
            return fault.offset
