"""The tokens that this node may show the hub, and whom it has refused. In memory only (I12)."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

import msgspec

from shoal_common.errors import Busy, Denied, Refused
from shoal_common.hub_token import MAX_LIFETIME_S, GivenToken
from shoal_common.names import ModelRef
from shoal_common.redaction import remember_secret

MAX_TOKENS = 256
"""As many as downloads."""
_MAX_DENIALS = 256


class _Kept(msgspec.Struct):
    token: str
    given_at_s: float
    until_s: float
    has_been_used: bool = False


class HubTokens:
    """One token for each repository that somebody pulls with their own, else that of the fetcher's environment."""

    def __init__(self, endpoint: str, own: str | None, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._endpoint, self._own, self._clock_s = endpoint, own, clock_s
        self._given: dict[str, _Kept] = {}
        self._denials: OrderedDict[str, tuple[str | None, Denied]] = OrderedDict()

    def take(self, given: GivenToken) -> None:
        """Keep a token until its time is over, or `forget`. Raises BadInput, BadName, Busy, Refused."""
        given, now_s = given.check(), self._clock_s()
        if given.endpoint.rstrip("/") != self._endpoint:
            raise Refused(
                f"your token is for {given.endpoint}, and this node's hub is {self._endpoint}: set HF_ENDPOINT"
            )
        self._given = {repo: kept for repo, kept in self._given.items() if kept.until_s > now_s}
        repo = ModelRef.parse(given.model).repo
        if len(self._given) >= MAX_TOKENS and repo not in self._given:
            raise Busy(f"{MAX_TOKENS} models are being pulled with tokens; wait for one, or cancel one")
        remember_secret(given.token)
        self._given[repo] = _Kept(given.token, now_s, now_s + min(max(given.lifetime_s, 0.0), MAX_LIFETIME_S))

    def of(self, repo: str) -> str | None:
        """Return the token for a repository, or None."""
        kept = self._given.get(repo)
        return kept.token if kept is not None and kept.until_s > self._clock_s() else self._own

    def use(self, repo: str) -> str | None:
        """Return the token for a repository, to be shown to the hub."""
        if (kept := self._given.get(repo)) is not None:
            kept.has_been_used = True
        return self.of(repo)

    def forget(self, repo: str, begun_at_s: float) -> None:
        """Forget a repository's token: its download, begun then, has ended. One given since is for the next."""
        kept = self._given.get(repo)
        if kept is not None and (kept.has_been_used or kept.given_at_s <= begun_at_s):
            del self._given[repo]

    def record_denial(self, repo: str, token: str | None, error: Denied) -> None:
        """Record that the hub refuses a repository to this token, or to none."""
        self._denials[repo] = token, error
        if len(self._denials) > _MAX_DENIALS:
            self._denials.popitem(last=False)

    def denial(self, repo: str) -> Denied | None:
        """Return how the hub refused a repository to the token that we would show it now."""
        token, error = self._denials.get(repo, (None, None))
        return error if token == self.of(repo) else None

    def forget_denial(self, repo: str) -> None:
        """Ask the hub again: its terms may have been accepted meanwhile."""
        self._denials.pop(repo, None)
