"""Many users request the same thing at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from shoal_demo import DEMO_MODEL, MODELS_DIR
from shoal_demo.hub_server import RunningHub
from tests.harness.shoal import ShoalCluster

_ASKERS = 32


def test_32_simultaneous_pulls_share_one_fetch_of_each_blob(tmp_path: Path, quiet_hub: RunningHub) -> None:
    with ShoalCluster(tmp_path, quiet_hub.base_url, names=("a",)) as cluster:
        node = cluster["a"]

        def pull(_: int) -> dict[str, Any]:
            answer = node.call("POST", "/v1/downloads", {"model": DEMO_MODEL, "wait": True})
            return dict(answer["downloads"][0])

        with ThreadPoolExecutor(_ASKERS) as askers:
            ended = list(askers.map(pull, range(_ASKERS)))
        assert {d["phase"] for d in ended} == {"ready"}
        source = MODELS_DIR / DEMO_MODEL
        files = quiet_hub.stats().files
        for file in (p for p in source.rglob("*") if p.is_file()):
            assert files[f"{DEMO_MODEL}/{file.relative_to(source)}"].bytes == file.stat().st_size
        [view] = (node.home / "store" / "views").glob("*/*")
        assert {p.name for p in view.iterdir()} == {p.name for p in source.iterdir()}
