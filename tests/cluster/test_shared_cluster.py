"""The nodes that tests share are put back after a test that failed while it had killed or paused something."""

from __future__ import annotations

import os
import signal

from tests.harness.process import is_paused
from tests.harness.shoal import ShoalCluster, eventually, restore_clusters


def test_a_cluster_left_broken_by_a_test_serves_the_next(cluster: ShoalCluster) -> None:
    storage = cluster["a"].child("storage").pid
    os.kill(storage, signal.SIGSTOP)
    eventually(lambda: is_paused(storage), "the signal has arrived")
    cluster["b"].kill("fetcher")
    cluster["c"].down()
    restore_clusters()
    for node in cluster.nodes:
        assert {c.phase for c in node.children().values()} == {"ready"}
        assert node.call("GET", "/v1/status")
