"""The fetcher's own errors, beside those of shoal_common.

HubUnavailable └── RateLimited            the hub wants fewer requests until a time it names
Unavailable    └── ReservationLost        storage has lost the partial blob: reserve again
Unavailable    └── PeerTimeout            a node sent nothing for too long
Unavailable    └── LeafReadbackMismatch   storage read back other leaves than were written: fetch them again
Corrupt        └── BlobHashMismatch       all leaves arrived, and together they do not hash to the blob's name

They have no codes of their own: a process that does not know these classes (all others) sees their parents.
"""

from shoal_common.errors import Corrupt, HubUnavailable, Unavailable

_DEFAULT_RETRY_S = 5.0


class RateLimited(HubUnavailable):
    """The hub wants fewer requests; `retry_after_s` says when to retry."""

    @property
    def retry_after_s(self) -> float:
        """Seconds to wait."""
        return float(self.details.get("retry_after_s", _DEFAULT_RETRY_S))


class ReservationLost(Unavailable):
    """The partial blob is gone: storage was restarted, or files were removed by hand."""


class PeerTimeout(Unavailable):
    """A node sent nothing for too long, and another source is used."""


class LeafReadbackMismatch(Unavailable):
    """Some leaves read back differently than they were written; the others stay."""


class BlobHashMismatch(Corrupt):
    """An assembled blob does not hash to its name; storage has discarded it."""
