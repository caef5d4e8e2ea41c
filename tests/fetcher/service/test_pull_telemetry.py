"""Telemetry of a pull: one trace through fetcher and storage, and bytes by source."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.fetcher.hub_repos import noise
from tests.fetcher.pull_site import Site


class Collector:
    """A real OTLP/HTTP receiver."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.metrics: list[ExportMetricsServiceRequest] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path == "/v1/traces":
                    for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                        for scope in resource.scope_spans:
                            outer.spans += scope.spans
                else:
                    assert self.path == "/v1/metrics"
                    outer.metrics.append(ExportMetricsServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def values(self, name: str) -> dict[tuple[str, ...], int]:
        """Return a metric's last values, by its attributes."""
        found: dict[tuple[str, ...], int] = {}
        for request in self.metrics:
            for resource in request.resource_metrics:
                for scope in resource.scope_metrics:
                    for metric in (m for m in scope.metrics if m.name == name):
                        for point in metric.sum.data_points:
                            key = tuple(sorted(a.value.string_value for a in point.attributes))
                            found[key] = point.as_int
        return found


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A listening collector."""
    made = Collector()
    threading.Thread(target=made.server.serve_forever, daemon=True).start()
    yield made
    made.server.shutdown()
    made.server.server_close()


async def test_a_pull_is_one_trace_with_a_span_per_file(site: Site, collector: Collector) -> None:
    files = {"model.safetensors": noise(3_000_000, site.repo), "config.json": noise(500, site.repo)}
    size = site.make(files)
    async with site.join() as here:
        for service in ("storage", "fetcher"):
            await site["a"].restart(here.here, service, OTEL_EXPORTER_OTLP_ENDPOINT=collector.url)
        await here.pull_ok("a")
        for service in ("fetcher", "storage"):
            assert site["a"][service].stop() == 0  # what is not exported yet is exported now
            site["a"][service].start()
        await site["a"].ready(here.here, "storage", "fetcher")
    (transfer,) = [s for s in collector.spans if s.name == "transfer"]
    spans = [s for s in collector.spans if s.trace_id == transfer.trace_id]
    by_id = {s.span_id: s for s in spans}

    def above(span: Span) -> list[str]:
        names = []
        while (parent := by_id.get(span.parent_span_id)) is not None:
            names.append(parent.name)
            span = parent
        return names

    assert above(transfer)[0] == "process cmd.fetcher.download"
    paths = {a.value.string_value for s in spans if s.name == "file" for a in s.attributes if a.key == "path"}
    assert paths == set(files) and all(above(s)[0] == "transfer" for s in spans if s.name == "file")
    for verb, below in (("reserve", "transfer"), ("commit", "file"), ("seal", "transfer")):
        done = [s for s in spans if s.name == f"process svc.storage.{verb}"]
        assert len(done) == (2 if verb == "commit" else 1), verb
        assert all(above(s)[:2] == [f"send svc.storage.{verb}", below] for s in done), verb
    assert collector.values("shoal.transfer.bytes") == {("hub", "in"): size}
    assert collector.values("shoal.verified.bytes") == {(): size}
    assert collector.values("shoal.download.active") == {(): 0}
