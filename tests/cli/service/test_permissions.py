"""A real NATS server holds every user of every node to the table of permissions, subject by subject (I12)."""

from __future__ import annotations

import asyncio
import itertools
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from shoal_cli.membership.nats_users import tls_configuration, users_configuration
from shoal_cli.membership.operator_files import OperatorFiles
from shoal_cli.membership.permissions import join_inbox
from shoal_common.bus.connection import Nats, NatsLogin, connected, login_of
from shoal_common.bus.kv_bucket import Buckets
from shoal_common.bus.streams import ensure_streams, stream_configs
from shoal_common.errors import Denied
from shoal_common.host.private_files import replace_private
from shoal_common.identity.nkey import Nkey
from shoal_common.identity.node_identity import CLI, USERS, NodeIdentity
from shoal_common.identity.tls import client_context
from shoal_common.names import SERVICES
from tests.harness.ports import ReservedPort
from tests.harness.waiting import eventually

NODES = ("a", "b")
ANY = {"a", "b", "any"}

# Who of node a may publish what: every subject of the cluster that matches no line here is refused to everybody.
# The first line that matches counts. `*` is any text.
MAY_PUBLISH: tuple[tuple[str, str], ...] = (
    ("$KV.live.a.storage", "storage"),
    ("$KV.live.a.fetcher", "fetcher"),
    ("$KV.live.a.fileserver", "fileserver"),
    ("$KV.live.a.placement", "placement"),
    ("$KV.live.a.inference", "inference"),
    ("$KV.live.a.gateway", "gateway"),
    ("$KV.state.storage.a", "storage placement"),
    ("$KV.state.model.a.m", "storage placement"),
    ("$KV.state.shard.a.m", "storage placement"),
    ("$KV.state.download.a.m", "fetcher placement"),
    ("$KV.state.stage.i.0", "inference placement"),
    ("$KV.state.*", "placement"),
    ("$KV.spec.download.a.m", "fetcher placement"),
    ("$KV.spec.member.*", ""),
    ("$KV.spec.mark", ""),
    ("$KV.spec.*", "placement"),
    ("$KV.lease.leader.placement", "placement"),
    ("$KV.lease.origin.x", "fetcher"),
    ("$KV.done.x", "storage fetcher placement inference gateway cli"),
    ("shoal.v1.cmd.fetcher.a.download", "gateway cli inference"),
    ("shoal.v1.cmd.*", "gateway cli"),
    ("shoal.v1.svc.storage.a.manifest", "fetcher fileserver cli"),
    ("shoal.v1.svc.storage.b.manifest", "fetcher fileserver"),
    ("shoal.v1.svc.storage.a.plan", "fetcher gateway cli"),
    ("shoal.v1.svc.storage.b.plan", "gateway cli"),
    ("shoal.v1.svc.storage.a.lease", "fetcher inference cli"),
    ("shoal.v1.svc.storage.a.release_lease", "fetcher inference cli"),
    ("shoal.v1.svc.storage.a.record_use", "fetcher inference cli"),
    ("shoal.v1.svc.storage.b.record_use", "inference"),
    ("shoal.v1.svc.storage.a.ping", "fetcher placement gateway cli"),
    ("shoal.v1.svc.storage.a.*", "fetcher cli"),
    ("shoal.v1.svc.fetcher.a.stop_downloads", "storage cli"),
    ("shoal.v1.svc.fetcher.a.shape", "placement cli"),
    ("shoal.v1.svc.fetcher.b.shape", "placement"),
    ("shoal.v1.svc.placement.?.links", "placement gateway cli"),
    ("shoal.v1.svc.placement.?.ping", "placement gateway cli"),
    ("shoal.v1.svc.placement.*", "gateway cli"),
    ("shoal.v1.svc.inference.?.generate", "gateway cli"),
    ("shoal.v1.svc.inference.?.cancel", "gateway cli"),
    ("shoal.v1.svc.*.ping", "placement gateway cli"),
    ("shoal.v1.svc.*.a.*", "cli"),
    ("shoal.v1.evt.storage.a.x", "storage"),
    ("shoal.v1.evt.fetcher.a.x", "fetcher"),
    ("shoal.v1.evt.fileserver.a.x", "fileserver"),
    ("shoal.v1.evt.placement.a.x", "placement"),
    ("shoal.v1.evt.inference.a.x", "inference"),
    ("shoal.v1.evt.gateway.a.x", "gateway"),
    ("shoal.v1.have.a.x", "fetcher"),
    ("shoal.v1.lost.?", "fetcher placement inference gateway"),
    ("shoal.v1.tok.x", "inference"),
    ("shoal.v1.leave.a", "cli"),
    ("$JS.API.INFO", "cli"),
    ("$JS.API.STREAM.INFO.*", " ".join(USERS)),
    ("$JS.API.STREAM.PURGE.CMD", "placement"),
    ("$JS.API.CONSUMER.DELETE.CMD.*", "placement"),
    *((f"$JS.API.CONSUMER.CREATE.KV_{bucket}", "cli") for bucket in ("live", "spec", "state", "lease", "done")),
    ("$JS.API.CONSUMER.CREATE.KV_done.x", "storage fetcher placement inference gateway cli"),
    ("$JS.API.CONSUMER.CREATE.KV_lease.x", "fetcher placement cli"),
    ("$JS.API.CONSUMER.CREATE.KV_*.x", " ".join(USERS)),
    ("$JS.API.CONSUMER.CREATE.EVT*", "gateway cli"),
    ("$JS.API.CONSUMER.CREATE.CMD.storage-a.shoal.v1.cmd.storage.a.*", "storage"),
    ("$JS.API.CONSUMER.CREATE.CMD.placement-any.shoal.v1.cmd.placement.any.*", "placement"),
    ("$JS.API.CONSUMER.MSG.NEXT.CMD.storage-a", "storage"),
    ("$JS.ACK.CMD.storage-a.1", "storage"),
)

MAY_SUBSCRIBE: tuple[tuple[str, str], ...] = (
    ("_INBOX.a.storage.x", "storage"),
    ("_INBOX.a.cli.x", "cli"),
    ("shoal.v1.svc.storage.a.x", "storage"),
    ("shoal.v1.svc.inference.a.x", "inference"),
    ("shoal.v1.cmd.storage.a.x", "storage"),
    ("shoal.v1.cmd.placement.any.x", "placement"),
    ("shoal.v1.have.b.x", "fetcher"),
    ("shoal.v1.lost.b", "placement"),
    ("shoal.v1.tok.x", "gateway cli"),
)

FORBIDDEN_TO_HEAR = [
    *("_INBOX.b.storage.x", "_INBOX.a.x", "_INBOX.join.x", "shoal.v1.svc.storage.b.x", "shoal.v1.cmd.storage.b.x"),
    *("shoal.v1.join.x", "shoal.v1.evt.storage.a.x", "$KV.spec.member.a", "$JS.API.INFO", "other"),
]

VERBS = [
    *("manifest", "plan", "lease", "record_use", "release_lease", "reserve", "ping", "shape", "links", "generate"),
    *("cancel", "stop_downloads"),
]


def every_subject() -> Iterator[str]:
    """Yield a subject of each kind that there is, for both nodes."""
    for node in NODES:
        yield from (f"$KV.live.{node}.{service}" for service in SERVICES)
        yield from (f"$KV.state.{key}" for key in (f"storage.{node}", f"links.{node}", f"node.{node}"))
        yield from (f"$KV.state.{kind}.{node}.m" for kind in ("model", "shard", "download"))
        yield f"$KV.spec.download.{node}.m"
        yield from (f"$KV.spec.member.{node}", f"$KV.spec.node.{node}")
        yield from (f"shoal.v1.evt.{service}.{node}.x" for service in SERVICES)
        yield from (f"shoal.v1.svc.{s}.{node}.{verb}" for s, verb in itertools.product(SERVICES, VERBS))
        yield from (f"shoal.v1.have.{node}.x", f"shoal.v1.lost.{node}", f"shoal.v1.leave.{node}")
        yield f"$JS.ACK.CMD.storage-{node}.1"
        yield f"$JS.API.CONSUMER.MSG.NEXT.CMD.storage-{node}"
        yield f"$JS.API.CONSUMER.CREATE.CMD.storage-{node}.shoal.v1.cmd.storage.{node}.*"
        yield f"$JS.API.CONSUMER.DELETE.CMD.storage-{node}"
    yield from (f"shoal.v1.cmd.{s}.{n}.{v}" for s in SERVICES for n in sorted(ANY) for v in ("download", "set"))
    yield from ("$KV.spec.instance.i", "$KV.state.instance.i", "$KV.state.stage.i.0", "$KV.state.members.placement")
    yield from ("$KV.spec.mark", "$KV.spec.leader.placement", "$KV.lease.leader.placement", "$KV.lease.origin.x")
    yield from ("$KV.done.x", "shoal.v1.tok.x", "shoal.v1.join.x", "$SYS.REQ.SERVER.PING", "$JS.API.INFO", "other")
    yield "$JS.API.CONSUMER.CREATE.CMD.placement-any.shoal.v1.cmd.placement.any.*"
    for stream in (str(config.name) for config in stream_configs(1)):
        yield from (f"$JS.API.STREAM.{verb}.{stream}" for verb in ("INFO", "CREATE", "UPDATE", "DELETE", "PURGE"))
        yield from (f"$JS.API.STREAM.MSG.{verb}.{stream}" for verb in ("GET", "DELETE"))
        yield from (f"$JS.API.CONSUMER.{verb}.{stream}" for verb in ("LIST", "NAMES", "CREATE"))
        yield f"$JS.API.CONSUMER.CREATE.{stream}.x"
        yield f"$JS.API.CONSUMER.DURABLE.CREATE.{stream}.x"


def allowed(table: tuple[tuple[str, str], ...], subject: str) -> set[str]:
    """Return the users of node a to whom the table gives a subject."""
    return next((set(users.split()) for pattern, users in table if fnmatchcase(subject, pattern)), set())


class Server:
    """A nats-server that knows an operator, two nodes, and an invitation."""

    def __init__(self, directory: Path) -> None:
        self.files = OperatorFiles(directory / "a")
        self.identities = {node: NodeIdentity(directory / node, node) for node in NODES}
        self.files.create(self.identities["a"], ["127.0.0.1"])
        self.code = self.files.invite(600)
        self.identities["b"].create()
        self.directory, self._port = directory, ReservedPort()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"tls://127.0.0.1:{self._port.number}"

    def configure(self, probe: str = "") -> None:
        """Write its configuration, with the public key of a probe."""
        text = f'listen: "127.0.0.1:{self._port.number}"\njetstream {{ store_dir: "{self.directory}/store" }}\n'
        text += tls_configuration(self.files.nats_certificate_file, self.files.nats_key_file)
        text += users_configuration(self.files.nkey.public, self.files.members(), self.files.invitations(), probe)
        replace_private(self.directory / "nats.conf", text.encode())

    def start(self) -> None:
        """Start it."""
        self.configure()
        program = Path(sys.executable).with_name("nats-server")
        with (self.directory / "nats.log").open("ab") as log:
            self._process = subprocess.Popen([program, "-c", self.directory / "nats.conf"], stdout=log, stderr=log)

    def reload(self, probe: Nkey) -> None:
        """Have it read a configuration that lets in a probe, too."""
        assert self._process is not None
        self.configure(probe.public)
        self._process.send_signal(signal.SIGHUP)

    def refusals(self) -> int:
        """Return how many logins it has refused."""
        return (self.directory / "nats.log").read_text().count("authentication error")

    def stop(self) -> None:
        """Stop it."""
        assert self._process is not None
        self._process.terminate()
        self._process.wait(30)

    def operator(self) -> NatsLogin:
        """Return the operator's login."""
        return NatsLogin(self.files.nkey, "_INBOX.operator", client_context(self.files.authority))

    def invited(self) -> NatsLogin:
        """Return the login of who holds the invitation."""
        return NatsLogin(self.code.key, join_inbox(self.code.id), client_context(self.files.authority))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("permissions")
    running = Server(directory)
    running.start()
    yield running
    running.stop()
    shutil.rmtree(directory)


async def refused(nats: Nats, kind: str, errors: list[str]) -> set[str]:
    """Return the subjects, in lower case, that the server has refused so far."""
    await nats.client.flush()
    found = (re.search(rf'permissions violation for {kind} to "(.*)"', e) for e in errors)
    return {m.group(1).split('" ')[0] for m in found if m}


async def attempt(server: Server, login: NatsLogin, publish: list[str], subscribe: list[str]) -> tuple[set[str], ...]:
    """Publish and subscribe to everything; return what was refused, in lower case."""
    errors: list[str] = []

    async def on_error(e: Exception) -> None:
        errors.append(str(e).lower())

    async with connected([server.url], "test", 30, login) as nats:
        nats.client._error_cb = on_error
        for subject in publish:
            await nats.client.publish(subject, b"")
        for subject in subscribe:
            await nats.client.subscribe(subject)
        wanted: tuple[set[str], ...] = ()

        async def settled() -> bool:
            nonlocal wanted
            before = wanted
            wanted = (await refused(nats, "publish", errors), await refused(nats, "subscription", errors))
            return before == wanted

        await eventually(settled, "the server has answered")
        return wanted


@pytest.mark.deadline_s(300)
@pytest.mark.parametrize("user", USERS)
async def test_I12_a_user_may_do_what_the_table_says_and_no_more(server: Server, user: str) -> None:
    async with connected([server.url], "operator", 30, server.operator()) as nats:
        await ensure_streams(nats.js)
    publish, subscribe = list(dict.fromkeys(every_subject())), [s for s, _ in MAY_SUBSCRIBE]
    subscribe += FORBIDDEN_TO_HEAR
    login = login_of(server.identities["a"], user)
    denied_publish, denied_subscribe = await attempt(server, login, publish, subscribe)
    right = {s for s in publish if user in allowed(MAY_PUBLISH, s)}
    assert {s for s in publish if s.lower() not in denied_publish} == right
    assert {s for s in subscribe if s.lower() not in denied_subscribe} == {
        s for s in subscribe if user in allowed(MAY_SUBSCRIBE, s)
    }


@pytest.mark.deadline_s(300)
async def test_I12_an_invitation_lets_its_holder_ask_and_nothing_else(server: Server) -> None:
    publish = [*dict.fromkeys(every_subject()), f"shoal.v1.join.{server.code.id}"]
    denied, received = await attempt(server, server.invited(), publish, ["_INBOX.a.x", "shoal.v1.tok.x"])
    assert {s for s in publish if s.lower() not in denied} == {f"shoal.v1.join.{server.code.id}"}
    assert len(received) == 2


async def test_I12_keys_that_the_operator_does_not_know_are_refused(server: Server) -> None:
    stranger = NatsLogin(Nkey.create(), "_INBOX", client_context(server.files.authority))
    with pytest.raises(Denied, match="refuses our credentials"):
        async with connected([server.url], "test", 30, stranger):
            raise AssertionError("it got in")
    unknown = NatsLogin(server.identities["b"].nkey(CLI), "_INBOX", client_context(server.files.authority))
    with pytest.raises(Denied, match="refuses our credentials"):
        async with connected([server.url], "test", 30, unknown):
            raise AssertionError("b is no member yet")


async def test_a_login_is_tried_again_while_the_users_change(server: Server) -> None:
    async with connected([server.url], "test", 30, server.operator()):
        refusals = server.refusals()
    key = Nkey.create()

    async def log_in() -> None:
        async with connected([server.url], "test", 30, NatsLogin(key, "_INBOX", server.operator().tls)):
            pass

    logging_in = asyncio.create_task(log_in())

    async def refused() -> bool:
        return server.refusals() > refusals

    await eventually(refused, "it is refused")
    server.reload(key)
    await logging_in


async def test_I12_a_consumer_cannot_carry_a_request_to_a_service(server: Server) -> None:
    """Whoever may create consumers may name any subject for their messages: services do not take those."""
    async with connected([server.url], "operator", 30, server.operator()) as operator:
        await ensure_streams(operator.js)
        received: list[str] = []

        async def on_request(message: object) -> None:
            received.append(str(getattr(message, "reply", "")))

        await operator.client.subscribe("shoal.v1.svc.storage.b.commit", cb=on_request)
        await operator.client.flush()
        async with connected([server.url], "test", 30, login_of(server.identities["a"], "storage")) as nats:
            await Buckets(nats.js).state.put("storage.a", {"forged": True})
            await nats.js.add_consumer(
                "KV_state",
                name="forger",
                filter_subject="$KV.state.storage.a",
                deliver_subject="shoal.v1.svc.storage.b.commit",
                ack_policy="none",
            )

            async def delivered() -> bool:
                return bool(received)

            await eventually(delivered, "the server delivers it")
        assert all(reply.startswith("$JS.") for reply in received), "what the services tell it by"
