"""What a command, a pull and an answer cost compared with the plainest way of doing the same.

- `command_over_request`: a command with its outcome (work queue, idempotence, stored outcome) over a bare NATS
  request to the same process; medians.
- `pull_beyond_reading_s`: seconds that pulling the demo's model takes longer than a process that only reads it.
- `answer_2_stages_over_1`: tokens per second of the demo's model in two stages (two nodes, HTTP API) over one.
- `first_token_ms_…`: from a streamed request to the first piece of its answer.

NATS is inside TLS always; with `--tls` the weights and the ring between the stages are too.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

import httpx2  # noqa: E402  # after the path is set

from figures import Figure, figure, interleaved, report  # noqa: E402
from membership import TLS  # noqa: E402
from shoal_demo import DEMO_MODEL, MODELS_DIR  # noqa: E402
from shoal_demo.hub_server import RunningHub, running_hub  # noqa: E402
from tests.harness.shoal import ShoalCluster, ShoalNode  # noqa: E402

QUICK = "--quick" in sys.argv
ROUNDS = 3 if QUICK else 9
CALLS = 50 if QUICK else 300


async def command_latencies(node: ShoalNode) -> tuple[float, float]:
    """Return the median seconds of a command with its outcome, and of a bare RPC to a service."""
    command, request = "shoal.v1.cmd.fetcher.a.cancel", "shoal.v1.svc.storage.a.manifest"
    body = json.dumps({"model": "nobody/nothing"}).encode()
    samples: dict[str, list[float]] = {command: [], request: []}
    async with node.operator() as nats:
        for _ in range(CALLS):
            for subject, durations_s in samples.items():
                started_s = time.perf_counter()
                await nats.client.request(subject, body, timeout=10)
                durations_s.append(time.perf_counter() - started_s)
    return statistics.median(samples[command]), statistics.median(samples[request])


def pull_s(cluster: ShoalCluster) -> float:
    """Return the seconds from requesting the model on node a until it is ready there."""
    node = cluster["a"]
    node.call("DELETE", f"/v1/models/{DEMO_MODEL}")
    started_s = time.perf_counter()
    node.call("POST", "/v1/downloads", {"model": DEMO_MODEL, "nodes": ["a"], "wait": True})
    return time.perf_counter() - started_s


def read_s(hub: RunningHub) -> float:
    """Return the seconds to read the same files from the hub, one after the other, keeping nothing."""
    started_s = time.perf_counter()
    with httpx2.Client(follow_redirects=True) as client:
        for path in sorted((MODELS_DIR / DEMO_MODEL).iterdir()):
            client.get(f"{hub.base_url}/{DEMO_MODEL}/resolve/main/{path.name}").raise_for_status()
    return time.perf_counter() - started_s


def tokens_per_s(cluster: ShoalCluster, instance: str) -> float:
    """Return the tokens per second of one greedy answer, including the time for its prompt."""
    body = {
        "model": instance,
        "messages": [{"role": "user", "content": "Why do fish swim together?"}],
        "temperature": 0,
    }
    started_s = time.perf_counter()
    answer = cluster["a"].call("POST", "/v1/chat/completions", body)
    return float(answer["usage"]["completion_tokens"]) / (time.perf_counter() - started_s)


def first_token_ms(cluster: ShoalCluster, instance: str) -> float:
    """Return the milliseconds from a streamed request to the first piece of its answer."""
    node = cluster["a"]
    body = {
        "model": instance,
        "messages": [{"role": "user", "content": "Why do fish swim together?"}],
        "temperature": 0,
        "max_tokens": 4,
        "stream": True,
    }
    started_s, first_s = time.perf_counter(), 0.0
    with node.client.stream("POST", f"{node.url}/v1/chat/completions", json=body) as answer:
        for line in answer.iter_lines():
            if not first_s and '"content":"' in line and '"content":""' not in line:
                first_s = time.perf_counter() - started_s
    return 1000 * first_s


def made_cluster(directory: Path, hub: str) -> ShoalCluster:
    """Return two nodes, not started yet."""
    cluster = ShoalCluster(directory, hub, names=("a", "b"), **({"SHOAL_BIND": "0.0.0.0"} if TLS else {}))
    for node in cluster.nodes if TLS else ():
        # The gateway stays as it is: what differs is the path between the nodes.
        node.home.mkdir()
        (node.home / "node.toml").write_text('[gateway]\ntls = "off"\n')
    return cluster


def main() -> None:
    """Measure and report."""
    figures: dict[str, Figure] = {}
    with (
        tempfile.TemporaryDirectory() as directory,
        running_hub(MODELS_DIR, process=True) as hub,
        made_cluster(Path(directory), hub.base_url) as cluster,
    ):
        command_s, request_s = asyncio.run(command_latencies(cluster["a"]))
        figures["command_over_request"] = figure(command_s / request_s, "x")
        figures["command_ms"] = figure(command_s * 1000, "ms")
        pulls = interleaved({"pull": partial(pull_s, cluster), "read": partial(read_s, hub)}, ROUNDS)
        figures["pull_beyond_reading_s"] = figure(pulls["pull"] - pulls["read"], "s")
        cluster["b"].shoal("pull", DEMO_MODEL, "--all", check=True)
        placed = {}
        for stages in (1, 2):
            body = {"model": DEMO_MODEL, "min_nodes": stages, "max_nodes": stages}
            placed[stages] = str(cluster["a"].call("POST", "/v1/instances", body)["id"])
        rates = interleaved(
            {str(n): partial(tokens_per_s, cluster, instance) for n, instance in placed.items()},
            ROUNDS,
        )
        figures["answer_2_stages_over_1"] = figure(rates["2"] / rates["1"], "x")
        first = interleaved(
            {str(n): partial(first_token_ms, cluster, instance) for n, instance in placed.items()},
            ROUNDS * 3,
        )
        figures["first_token_ms_1_stage"] = figure(first["1"], "ms")
        figures["first_token_ms_2_stages"] = figure(first["2"], "ms")
        figures["answer_1_stage_tokens_per_s"] = figure(rates["1"], "tokens/s")
    report(figures)


if __name__ == "__main__":
    main()
