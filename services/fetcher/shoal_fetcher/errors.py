"""The fetcher's own errors, beside those of shoal_common.

HubUnavailable └── RateLimited       the hub wants fewer requests, until a time it names
Unavailable    └── ReservationLost   storage no longer knows of the bytes we bring: reserve again
Unavailable    └── Silent            a node sent nothing for too long
Unavailable    └── LeavesLost        storage found leaves that are not on the disk as they arrived: fetch them again
Corrupt        └── WrongWhole        all leaves arrived, and together they are not the blob

They have no codes of their own: a process that does not know these classes (all others) sees their parents.
"""

from shoal_common.errors import Corrupt, HubUnavailable, Unavailable

_DEFAULT_RETRY_S = 5.0


class RateLimited(HubUnavailable):
    """The hub wants fewer requests; `retry_after_s` says when to come back."""

    @property
    def retry_after_s(self) -> float:
        """Seconds to wait."""
        return float(self.details.get("retry_after_s", _DEFAULT_RETRY_S))


class ReservationLost(Unavailable):
    """The partial is gone: storage was restarted, or the files were removed by hand."""


class Silent(Unavailable):
    """A node sent nothing for too long, and was left."""


class LeavesLost(Unavailable):
    """Some leaves are not on the disk as they arrived; the others stay."""


class WrongWhole(Corrupt):
    """A blob that was put together does not hash to its name; storage has discarded it."""
