"""What an instance over two nodes makes them fetch: only what their own layers need.

One model in one file, its tensors in the order of their names as the hub's are; 90 MB, so that a leaf is large
against it: with larger models what is fetched beyond the need is less. Bytes are those that the hub says it has sent,
and those that each node says it has received from other nodes, repeated and discarded ones included. Leaf lists, 32
bytes a MiB, are not in them.

- `split_bytes`: bytes fetched in all, over the model's, when two nodes that have nothing of it get an instance.
- `split_larger_node`: the larger of their two shares.
- `split_used_bytes`: what their two storages say they use for it then, over the model's.
- `split_beside_holder`: bytes fetched in all when one of the two nodes has the model already.
- `completed_bytes`: all that a node has fetched, over the model's, when it pulls the whole model after its part.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from figures import figure, report  # noqa: E402  # after the path is set
from shoal_demo.running import RunningHub, running_hub  # noqa: E402
from tests.harness.shoal import ShoalCluster  # noqa: E402
from tests.inference.tiny_models import write_files, write_model  # noqa: E402

QUICK = "--quick" in sys.argv
ROUNDS = 1 if QUICK else 5
MODEL = "org/one-file"
WIDTH = 640
"""Of hidden states."""


def received_bytes(cluster: ShoalCluster, *nodes: str) -> int:
    """Bytes that nodes have received from other nodes in all their downloads of what they have now."""
    downloads = cluster["c"].call("GET", "/v1/downloads")["downloads"]
    return sum(
        size_bytes
        for d in downloads
        if d["node"] in nodes
        for source, size_bytes in d["sources"].items()
        if source != "hub"
    )


def used_bytes(cluster: ShoalCluster, *nodes: str) -> int:
    """What storages say they use or have promised."""
    rows = cluster["c"].call("GET", "/v1/storage")["nodes"]
    return sum(r["storage"]["used_bytes"] + r["storage"]["reserved_bytes"] for r in rows if r["node"] in nodes)


def placed(cluster: ShoalCluster, *nodes: str) -> str:
    """An instance with a stage on each of these nodes, ready."""
    body = {"model": MODEL, "min_nodes": 2, "max_nodes": 2, "nodes": list(nodes), "context_tokens": 256, "wait": True}
    return str(cluster["c"].call("POST", "/v1/instances", body)["id"])


def removed(cluster: ShoalCluster, instance: str, *nodes: str) -> None:
    """The instance is stopped, and these nodes have nothing of the model."""
    cluster["c"].call("DELETE", f"/v1/instances/{instance}")
    for node in nodes:
        cluster["c"].call("DELETE", f"/v1/models/{MODEL}?node={node}")


def measured(cluster: ShoalCluster, hub: RunningHub) -> dict[str, int]:
    """One round. Node c has the model; a and b have nothing, before and after."""
    hub.reset_stats()
    found = {}
    instance = placed(cluster, "a", "b")
    found["split_bytes"] = received_bytes(cluster, "a", "b") + hub.stats().bytes
    found["split_larger_node"] = max(received_bytes(cluster, node) for node in "ab")
    found["split_used_bytes"] = used_bytes(cluster, "a", "b")
    cluster["c"].call("POST", "/v1/downloads", {"model": MODEL, "nodes": ["a"], "wait": True})
    found["completed_bytes"] = received_bytes(cluster, "a") + hub.stats().bytes
    removed(cluster, instance, "a", "b")
    hub.reset_stats()
    instance = placed(cluster, "a", "c")
    found["split_beside_holder"] = received_bytes(cluster, "a") + hub.stats().bytes
    removed(cluster, instance, "a")
    return found


def main() -> None:
    """Measure and report."""
    targets = {"split_bytes": "<= 1.10", "completed_bytes": "<= 1.0"}
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        model = write_model(root / "hub" / MODEL, "llama", width=WIDTH)
        write_files(model, 1)
        model_bytes = sum(f.stat().st_size for f in model.iterdir())
        with (
            running_hub(root / "hub", process=True) as hub,
            ShoalCluster(root / "nodes", hub.base_url) as cluster,
        ):
            cluster["c"].shoal("pull", MODEL, check=True)
            rounds = [measured(cluster, hub) for _ in range(ROUNDS)]
    medians = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    report({name: figure(value / model_bytes, "x", targets.get(name, "")) for name, value in medians.items()})


if __name__ == "__main__":
    main()
