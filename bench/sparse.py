"""How little an instance over two nodes makes them fetch: only what their own layers need.

One model in one file, its tensors in the order of their names, as on the hub; 90 MB, so that a leaf is large in
comparison: larger models fetch less beyond their need. Bytes are those that the hub has sent, and those that each
node has received from other nodes, including repeated and discarded ones. Leaf lists, 32 bytes per MiB, are not
included.

- `split_bytes`: bytes fetched in all, over the model's, when two nodes without any of it get an instance.
- `split_larger_node`: the larger of their two shares.
- `split_used_bytes`: bytes that their two storages use for it then, over the model's.
- `split_beside_holder`: bytes fetched in all when one of the two nodes already has the model.
- `completed_bytes`: everything a node has fetched, over the model's, when it pulls the whole model after its shard.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from figures import figure, report  # noqa: E402  # after the path is set
from shoal_demo.hub_server import RunningHub, running_hub  # noqa: E402
from tests.harness.shoal import ShoalCluster  # noqa: E402
from tests.inference.tiny_models import write_files, write_model  # noqa: E402

QUICK = "--quick" in sys.argv
ROUNDS = 1 if QUICK else 5
MODEL = "org/one-file"
WIDTH = 640
"""Of hidden states."""


def received_bytes(cluster: ShoalCluster, *nodes: str) -> int:
    """Return the bytes that nodes have received from other nodes in all downloads of their current models."""
    downloads = cluster["c"].call("GET", "/v1/downloads")["downloads"]
    return sum(
        size_bytes
        for d in downloads
        if d["node"] in nodes
        for source, size_bytes in d["sources"].items()
        if source != "hub"
    )


def used_bytes(cluster: ShoalCluster, *nodes: str) -> int:
    """Return the bytes that storages use or have reserved."""
    rows = cluster["c"].call("GET", "/v1/storage")["nodes"]
    return sum(r["storage"]["used_bytes"] + r["storage"]["reserved_bytes"] for r in rows if r["node"] in nodes)


def placed(cluster: ShoalCluster, *nodes: str) -> str:
    """Return an instance with a stage on each of these nodes, once it is ready."""
    body = {"model": MODEL, "min_nodes": 2, "max_nodes": 2, "nodes": list(nodes), "context_tokens": 256, "wait": True}
    return str(cluster["c"].call("POST", "/v1/instances", body)["id"])


def removed(cluster: ShoalCluster, instance: str, *nodes: str) -> None:
    """Stop the instance and delete the model from these nodes."""
    cluster["c"].call("DELETE", f"/v1/instances/{instance}")
    for node in nodes:
        cluster["c"].call("DELETE", f"/v1/models/{MODEL}?node={node}")


def measured(cluster: ShoalCluster, hub: RunningHub) -> dict[str, int]:
    """Run one round. Node c has the model; a and b have nothing, before and after."""
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
