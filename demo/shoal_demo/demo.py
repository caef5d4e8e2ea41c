"""Run three nodes on this machine: download a model once, share it, run it on two nodes, chat.

Only the addresses differ from three machines: each node is its own `shoal up`, with its own store, supervisor and
services. With `DEMO_EXIT=1` the demo exits by itself and prints one JSON line last; otherwise Ctrl-C stops it.
However it ends, it stops what it started and deletes what it wrote.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from shoal_demo import DEMO_MODEL, DEMO_PROMPT, MODELS_DIR
from shoal_demo.hub_server import running_hub

NODES = ("node-1", "node-2", "node-3")
STAGES = 2
_UP_TIMEOUT_S = 120.0
_DOWN_TIMEOUT_S = 60.0
_JOIN_TIMEOUT_S = 60.0
_HTTP_TIMEOUT_S = 300.0
_KIB = 1024


def main() -> int:
    """Run the demo. Returns the exit code."""
    # SIGTERM acts like Ctrl-C; SIGINT also works in a shell's background job, which ignores it by default.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    try:
        with running_hub(MODELS_DIR, process=True) as hub, _nodes(hub.base_url) as (gateways, home):
            summary = _show(hub.base_url, gateways, home / "api.key", lambda: hub.stats().bytes)
            if os.environ.get("DEMO_EXIT") == "1":
                print(json.dumps(summary))
                return 0
            print(f"\nStatus page: {gateways[0]}/    OpenAI API: {gateways[0]}/v1    Ctrl-C stops the demo.")
            print(f"For examples/: export SHOAL_GATEWAY={gateways[0]} SHOAL_HOME={home}")
            print(
                f"Other users of this machine, and everyone on macOS: export SHOAL_API_KEY=$(cat {home / 'api.key'})"
            )
            signal.pause()
    except KeyboardInterrupt:
        print("\nstopped; all nodes have ended and their files are deleted")
    except subprocess.CalledProcessError as e:
        print(f"shoal demo: `{' '.join(map(str, e.cmd[3:6]))} …` failed with status {e.returncode}", file=sys.stderr)
        return 1
    except httpx2.HTTPStatusError as e:
        print(f"shoal demo: {e.request.url} answered {e.response.status_code}: {e.response.text}", file=sys.stderr)
        return 1
    return 0


_ANY_PORTS = {"SHOAL_FILESERVER_PORT": "0", "SHOAL_STAGE_PORT": "0"}
"""The usual ones are a node's of this machine."""


def _shoal(*arguments: str | Path, timeout_s: float, stdin: str = "") -> str:
    command = [sys.executable, "-P", "-m", "shoal_cli", *map(str, arguments)]
    # In its own session, so that Ctrl-C reaches only the demo, which stops its nodes in order.
    return subprocess.run(
        command,
        check=True,
        input=stdin,
        stdout=subprocess.PIPE,
        text=True,
        timeout=timeout_s,
        start_new_session=True,
        env={**os.environ, **_ANY_PORTS},
    ).stdout


@contextmanager
def _nodes(hub_url: str) -> Iterator[tuple[list[str], Path]]:
    """Run three nodes; yield the URLs of their gateways, and the home of the first."""
    root = Path(tempfile.mkdtemp(prefix="shoal-demo-"))
    homes = [root / node for node in NODES]

    def up(home: Path, *more: str) -> None:
        common = ("--home", home, "--node", home.name, "--port", "0", "--hub", hub_url)
        _shoal("up", "--detach", *common, *more, timeout_s=_UP_TIMEOUT_S)

    def join_and_up(home: Path) -> None:
        invitation = json.loads(_shoal("invite", "--json", "--home", homes[0], timeout_s=_JOIN_TIMEOUT_S))
        code, address = invitation["code"], invitation["address"]
        arguments = ("--code-file", "-", "--home", home, "--node", home.name)
        _shoal("join", address, *arguments, timeout_s=_JOIN_TIMEOUT_S, stdin=code)
        up(home)

    try:
        print(f"starting {len(NODES)} nodes, each with its own storage and services", flush=True)
        up(homes[0], "--nats-port", "0")
        with ThreadPoolExecutor() as starting:
            list(starting.map(join_and_up, homes[1:]))
        yield [(home / "run" / "gateway.url").read_text().strip() for home in homes], homes[0]
    finally:
        # Stop the first node last: the others shut down over its NATS.
        for home in reversed(homes):
            if (home / "run" / "supervisor.pid").exists():
                _shoal("down", "--home", home, timeout_s=_DOWN_TIMEOUT_S)
        shutil.rmtree(root, ignore_errors=True)


def _show(hub_url: str, gateways: list[str], key_file: Path, hub_bytes: Any) -> dict[str, Any]:
    started_s, key = time.monotonic(), key_file.read_text().strip()
    with httpx2.Client(
        trust_env=False, timeout=_HTTP_TIMEOUT_S, headers={"Authorization": f"Bearer {key}"}
    ) as client:

        def call(method: str, path: str, body: dict[str, Any] | None = None) -> Any:
            return client.request(method, gateways[0] + path, json=body).raise_for_status().json()

        print(f"\n{NODES[0]} downloads {DEMO_MODEL} from the hub at {hub_url}")
        first = call("POST", "/v1/downloads", {"model": DEMO_MODEL, "nodes": [NODES[0]], "wait": True})
        _print_sources(first)
        print("the other nodes download it too")
        others = call("POST", "/v1/downloads", {"model": DEMO_MODEL, "nodes": list(NODES[1:]), "wait": True})
        _print_sources(others)
        downloads = first["downloads"] + others["downloads"]
        model_bytes = int(downloads[0]["total_bytes"])
        peer_bytes = sum(n for d in downloads for source, n in d["sources"].items() if source != "hub")
        sent = int(hub_bytes())
        print(f"the hub sent {sent / _KIB:,.0f} KiB for a model of {model_bytes / _KIB:,.0f} KiB")

        print(f"\nrunning it on {STAGES} nodes")
        placed = call("POST", "/v1/instances", {"model": DEMO_MODEL, "min_nodes": STAGES, "max_nodes": STAGES})
        instance = next(i for i in call("GET", "/v1/status")["instances"] if i["id"] == placed["id"])
        for stage in instance["stages"]:
            print(f"  {stage['node']}  layers {stage['first_layer']}-{stage['last_layer'] - 1}")

        print(f"\n> {DEMO_PROMPT}")
        answer = _chat(client, gateways[0], instance["id"])
        print()
    return {
        "hub_bytes": sent,
        "model_bytes": model_bytes,
        "peer_bytes": peer_bytes,
        "nodes": len(NODES),
        "stages": len(instance["stages"]),
        "answer": answer,
        "seconds": round(time.monotonic() - started_s, 2),
    }


def _print_sources(result: dict[str, Any]) -> None:
    for d in result["downloads"]:
        sources = ", ".join(f"{n / _KIB:,.0f} KiB from {source}" for source, n in sorted(d["sources"].items()))
        print(f"  {d['node']}  {d['phase']}  {sources}")


def _chat(client: httpx2.Client, gateway: str, instance: str) -> str:
    """Ask the demo's question, print the answer as it arrives, and return it."""
    body = {
        "model": instance,
        "messages": [{"role": "user", "content": DEMO_PROMPT}],
        "temperature": 0,
        "stream": True,
    }
    answer = ""
    with client.stream("POST", f"{gateway}/v1/chat/completions", json=body) as response:
        if response.status_code != httpx2.codes.OK:
            response.read()
            response.raise_for_status()
        for line in response.iter_lines():
            data = line.removeprefix("data: ")
            if not line.startswith("data: ") or data == "[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                raise SystemExit(f"shoal demo: {event['error']['message']}")
            for choice in event["choices"]:
                text = choice["delta"].get("content") or ""
                answer += text
                print(text, end="", flush=True)
    print()
    return answer
