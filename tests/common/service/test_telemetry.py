"""Traces: one trace covers the services that a command touches, and nothing waits for the collector."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from shoal_common import telemetry
from shoal_common.errors import NotFound
from shoal_common.messages.envelope import Command
from shoal_common.rpc.command_worker import CommandHandler
from shoal_common.rpc.request_reply import RpcClient, RpcEndpoint, serve
from tests.common.command_service import subject, working
from tests.common.toy_service import Echo
from tests.harness.fresh import Fresh
from tests.harness.nats import NatsServer, joined
from tests.harness.process import node_environment, started
from tests.harness.waiting import eventually

TOY = str(Path(__file__).parents[1] / "toy_service.py")
EXPORTER = InMemorySpanExporter()


@pytest.fixture(scope="module")
def provider() -> None:
    # Once per process: OpenTelemetry accepts no second provider.
    recording = TracerProvider()
    recording.add_span_processor(SimpleSpanProcessor(EXPORTER))
    trace.set_tracer_provider(recording)


@pytest.fixture
def spans(provider: None) -> Iterator[Callable[[str], list[ReadableSpan]]]:
    EXPORTER.clear()
    yield lambda name: [s for s in EXPORTER.get_finished_spans() if s.name == name]


Spans = Callable[[str], list[ReadableSpan]]


async def test_a_commands_span_is_a_child_of_its_senders(nats: NatsServer, fresh: Fresh, spans: Spans) -> None:
    async def work(command: Command, identity: str) -> None:
        with telemetry.trace_step("reserve", size_bytes=7):
            pass

    async with (
        joined(nats) as here,
        working(here, node := fresh("node"), {"work": CommandHandler(Command, work, 9.0)}),
    ):
        with telemetry.sending("cmd.storage.work") as sender:
            await here.client.request(subject(node, "work"), b"{}", timeout=9, headers=telemetry.headers())
        (sent,), (processed,), (step,) = (
            spans(n) for n in ("send cmd.storage.work", "process cmd.storage.work", "reserve")
        )
        assert sent.kind == SpanKind.PRODUCER and processed.kind == SpanKind.CONSUMER
        assert processed.parent is not None and step.parent is not None
        assert processed.parent.span_id == sender.get_span_context().span_id
        assert step.parent.span_id == processed.context.span_id
        assert {s.context.trace_id for s in (sent, processed, step)} == {sender.get_span_context().trace_id}


async def test_a_command_typed_by_hand_starts_a_trace_of_its_own(
    nats: NatsServer, fresh: Fresh, spans: Spans
) -> None:
    async def refuse(command: Command, identity: str) -> None:
        raise NotFound("there is none")

    async with (
        joined(nats) as here,
        working(here, node := fresh("node"), {"work": CommandHandler(Command, refuse, 9.0)}),
    ):
        await here.client.request(subject(node, "work"), b"{}", timeout=9)
        (processed,) = spans("process cmd.storage.work")
        assert processed.parent is None
        assert processed.status.status_code == StatusCode.ERROR and processed.status.description == "there is none"


async def test_an_rpc_servers_span_is_a_child_of_its_callers(nats: NatsServer, fresh: Fresh, spans: Spans) -> None:
    async def echo(question: Echo) -> Echo:
        return question

    async with joined(nats) as here:
        stopping, node = asyncio.Event(), fresh("node")
        serving = asyncio.create_task(serve(here.nats, "storage", node, {"echo": RpcEndpoint(Echo, echo)}, stopping))
        await RpcClient(here.nats)("storage", node, "echo", Echo(text="x"), Echo, restart_wait_s=5)
        stopping.set()
        await serving
        sent, (processed,) = spans("send svc.storage.echo"), spans("process svc.storage.echo")
        assert processed.parent is not None
        assert processed.parent.span_id in [s.context.span_id for s in sent]


def test_a_redelivery_is_a_new_trace_linked_to_its_sender(spans: Spans) -> None:
    with telemetry.sending("cmd.storage.work") as sender:
        carrier = telemetry.headers({"Nats-Msg-Id": "x"})
    assert carrier["Nats-Msg-Id"] == "x"
    with telemetry.processing("cmd.storage.work", carrier, redelivered=True):
        pass
    (processed,) = spans("process cmd.storage.work")
    assert processed.parent is None
    assert [link.context.span_id for link in processed.links] == [sender.get_span_context().span_id]


def test_a_step_that_raises_is_marked_as_failed(spans: Spans) -> None:
    with pytest.raises(NotFound), telemetry.trace_step("verify"):
        raise NotFound("gone")
    (step,) = spans("verify")
    assert step.status.status_code == StatusCode.ERROR


@pytest.mark.parametrize("header", ["", "junk", "00-zz-zz-01", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "\x00"])
def test_I10_a_foreign_trace_header_is_used_or_ignored(spans: Spans, header: str) -> None:
    with telemetry.processing("cmd.storage.work", {"traceparent": header, "tracestate": "=,=,"}):
        pass
    assert spans("process cmd.storage.work")[0].parent is None


async def test_without_a_collector_the_sdk_is_not_even_loaded() -> None:
    code = "import sys, shoal_common.service; print('sdk', any('opentelemetry.sdk' in m for m in sys.modules))"
    async with started("-c", code, environment=node_environment(Path("/nowhere"), "")) as child:
        await child.wait_line("sdk False")


async def test_a_dead_collector_does_not_delay_stopping(nats: NatsServer, fresh: Fresh, tmp_path: Path) -> None:
    node, environment = toy_of(tmp_path, fresh, nats, "http://127.0.0.1:9")
    async with joined(nats) as here, started(TOY, environment=environment) as toy:
        await RpcClient(here.nats)("storage", node, "echo", Echo(text="x"), Echo, deadline_s=10, restart_wait_s=10)
        started_s = time.monotonic()
        toy.send(signal.SIGTERM)
        assert await toy.wait_exit() == 0
        assert time.monotonic() - started_s < 6


async def test_a_collector_receives_the_spans_of_a_service(nats: NatsServer, fresh: Fresh, tmp_path: Path) -> None:
    received: list[ExportTraceServiceRequest] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        node, environment = toy_of(tmp_path, fresh, nats, f"http://127.0.0.1:{server.server_port}")
        async with joined(nats) as here, started(TOY, environment=environment) as toy:
            await RpcClient(here.nats)(
                "storage", node, "echo", Echo(text="x"), Echo, deadline_s=10, restart_wait_s=10
            )
            toy.send(signal.SIGTERM)  # this exports the rest
            assert await toy.wait_exit() == 0

        async def exported() -> list[str] | None:
            return [
                s.name for r in received for rs in r.resource_spans for ss in rs.scope_spans for s in ss.spans
            ] or None

        assert "process svc.storage.echo" in await eventually(exported, "spans are exported")
    finally:
        server.shutdown()
        server.server_close()


def toy_of(directory: Path, fresh: Fresh, nats: NatsServer, collector: str) -> tuple[str, dict[str, str]]:
    """A node of its own whose service exports to a collector."""
    node = fresh("node")
    (directory / "node.toml").write_text(f'id = "{node}"\n')
    return node, node_environment(directory, nats.url, OTEL_EXPORTER_OTLP_ENDPOINT=collector)
