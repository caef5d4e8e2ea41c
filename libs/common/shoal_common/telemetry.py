"""Traces and metrics. The trace context travels in NATS headers: one trace covers all services that a command
touches.

Both are exported over OTLP/HTTP if OTEL_EXPORTER_OTLP_ENDPOINT is set; otherwise nothing is recorded and the SDK is
not even loaded.

shoal.transfer.bytes     counter        bytes of blobs: `source` hub or peer, `direction` in or out
shoal.download.active    up-down        running downloads of this node; not paused or ended ones
shoal.verified.bytes     counter        bytes of blobs that were hashed and made durable for a download
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from opentelemetry import context, metrics, propagate, trace
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode

from shoal_common.redaction import redact

_EXPORT_TIMEOUT_S = 2
_tracer = trace.get_tracer("shoal")
_meter = metrics.get_meter("shoal")
_transferred = _meter.create_counter("shoal.transfer.bytes", "By", "Bytes of blobs that came in or went out")
_active = _meter.create_up_down_counter("shoal.download.active", "{download}", "Downloads at work")
_verified = _meter.create_counter("shoal.verified.bytes", "By", "Bytes hashed and made durable for downloads")


def set_up(service: str, node: str, environ: Mapping[str, str]) -> Callable[[], None]:
    """Start exporting if the environment names a collector. Returns a function to call at exit."""
    if not environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        return lambda: None
    # Loaded only if used: the SDK and protobuf take some 20 MB in every process.
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter  # noqa: PLC0415
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
    from opentelemetry.sdk.metrics import MeterProvider  # noqa: PLC0415
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader  # noqa: PLC0415
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    resource = Resource.create({"service.name": f"shoal-{service}", "service.instance.id": node})
    # A dead collector must not delay stopping; the default timeout would, by ten seconds.
    traces = TracerProvider(resource=resource)
    traces.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(timeout=_EXPORT_TIMEOUT_S)))
    trace.set_tracer_provider(traces)
    # Every minute, unless OTEL_METRIC_EXPORT_INTERVAL says otherwise, and at exit.
    reader = PeriodicExportingMetricReader(OTLPMetricExporter(timeout=_EXPORT_TIMEOUT_S))
    meters = MeterProvider([reader], resource)
    metrics.set_meter_provider(meters)

    def stop() -> None:
        traces.shutdown()
        meters.shutdown(timeout_millis=_EXPORT_TIMEOUT_S * 1000)

    return stop


def headers(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return headers for a message to send now: the current trace context, and `extra`."""
    out = dict(extra or {})
    propagate.inject(out)
    return out


@contextmanager
def sending(subject_template: str) -> Iterator[Span]:
    """Span around sending a message. The template contains no ids: `cmd.fetcher.download`."""
    attributes = {"messaging.system": "nats", "messaging.destination.name": subject_template}
    with _span(f"send {subject_template}", kind=SpanKind.PRODUCER, attributes=attributes) as span:
        yield span


@contextmanager
def processing(subject_template: str, carrier: Mapping[str, str] | None, redelivered: bool = False) -> Iterator[Span]:
    """Span around handling a message: a child of its sender's, or on redelivery a new trace linked to it."""
    parent = propagate.extract(dict(carrier or {}), context=context.Context())
    attributes = {"messaging.system": "nats", "messaging.destination.name": subject_template}
    links = []
    if redelivered:
        linked = trace.get_current_span(parent).get_span_context()
        links = [Link(linked)] if linked.is_valid else []
        parent = context.Context()
    with _span(
        f"process {subject_template}",
        context=parent,
        kind=SpanKind.CONSUMER,
        attributes=attributes,
        links=links,
    ) as span:
        yield span


@contextmanager
def trace_step(name: str, **attributes: str | int | float) -> Iterator[Span]:
    """Span around a step of work: `reserve`, `file`, `verify`. An exception marks it as failed."""
    with _span(name, attributes=attributes) as span:
        yield span


@contextmanager
def _span(name: str, **options: Any) -> Iterator[Span]:
    # OpenTelemetry would record an exception as it is, with whatever secret its text holds.
    with _tracer.start_as_current_span(
        name, record_exception=False, set_status_on_exception=False, **options
    ) as span:
        try:
            yield span
        except Exception as e:
            text = redact(f"{type(e).__name__}: {e}")
            stack = redact("".join(traceback.format_exception(e)))
            span.add_event("exception", {"exception.message": text, "exception.stacktrace": stack})
            span.set_status(Status(StatusCode.ERROR, text))
            raise


def mark_failed(span: Span, message: str) -> None:
    """Mark a span as failed without an exception."""
    span.set_status(Status(StatusCode.ERROR, redact(message)))


def count_transferred(count: int, source: Literal["hub", "peer"], direction: Literal["in", "out"]) -> None:
    """Count bytes of blobs that came in from the hub or a peer, or went out to one."""
    _transferred.add(count, {"source": source, "direction": direction})


def count_verified(count: int) -> None:
    """Count bytes of a download that are hashed and durable."""
    _verified.add(count)


@contextmanager
def count_running_download() -> Iterator[None]:
    """Count a download as running while the body runs."""
    _active.add(1)
    try:
        yield
    finally:
        _active.add(-1)
