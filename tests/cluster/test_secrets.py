"""No secret of a node is anywhere but in its own file (I12): all else that a run leaves is searched for each."""

from __future__ import annotations

import base64
import contextlib
import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from shoal_demo import DEMO_MODEL, MODELS_DIR
from shoal_demo.hub_server import running_hub
from tests.harness.shoal import ShoalCluster, ShoalNode, eventually

TOKEN = "hf_0123456789recognizableTokenOfTheHub"
KEPT = ("identity", "operator", "api.key")
"""Where secrets belong, in a home."""


class Collector:
    """What OpenTelemetry sends, as it arrives."""

    def __init__(self) -> None:
        self.received: list[bytes] = []
        received = self.received

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                received.append(gzip.decompress(body) if self.headers["content-encoding"] == "gzip" else body)
                received.append(str(self.headers).encode())
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Print nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def collector() -> Iterator[Collector]:
    running = Collector()
    thread = threading.Thread(target=running.server.serve_forever)
    thread.start()
    yield running
    running.server.shutdown()
    thread.join()
    running.server.server_close()


def secrets_of(node: ShoalNode) -> dict[str, bytes]:
    """Return the secrets in a node's home, as they would be recognized in a text: by file."""
    found: dict[str, bytes] = {}
    for kept in KEPT:
        path = node.home / kept
        for file in path.iterdir() if path.is_dir() else [path] if path.exists() else []:
            text = file.read_text()
            name = f"{node.node}/{kept}/{file.name}"
            if file.suffix == ".nk" or kept == "api.key":
                found[name] = text.strip().encode()
            elif file.suffix == ".key":
                # A line from the middle of the PEM, and the bytes themselves.
                lines = text.splitlines()
                found[name] = lines[2].encode()
                found[f"{name} (DER)"] = base64.b64decode("".join(lines[1:-1]))[36:68]
    return found


def processes_of(node: ShoalNode) -> list[psutil.Process]:
    """Return every process of a node."""
    supervisor = psutil.Process(int((node.home / "run" / "supervisor.pid").read_text()))
    return [supervisor, *supervisor.children(recursive=True)]


def traces_of(node: ShoalNode) -> Iterator[tuple[str, bytes]]:
    """Yield what a run leaves: files, arguments, environments. The fetcher's token is its own."""
    for file in node.home.rglob("*"):
        if file.is_file() and file.relative_to(node.home).parts[0] not in (*KEPT, "store"):
            yield f"{node.node}/{file.relative_to(node.home)}", file.read_bytes()
    for process in processes_of(node):
        with contextlib.suppress(psutil.NoSuchProcess):
            arguments = " ".join(process.cmdline())
            yield f"arguments of {arguments}", arguments.encode()
            environ = dict(process.environ())
            if "shoal_fetcher" in arguments or process.pid == processes_of(node)[0].pid:
                environ.pop("HF_TOKEN", None)
            yield f"environment of {arguments}", repr(environ).encode()


def work(cluster: ShoalCluster) -> list[str]:
    """Do what people do, right and wrong; return everything that is printed and answered."""
    printed: list[str] = []

    def shoal(node: str, *arguments: str) -> None:
        done = cluster[node].shoal(*arguments)
        printed.append(done.stdout + done.stderr)

    shoal("a", "pull", DEMO_MODEL, "--all")
    shoal("a", "pull", "shoal/no-such-model")
    shoal("a", "place", DEMO_MODEL, "--min-nodes", "2")
    shoal("b", "run", DEMO_MODEL, "Why do fish swim together?")
    for node, arguments in (("a", ("status", "--json")), ("b", ("status",)), ("a", ("events", "--no-follow"))):
        shoal(node, *arguments)
    shoal("b", "doctor")
    shoal("a", "doctor", "--json")
    shoal("b", "node", "revoke", "a")
    cluster["b"].wait_reborn("fetcher", cluster["b"].kill("fetcher"))
    for each in cluster.nodes:
        for path in ("/v1/status", "/v1/models", "/v1/downloads", "/v1/instances", "/metrics", "/v1/nothing"):
            printed.append(each.client.get(each.url + path).text)
    return printed


@pytest.mark.deadline_s(300)
def test_I12_no_secret_is_found_outside_its_file_after_a_run(tmp_path: Path, collector: Collector) -> None:
    with (
        running_hub(MODELS_DIR, token=TOKEN, process=True) as hub,
        ShoalCluster(
            tmp_path,
            hub.base_url,
            names=("a", "b"),
            HF_TOKEN=TOKEN,
            SHOAL_LOG="debug",
            OTEL_EXPORTER_OTLP_ENDPOINT=collector.url,
        ) as cluster,
    ):
        printed = work(cluster)
        assert any(DEMO_MODEL in text for text in printed)
        eventually(lambda: collector.received, "a trace has arrived")
        secrets = {"the hub's token": TOKEN.encode()} | {
            k: v for n in cluster.nodes for k, v in secrets_of(n).items()
        }
        assert len(secrets) >= 2 * 7 + 4, sorted(secrets)
        traces = [trace for node in cluster.nodes for trace in traces_of(node)]
        traces += [("what was printed and answered", text.encode()) for text in printed]
        traces += [("what OpenTelemetry got", data) for data in collector.received]
        searched = sum(len(data) for _, data in traces)
        assert searched > 100_000, "so little that the search proves nothing"
        found = {(name, where) for where, data in traces for name, secret in secrets.items() if secret in data}
        assert not found, found
