"""No secret of a process is in the text that leaves it (I12)."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from shoal_common import logs, redaction, telemetry
from shoal_common.errors import Denied, error_body, from_body
from shoal_common.redaction import MASK, redact, remember_secret, remember_secrets

TOKEN = "hf_marked-token-0123456789"


@pytest.fixture(autouse=True)
def no_secrets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(redaction, "_secrets", {})
    yield


@given(
    secret=st.text(st.characters(codec="ascii", exclude_categories=["Cc", "Zs"]), min_size=6),
    parts=st.lists(st.text()),
)
def test_I12_a_known_secret_is_in_no_redacted_text(secret: str, parts: list[str]) -> None:
    redaction._secrets.clear()
    remember_secret(f" {secret}\n")
    assert secret not in redact(secret.join(["", *parts, ""])).replace(MASK, "")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_TOKEN", f"{TOKEN}\n"),
        ("SHOAL_SECRET", TOKEN),
        ("SHOAL_NATS", f"nats://one:4222,nats://{TOKEN}@two:4222"),
        ("SHOAL_NATS", f"nats://person:{TOKEN}@two:4222"),
        ("HF_ENDPOINT", f"https://person:{TOKEN}@mirror.example/hub"),
    ],
)
def test_I12_secrets_of_the_environment_are_masked(name: str, value: str) -> None:
    remember_secrets({name: value})
    assert redact(f"Illegal header value b'Bearer {TOKEN}\\n'") == f"Illegal header value b'Bearer {MASK}\\n'"
    assert redact("nats://person@two") == "nats://person@two"


def test_I12_errors_of_libraries_cross_the_wire_without_secrets() -> None:
    remember_secret(TOKEN)
    body = error_body(ValueError(f"Illegal header value b'Bearer {TOKEN}'"))
    assert TOKEN not in str(body) and MASK in body.message
    error = Denied(f"the hub refuses {TOKEN}", header=f"Bearer {TOKEN}", status=401)
    assert TOKEN not in f"{error} {error.args} {error.body()}"
    assert error.details["status"] == 401
    assert TOKEN not in from_body(error.body()).message


def test_I12_log_lines_and_their_traces_hold_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    handlers = logging.getLogger().handlers[:]
    try:
        logs.configure_logging("fetcher", "a")
        remember_secret(TOKEN)
        try:
            raise ValueError(TOKEN)
        except ValueError as e:
            logs.StructuredLogger("test").error(f"crashed with {TOKEN}", exc=e, header=f"Bearer {TOKEN}")
            logging.getLogger("library").warning("header %s", TOKEN)
    finally:
        logging.getLogger().handlers[:] = handlers
    lines = capsys.readouterr().err
    assert lines.count(MASK) >= 4 and TOKEN not in lines


def test_I12_spans_hold_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "_tracer", provider.get_tracer("test"))
    remember_secret(TOKEN)
    with pytest.raises(ValueError, match=TOKEN), telemetry.trace_step("file"):
        raise ValueError(TOKEN)
    with telemetry.sending("cmd.fetcher.download") as span:
        telemetry.mark_failed(span, f"refused {TOKEN}")
    spans = exporter.get_finished_spans()
    assert len(spans) == 2
    exported = " ".join(span.to_json() for span in spans)
    assert TOKEN not in exported and exported.count(MASK) >= 3
