"""Many callers want one model at once: it is fetched once, and each gets its own view."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
from contextlib import ExitStack
from pathlib import Path

from shoal_common.messages.envelope import Empty
from shoal_common.messages.leases import AcquireLease, LeaseGrant, ReleaseLease
from shoal_common.rpc.request_reply import RpcClient
from shoal_common.store.bitmap import LEAF_BYTES
from tests.fetcher.hub_repos import noise
from tests.fetcher.pull_site import PULL_DEADLINE_S, Pulls, Site, blobs

CALLERS = 32


async def pull_and_lease(here: Pulls, ask: RpcClient, caller: int, held: ExitStack) -> LeaseGrant:
    """Act as one of the callers. The lease is held until `held` ends."""
    outcome = await here.pull("a")
    assert outcome.ok, outcome.error
    question = AcquireLease(model=here.site.repo, holder=f"caller {caller}")
    lease = await ask("storage", "a", "lease", question, LeaseGrant, deadline_s=PULL_DEADLINE_S)
    held.callback(os.close, fd := os.open(lease.lock, os.O_RDONLY))
    await asyncio.to_thread(fcntl.flock, fd, fcntl.LOCK_SH)
    return lease


def is_complete(view: Path, files: dict[str, bytes]) -> bool:
    found = {str(p.relative_to(view)): p.read_bytes() for p in view.rglob("*") if p.is_file()}
    return found == files


def check_views(site: Site, files: dict[str, bytes], views: list[Path], locks: list[str], size_bytes: int) -> None:
    """Each caller has the whole model, the hub was asked once, and no caller affects the others."""
    assert {path: site.gets(path) for path in files} == dict.fromkeys(files, 1), "one fetch a blob"
    assert site.hub_bytes() == size_bytes
    assert len(set(views)) == len(set(locks)) == CALLERS
    assert all(is_complete(view, files) for view in views)
    before = {name: path.read_bytes() for name, path in blobs(site["a"]).items()}
    shutil.rmtree(views[0])
    (views[1] / "config.json").unlink()
    (views[1] / "config.json").write_bytes(b"mine")
    assert all(is_complete(view, files) for view in views[2:])
    assert {name: path.read_bytes() for name, path in blobs(site["a"]).items()} == before


async def test_32_callers_cost_the_hub_one_fetch_and_each_has_a_view(site: Site) -> None:
    files = {
        "model.safetensors": noise(3 * LEAF_BYTES + 17, site.repo),
        "sub/other.safetensors": noise(LEAF_BYTES, site.repo + "2"),
        "config.json": noise(500, site.repo + "3"),
    }
    size = site.make(files)
    async with site.join() as here:
        with ExitStack() as held:
            ask = RpcClient(here.here.nats)
            leases = await asyncio.gather(*(pull_and_lease(here, ask, n, held) for n in range(CALLERS)))
            check_views(site, files, [Path(x.view) for x in leases], [x.lock for x in leases], size)
            assert not (await here.delete("a")).ok
        for lease in leases:
            await ask("storage", "a", "release_lease", ReleaseLease(id=lease.id), Empty)
        assert not any(site["a"].layout.leases.iterdir())
        await here.assert_complete("a", files)
        assert (await here.delete("a")).ok
