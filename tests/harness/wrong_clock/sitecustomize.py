"""A wrong wall clock for a process, which Python imports before anything else: off by the seconds in a file.

The file has one double, native, in seconds; writing to it sets the clock of every process that has it mapped. The
kernel stamps files with the true time, and clocks that nobody sets are right too.
"""

import datetime
import mmap
import os
import struct
import time

_DOUBLE = struct.Struct("d")
_NS_PER_S = 1_000_000_000

with open(os.environ["SHOAL_TEST_CLOCK"], "rb") as _file:  # noqa: PTH123  # as little as can be, before all else
    _offset = mmap.mmap(_file.fileno(), _DOUBLE.size, access=mmap.ACCESS_READ)

_time, _time_ns, _clock_gettime = time.time, time.time_ns, time.clock_gettime


def _ahead_s() -> float:
    return float(_DOUBLE.unpack_from(_offset)[0])


def _wrong_time() -> float:
    return _time() + _ahead_s()


def _wrong_time_ns() -> int:
    return _time_ns() + int(_ahead_s() * _NS_PER_S)


def _wrong_clock_gettime(clock: int) -> float:
    return _clock_gettime(clock) + (_ahead_s() if clock == time.CLOCK_REALTIME else 0.0)


class _WrongDatetime(datetime.datetime):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> "_WrongDatetime":
        return cls.fromtimestamp(_wrong_time(), tz)

    @classmethod
    def utcnow(cls) -> "_WrongDatetime":
        return cls.fromtimestamp(_wrong_time(), datetime.UTC).replace(tzinfo=None)


time.time, time.time_ns, time.clock_gettime = _wrong_time, _wrong_time_ns, _wrong_clock_gettime
datetime.datetime = _WrongDatetime  # type: ignore[misc]  # that is what it is for
