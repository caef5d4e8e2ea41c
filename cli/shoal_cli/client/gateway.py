"""The gateway's REST API from outside: where it is, our credential, and its errors as ours."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx2
import msgspec

from shoal_cli.home import Home, read_or_empty
from shoal_cli.node.plan import GATEWAY_PORT, LOOPBACK
from shoal_common.credentials import bearer
from shoal_common.errors import BadInput, ErrorBody, Expired, Failed, Unavailable, from_body
from shoal_common.messages import Message

T = TypeVar("T")

CONNECT_S = 5.0
ANSWER_S = 90.0
"""The gateway itself waits up to a minute for commands that end soon."""
SILENCE_S = 330.0
"""Between two events of a stream: a long prompt is read for minutes before the first token."""
_MAX_WORDS = 300

NO_NODE = "no Shoal node is running here: start one with `shoal up`"


class ErrorAnswer(Message):
    """The body of every answer that is not a success."""

    error: ErrorBody


class Gateway:
    """A client of one gateway."""

    def __init__(self, url: str, headers: Mapping[str, str], away: str) -> None:
        self.url = url
        self._away = away
        self._http = httpx2.Client(
            base_url=url,
            headers=dict(headers),
            timeout=httpx2.Timeout(ANSWER_S, connect=CONNECT_S),
            # A proxy set for the internet would be asked for 127.0.0.1.
            trust_env=False,
        )

    def get(self, path: str, kind: type[T], **query: str) -> T:
        """The answer to a GET."""
        return self._ask("GET", path, kind, query=query)

    def post(self, path: str, body: Mapping[str, Any], kind: type[T], answer_s: float = ANSWER_S) -> T:
        """The answer to a POST, which may take `answer_s`."""
        return self._ask("POST", path, kind, body=body, answer_s=answer_s)

    def put(self, path: str, body: Mapping[str, Any], kind: type[T]) -> T:
        """The answer to a PUT."""
        return self._ask("PUT", path, kind, body=body)

    def delete(self, path: str, kind: type[T], **query: str) -> T:
        """The answer to a DELETE."""
        return self._ask("DELETE", path, kind, query=query)

    def _ask(
        self,
        method: str,
        path: str,
        kind: type[T],
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        answer_s: float = ANSWER_S,
    ) -> T:
        timeout = httpx2.Timeout(answer_s, connect=CONNECT_S)
        with self._mapped_errors():
            response = self._http.request(method, path, params=dict(query or {}), json=body, timeout=timeout)
        check(response.status_code, response.content, self.url)
        try:
            return msgspec.json.decode(response.content or b"{}", type=kind)
        except msgspec.DecodeError as e:
            raise Failed(
                f"what answers at {self.url} is not a gateway of this version ({e}): check --gateway and "
                "`shoal version`"
            ) from None

    @contextmanager
    def events(self, path: str, body: Mapping[str, Any]) -> Iterator[Iterator[dict[str, Any]]]:
        """The events of a streamed answer. Leaving the block early tells the gateway that nobody reads any more."""
        with self._lines("POST", path, SILENCE_S, body=body) as lines:
            yield self._decoded(lines)

    @contextmanager
    def follow(self, path: str, silence_s: float, cursor: str, **query: str) -> Iterator[Iterator[str]]:
        """The lines of a stream of server-sent events, after a cursor of it (none: ""), with at most so much silence.

        Raises Unavailable when it breaks off, Expired at silence; it may also end.
        """
        headers = {"Last-Event-ID": cursor} if cursor else {}
        with self._lines("GET", path, silence_s, query=query, headers=headers) as lines:
            yield lines

    @contextmanager
    def _lines(
        self,
        method: str,
        path: str,
        silence_s: float,
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Iterator[Iterator[str]]:
        timeout = httpx2.Timeout(silence_s, connect=CONNECT_S)
        with (
            self._mapped_errors(),
            self._http.stream(
                method, path, json=body, params=dict(query or {}), headers=dict(headers or {}), timeout=timeout
            ) as response,
        ):
            if not response.is_success:
                response.read()
                check(response.status_code, response.content, self.url)
            yield response.iter_lines()

    def _decoded(self, lines: Iterator[str]) -> Iterator[dict[str, Any]]:
        for line in lines:
            if not line.startswith("data:"):
                continue
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                return
            try:
                event = json.loads(data)
            except ValueError:
                raise Failed(f"the answer from {self.url} broke: {data[:80]!r} is no event") from None
            if "error" in event:
                raise from_body(msgspec.convert(event, ErrorAnswer).error)
            yield event
        raise Unavailable("the answer broke off before its end; ask again, or see `shoal status`")

    @contextmanager
    def _mapped_errors(self) -> Iterator[None]:
        try:
            yield
        except (httpx2.ConnectError, httpx2.ConnectTimeout):
            raise Unavailable(self._away) from None
        except httpx2.TimeoutException:
            raise Expired(f"the gateway at {self.url} did not answer in time; see `shoal logs gateway`") from None
        except httpx2.TransportError as e:
            raise Unavailable(
                f"the gateway at {self.url} broke off ({type(e).__name__}); see `shoal logs gateway`, then try again"
            ) from None


def check(status: int, content: bytes, url: str) -> None:
    """Raise the error that an answer holds. Its code decides the exit code."""
    if 200 <= status < 300:
        return
    try:
        raise from_body(msgspec.json.decode(content, type=ErrorAnswer).error)
    except msgspec.DecodeError:
        words = content[:_MAX_WORDS].decode(errors="replace").split("\n")[0]
    raise Failed(f"what answers at {url} is no Shoal gateway: status {status} {words}".rstrip())


def find_gateway(stated: str, home: Home, environ: Mapping[str, str]) -> Gateway:
    """The gateway to use: the one that is stated, SHOAL_GATEWAY, or that of this machine's node.

    This home's secret is shown to this home's gateway only; one elsewhere is shown SHOAL_SECRET.
    """
    url = stated or environ.get("SHOAL_GATEWAY", "")
    if url:
        url = url if "://" in url else f"http://{url}"
        if not url.startswith(("http://", "https://")):
            raise BadInput(f"{url[:80]!r} is not the address of a gateway: write http://host:{GATEWAY_PORT}")
        away = f"no gateway answers at {url}: is `shoal up` running there?"
        return Gateway(url.rstrip("/"), bearer(environ.get("SHOAL_SECRET", ""), "api"), away)
    # Under systemd or launchd nobody writes the file: the gateway is then where its own default is.
    port = environ.get("SHOAL_GATEWAY_PORT") or GATEWAY_PORT
    url = read_or_empty(home.gateway_url) or f"http://{LOOPBACK}:{port}"
    return Gateway(url, bearer(environ.get("SHOAL_SECRET") or home.read_secret(), "api"), NO_NODE)
