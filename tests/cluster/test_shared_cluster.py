"""The nodes that tests share are put back after a test that failed while it had killed or paused something."""

from __future__ import annotations

import os
import signal

from tests.harness.shoal import ShoalCluster, restore_clusters


def test_a_cluster_that_a_failed_test_left_broken_serves_the_next(cluster: ShoalCluster) -> None:
    os.kill(cluster["a"].child("storage").pid, signal.SIGSTOP)
    cluster["b"].kill("fetcher")
    cluster["c"].down()
    restore_clusters()
    for node in cluster.nodes:
        assert {c.phase for c in node.children().values()} == {"ready"}
        assert node.call("GET", "/v1/status")
