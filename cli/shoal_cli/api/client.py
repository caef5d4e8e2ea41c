"""The client of the gateway's REST API: where the gateway is, our credential, and its errors as ours."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx2
import msgspec

from shoal_cli.node.node_plan import GATEWAY_PORT, LOOPBACK
from shoal_cli.node_home import Home, read_or_empty
from shoal_common.config import read_settings_file, saved_node_id
from shoal_common.errors import BadInput, Denied, ErrorBody, Expired, InternalError, Unavailable, from_body
from shoal_common.identity.api_key import API_KEY_VARIABLE, read_api_key
from shoal_common.identity.certificates import node_host
from shoal_common.identity.node_identity import NodeIdentity, load_identity
from shoal_common.identity.tls import client_context
from shoal_common.messages import DECODE_ERRORS, WireStruct
from shoal_common.names import check_node
from shoal_common.settings.node import PortSettings
from shoal_common.settings.values import read_settings

T = TypeVar("T")

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 90.0
"""The gateway itself waits up to a minute for short commands."""
SILENCE_TIMEOUT_S = 330.0
"""Between two events of a stream: a long prompt is processed for minutes before the first token."""
_MAX_QUOTED_BYTES = 300
_MAX_LINE_BYTES = 16 << 20
"""Of a stream: a hundred times an event of NATS."""

NO_NODE = "no Shoal node is running here: start one with `shoal up`"


class ErrorResponse(WireStruct):
    """The body of every error response."""

    error: ErrorBody


class GatewayClient:
    """A client of one gateway."""

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str],
        unreachable: str,
        tls: ssl.SSLContext | None = None,
        server_name: str = "",
    ) -> None:
        """`tls` trusts certain authorities, else the system's; `server_name` is in the certificate, else the host."""
        self.url = url
        self._extensions = {"sni_hostname": server_name} if server_name else {}
        self._unreachable = unreachable
        self._http = httpx2.Client(
            base_url=url,
            headers=dict(headers),
            timeout=httpx2.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            verify=True if tls is None else tls,
            # A proxy meant for the internet must not be asked for 127.0.0.1.
            trust_env=False,
        )

    def get(self, path: str, kind: type[T], query: Mapping[str, str] = {}, timeout_s: float = ANSWER_TIMEOUT_S) -> T:
        """Return the answer to a GET."""
        return self._request("GET", path, kind, query=query, timeout_s=timeout_s)

    def post(self, path: str, body: Mapping[str, Any], kind: type[T], timeout_s: float = ANSWER_TIMEOUT_S) -> T:
        """Return the answer to a POST."""
        return self._request("POST", path, kind, body=body, timeout_s=timeout_s)

    def put(self, path: str, body: Mapping[str, Any], kind: type[T]) -> T:
        """Return the answer to a PUT."""
        return self._request("PUT", path, kind, body=body)

    def delete(self, path: str, kind: type[T], **query: str) -> T:
        """Return the answer to a DELETE."""
        return self._request("DELETE", path, kind, query=query)

    def _request(
        self,
        method: str,
        path: str,
        kind: type[T],
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> T:
        timeout = httpx2.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S))
        with self._mapped_errors():
            response = self._http.request(
                method, path, params=dict(query or {}), json=body, timeout=timeout, extensions=self._extensions
            )
        check(response.status_code, response.content, self.url)
        try:
            return msgspec.json.decode(response.content or b"{}", type=kind)
        except DECODE_ERRORS as e:
            raise InternalError(
                f"{self.url} is not a gateway of this version ({e}): check --gateway and `shoal version`"
            ) from None

    @contextmanager
    def events(self, path: str, body: Mapping[str, Any]) -> Iterator[Iterator[dict[str, Any]]]:
        """Yield the events of a streamed answer. Leaving the block early tells the gateway to stop generating."""
        with self._lines("POST", path, SILENCE_TIMEOUT_S, body=body) as lines:
            yield self._decoded(lines)

    @contextmanager
    def follow(self, path: str, silence_s: float, cursor: str, **query: str) -> Iterator[Iterator[str]]:
        """Yield the lines of a stream of server-sent events after a cursor ("": from now on).

        Raises Unavailable when the stream breaks off, Expired after `silence_s` without a line; it may also end.
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
        timeout = httpx2.Timeout(silence_s, connect=CONNECT_TIMEOUT_S)
        with (
            self._mapped_errors(),
            self._http.stream(
                method,
                path,
                json=body,
                params=dict(query or {}),
                headers=dict(headers or {}),
                timeout=timeout,
                extensions=self._extensions,
            ) as response,
        ):
            if not response.is_success:
                response.read()
                check(response.status_code, response.content, self.url)
            yield iter_lines(response)

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
                raise InternalError(f"{self.url} sent an invalid event: {data[:80]!r}") from None
            if "error" in event:
                raise from_body(msgspec.convert(event, ErrorResponse).error)
            yield event
        raise Unavailable("the answer broke off before its end; try again, or see `shoal status`")

    @contextmanager
    def _mapped_errors(self) -> Iterator[None]:
        try:
            yield
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as e:
            if _is_wrong_certificate(e):
                raise Denied(
                    f"{self.url} has no certificate of this cluster under that name: nothing was sent; give the "
                    "address with which the node joined, and --home of a node of its cluster"
                ) from None
            raise Unavailable(self._unreachable) from None
        except httpx2.TimeoutException:
            raise Expired(f"the gateway at {self.url} did not answer in time; see `shoal logs gateway`") from None
        except httpx2.TransportError as e:
            raise Unavailable(
                f"the gateway at {self.url} closed the connection ({type(e).__name__}); see `shoal logs gateway`, "
                "then try again"
            ) from None


def _is_wrong_certificate(error: BaseException) -> bool:
    at: BaseException | None = error
    while at is not None and not isinstance(at, ssl.SSLCertVerificationError):
        at = at.__cause__ or at.__context__
    return at is not None


def iter_lines(response: httpx2.Response) -> Iterator[str]:
    """Yield the lines of a stream. Only a line feed ends one: httpx2's own would split at U+2028 in a text, too.

    Raises InternalError for a line that does not end.
    """
    rest = b""
    for chunk in response.iter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r").decode(errors="replace")
        if len(rest) > _MAX_LINE_BYTES:
            raise InternalError(f"{response.url} sent a line of more than {_MAX_LINE_BYTES >> 20} MiB")
    if rest:
        yield rest.decode(errors="replace")


def check(status: int, content: bytes, url: str) -> None:
    """Raise the error that a response holds. Its code decides the exit code."""
    if 200 <= status < 300:
        return
    try:
        raise from_body(msgspec.json.decode(content, type=ErrorResponse).error)
    except DECODE_ERRORS:
        text = content[:_MAX_QUOTED_BYTES].decode(errors="replace").split("\n")[0]
    raise InternalError(f"{url} is not a Shoal gateway: status {status} {text}".rstrip())


def resolve_gateway(explicit: str, home: Home, environ: Mapping[str, str]) -> GatewayClient:
    """Return the gateway to use: the explicit one, SHOAL_GATEWAY, or that of this machine's node.

    This home's key is sent to this home's gateway only (I12); another one is sent SHOAL_API_KEY.
    """
    url = explicit or environ.get("SHOAL_GATEWAY", "")
    if url:
        url = url if "://" in url else f"http://{url}"
        if not url.startswith(("http://", "https://")):
            raise BadInput(f"{url[:80]!r} is not a gateway URL: write http://host:{GATEWAY_PORT}")
        unreachable = f"no gateway answers at {url}: is `shoal up` running there?"
        headers = _authorization(environ.get(API_KEY_VARIABLE, "").strip())
        identity = own_identity(home) if url.startswith("https://") else None
        return GatewayClient(
            url.rstrip("/"), headers, unreachable, client_context(identity.authority) if identity else None
        )
    # Under systemd or launchd nothing writes the file: the gateway then listens on its default port.
    port = read_settings(PortSettings, read_settings_file(home.root), environ).gateway_port
    url = read_or_empty(home.gateway_url) or f"http://{LOOPBACK}:{port}"
    headers = _authorization(read_api_key(home.root))
    if url.startswith("http://"):
        return GatewayClient(url, headers, NO_NODE)
    identity = own_identity(home)
    if not url.startswith("https://") or identity is None:
        raise BadInput(
            f"{home.gateway_url} does not hold a gateway's URL: `shoal down` and `shoal up` write it again"
        )
    return GatewayClient(url, headers, NO_NODE, client_context(identity.authority), node_host(identity.node))


def own_identity(home: Home) -> NodeIdentity | None:
    """Return the identity of this machine's node; None outside a cluster."""
    node = saved_node_id(home.root)
    return load_identity(home.root, check_node(node)) if node else None


def _authorization(key: str) -> dict[str, str]:
    if not (key.isascii() and key.isprintable()):
        raise BadInput(f"{API_KEY_VARIABLE} is not a key: `shoal key` prints it on the node that it is of")
    return {"Authorization": f"Bearer {key}"} if key else {}
