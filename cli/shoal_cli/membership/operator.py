"""The operator at work: makes the streams, publishes who is a member, and answers who joins and who leaves.

A task of the supervisor on the node that runs the cluster's NATS.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import msgspec
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from shoal_cli.membership.invite_code import InviteCode
from shoal_cli.membership.operator_files import OperatorFiles
from shoal_common.bus import subjects
from shoal_common.bus.connection import Nats, NatsLogin, connected
from shoal_common.bus.keys import member_key
from shoal_common.bus.kv_bucket import Buckets
from shoal_common.bus.streams import ensure_streams, lost_buckets, read_bucket_marks
from shoal_common.errors import Denied, ShoalError, Unavailable, error_body
from shoal_common.identity.nkey import Nkey
from shoal_common.identity.tls import client_context
from shoal_common.logs import StructuredLogger
from shoal_common.messages import decode, encode
from shoal_common.messages.envelope import Empty, RpcReply
from shoal_common.messages.membership import JoinReply, JoinRequest, Member

log = StructuredLogger("operator")

INVITATION_LIFETIME_S = 3600.0
_RETRY_S = 1.0
_RELOAD_DEADLINE_S = 10.0
_PROBE_INTERVAL_S = 0.02
_CHECK_INTERVAL_S = 20.0
"""For a bucket that was purged while NATS stayed up."""


class Operator:
    """Changes who is a member.

    `reload_users` writes the NATS server's configuration, with a probe's public key, and tells the server to read it.
    """

    def __init__(self, files: OperatorFiles, node: str, reload_users: Callable[[str], None]) -> None:
        self._files, self._node, self._reload_users = files, node, reload_users
        self.is_ready = False
        """Whether the streams and the members' keys are there."""
        self._server = ""
        self._cluster_urls: list[str] = []
        self._changing = asyncio.Lock()
        self._nats: Nats | None = None

    async def run(self, server: str, cluster_urls: list[str], on_ready: Callable[[], None]) -> None:
        """Work until cancelled. `cluster_urls`: where other machines find NATS."""
        self._server, self._cluster_urls = server, cluster_urls
        login = await asyncio.to_thread(self._login)
        async with connected([server], f"operator.{self._node}", login=login) as nats:
            await nats.client.subscribe(subjects.join("*"), cb=self._on_join)
            await nats.client.subscribe(subjects.leave("*"), cb=self._on_leave)
            self._nats = nats
            while True:
                seen = nats.reconnects.count
                try:
                    await ensure_streams(nats.js)
                    await self._publish_members()
                    self.is_ready = True
                    on_ready()
                    await _wait_for_loss(nats, seen)
                except (Unavailable, NatsError) as e:
                    log.warning("streams and members are not published yet", reason=str(e) or type(e).__name__)
                    await asyncio.sleep(_RETRY_S)

    def _login(self) -> NatsLogin:
        return NatsLogin(self._files.nkey, "_INBOX.operator", client_context(self._files.authority))

    async def invite(self, lifetime_s: float) -> InviteCode:
        """Return a new code that lets one node in. Raises Refused if too many are open, Unavailable."""
        async with self._changing:
            code = await asyncio.to_thread(self._files.invite, lifetime_s)
            await self._apply()
        log.info("invited", invitation=code.id)
        return code

    async def revoke(self, node: str) -> None:
        """Take a node out of the cluster at once. Raises NotFound, Refused, Unavailable."""
        async with self._changing:
            await asyncio.to_thread(self._files.remove, node, self._node)
            await self._apply()
            await self._publish_members()
        log.info("revoked", member=node)

    async def _apply(self) -> None:
        """Have the NATS server read who may log in; returns once it has. Raises Unavailable."""
        probe = Nkey.create()
        self._reload_users(probe.public)
        context = await asyncio.to_thread(client_context, self._files.authority)
        login = NatsLogin(probe, "_INBOX.probe", context)
        try:
            async with asyncio.timeout(_RELOAD_DEADLINE_S):
                await _wait_let_in(self._server, login)
        except TimeoutError:
            raise Unavailable(
                f"NATS has not read who its members are within {_RELOAD_DEADLINE_S:.0f} s: see its log, and try again"
            ) from None

    async def _publish_members(self) -> None:
        """Bring `spec` to what the file says. Nobody else writes these keys."""
        if self._nats is None:
            raise Unavailable("the operator is not connected to NATS yet: try again in a moment")
        spec = Buckets(self._nats.js).spec
        members = await asyncio.to_thread(self._files.members)
        wanted = {member_key(node): member for node, member in members.items()}
        for key, member in wanted.items():
            if await spec.get_as(key, Member) != member:
                await spec.put(key, member)
        for key in await spec.keys("member.*"):
            if key not in wanted:
                await spec.delete(key)

    async def _on_join(self, message: Msg) -> None:
        await self._answer(message, self._join)

    async def _on_leave(self, message: Msg) -> None:
        await self._answer(message, self._leave)

    async def _join(self, message: Msg) -> object:
        invitation = message.subject.rpartition(".")[2]
        request = decode(message.data, JoinRequest)
        async with self._changing:
            member = await asyncio.to_thread(self._files.admit, invitation, request)
            await self._apply()
            await self._publish_members()
        log.info("joined", member=member.node, invitation=invitation)
        return JoinReply(cluster=self._node, certificate=member.certificate, nats=self._cluster_urls)

    async def _leave(self, message: Msg) -> object:
        node = message.subject.rpartition(".")[2]
        # Answered first: the connection that asks ends with the membership.
        await message.respond(encode(RpcReply(result=msgspec.Raw(encode(Empty())))))
        if self._nats is not None:
            await self._nats.client.flush()
        await self.revoke(node)
        return None

    async def _answer(self, message: Msg, handle: Callable[[Msg], Awaitable[object]]) -> None:
        if subjects.is_from_consumer(message.reply):
            return
        try:
            result = await handle(message)
            reply = None if result is None else RpcReply(result=msgspec.Raw(encode(result)))
        except ShoalError as e:
            log.warning("refused", subject=message.subject, reason=e.message)
            reply = RpcReply(error=e.body())
        except Exception as e:  # noqa: BLE001  # a reply is owed; the log has the trace
            log.error("request failed", exc=e, subject=message.subject)
            reply = RpcReply(error=error_body(e))
        if reply is not None and message.reply:
            await message.respond(encode(reply))


async def _wait_let_in(server: str, login: NatsLogin) -> None:
    while True:
        try:
            async with connected([server], "operator's probe", login=login):
                return
        except Denied:
            await asyncio.sleep(_PROBE_INTERVAL_S)


async def _wait_for_loss(nats: Nats, connection: int) -> None:
    """Return once NATS is another one than before, or has lost a bucket's content."""
    marks = await read_bucket_marks(nats.js)
    while nats.reconnects.count == connection:
        with suppress(TimeoutError):
            async with asyncio.timeout(_CHECK_INTERVAL_S):
                await nats.reconnects.wait_after(connection)
        if lost_buckets(marks, await read_bucket_marks(nats.js)):
            return
