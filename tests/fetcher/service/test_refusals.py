"""What cannot be done ends in one clear line with the right code, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import json

import pytest

from shoal_common.bus.keys import download_key
from shoal_common.messages.downloads import StopDownloads
from shoal_common.messages.envelope import Empty
from shoal_common.rpc.request_reply import RpcClient
from shoal_common.store.bitmap import LEAF_BYTES
from shoal_demo.faults import Faults, UnavailableFault
from tests.fetcher.hub_repos import noise
from tests.fetcher.pull_site import Site
from tests.harness.waiting import eventually


async def assert_pull_fails(site: Site, code: str, *texts: str, phase: str = "failed", model: str = "") -> None:
    """A pull on a fails with this code and these words, and leaves nothing behind."""
    async with site.join() as here:
        found, message = await here.pull_fails("a", model)
        assert found == code and all(w in message for w in texts), message
        state = await here.state_now("a", model)
        assert state is not None and state.phase == phase
        assert state.error is not None and (state.error.code, state.error.message) == (code, message)
        await here.nothing_is_left("a", model)


async def test_a_model_that_does_not_exist(site: Site) -> None:
    await assert_pull_fails(site, "not_found", site.repo, "check the name")


async def test_a_revision_that_does_not_exist(site: Site) -> None:
    site.make({"config.json": b"{}"})
    await assert_pull_fails(site, "not_found", "no revision 'v9'", model=f"{site.repo}@v9")


async def test_a_hub_that_cannot_be_reached(site: Site) -> None:
    async with site.join() as here:
        await site["a"].restart(here.here, "fetcher", HF_ENDPOINT="http://127.0.0.1:1")
    await assert_pull_fails(site, "hub_unavailable", "hub 127.0.0.1:1", "is unreachable")
    async with site.join() as here:
        await site["a"].restart(here.here, "fetcher")


async def test_a_hub_that_must_not_be_asked(site: Site) -> None:
    site.make({"config.json": b"{}"})
    async with site.join() as here:
        await site["a"].restart(here.here, "fetcher", HF_HUB_OFFLINE="1")
    await assert_pull_fails(site, "hub_unavailable", "HF_HUB_OFFLINE")
    assert site.hub.stats().requests.api == 0
    async with site.join() as here:
        await site["a"].restart(here.here, "fetcher")


async def test_I3_a_model_beyond_the_quota_is_rejected_with_figures(site: Site) -> None:
    site.make({"model.safetensors": noise(2 * LEAF_BYTES, site.repo)})
    async with site.join() as here:
        await site["a"].restart(here.here, "storage", SHOAL_MAX_STORAGE_BYTES="1000")
    await assert_pull_fails(site, "quota_exceeded", "needs 2.1 MB", "quota of 1.0 kB", phase="rejected")
    assert site.hub_bytes() == 0
    async with site.join() as here:
        await site["a"].restart(here.here, "storage")


async def test_a_disk_that_fills_up_is_reported_full_and_is_no_crash(site: Site) -> None:
    """A limit in the process replaces the disk: the same error, from the same call."""
    size = site.make(files := {"model.safetensors": noise(6 * LEAF_BYTES, site.repo)})
    async with site.join() as here:
        await site["a"].restart(here.here, "fetcher", **_limited(site, 3 * LEAF_BYTES))
        pull = await here.begin("a")
        state = await here.state("a", lambda s: s.phase == "blocked")
        assert state.error is not None and state.error.code == "disk_full" and state.done_bytes == 3 * LEAF_BYTES
        assert state.waiting_for.startswith("disk full: No space left on device")
        await site["a"].restart(here.here, "fetcher")
        state = await here.state("a", lambda s: s.phase == "ready")
        await here.assert_complete("a", files)
        assert (state.error, state.blocked_since_s) == (None, 0.0)
        # What the process received; the hub's own count includes what filled the sockets of ended attempts.
        assert state.resumed_bytes == 3 * LEAF_BYTES and size - 3 * LEAF_BYTES <= state.sources["hub"] < 2 * size
        pull.cancel()


def _limited(site: Site, file_bytes: int) -> dict[str, str]:
    """Return an environment in which the process raises ENOSPC past so many bytes of a file."""
    directory = site["a"].home / "limited"
    directory.mkdir(exist_ok=True)
    (directory / "sitecustomize.py").write_text(
        "import errno, os\n"
        "real, limit = os.pwrite, int(os.environ['TEST_FILE_BYTES'])\n"
        "def pwrite(fd, data, offset):\n"
        "    if offset + len(data) > limit:\n"
        "        raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "    return real(fd, data, offset)\n"
        "os.pwrite = pwrite\n"
    )
    usual = site["a"]["fetcher"].environment["PYTHONPATH"]
    return {"PYTHONPATH": f"{directory}:{usual}", "TEST_FILE_BYTES": str(file_bytes)}


async def test_a_down_hub_does_not_cost_what_an_earlier_try_brought(site: Site) -> None:
    size = site.make(files := {"model.safetensors": noise(6 * LEAF_BYTES, site.repo)})
    async with site.join() as here:
        await site["a"].restart(here.here, "fetcher", **_limited(site, 4 * LEAF_BYTES))
        pull = await here.begin("a")
        await here.state("a", lambda s: s.phase == "blocked")
        site.hub.set_faults(Faults(unavailable=UnavailableFault(times=None)))
        await site["a"].restart(here.here, "fetcher")
        failed = await here.state("a", lambda s: s.phase == "failed")
        assert failed.error is not None and failed.error.code == "hub_unavailable"
        pull.cancel()
        site.hub.set_faults(Faults())
        site.hub.reset_stats()
        state = await here.pull_ok("a")
        await here.assert_complete("a", files)
        assert state.resumed_bytes == 4 * LEAF_BYTES and site.hub_bytes() == size - 4 * LEAF_BYTES


async def test_I5_cancel_in_the_middle_leaves_no_files_and_repeats(site: Site) -> None:
    site.make(
        files := {"model.safetensors": noise(8 * LEAF_BYTES, site.repo), "config.json": site.repo.encode()},
    )
    site.hub.set_faults(Faults(bytes_per_s=4 * LEAF_BYTES))
    async with site.join() as here:
        pull = await here.begin("a")
        await here.durable("a", LEAF_BYTES)
        assert (await here.cancel("a")).result["cancelled"] is True
        outcome = await pull
        assert outcome.error is not None and outcome.error.code == "cancelled"
        await here.nothing_is_left("a")
        assert await here.state_now("a") is None
        await here.no_lease_is_left()
        assert (await here.cancel("a")).result["cancelled"] is False
        site.hub.set_faults(Faults())
        await here.pull_ok("a")
        await here.assert_complete("a", files)
        assert (await here.cancel("a")).result["cancelled"] is False
        assert await here.state_now("a") is not None


@pytest.mark.parametrize("by_commit", [False, True])
async def test_I5_delete_in_the_middle_stops_the_download(site: Site, by_commit: bool) -> None:
    site.make({"model.safetensors": noise(8 * LEAF_BYTES, site.repo), "config.json": site.repo.encode()})
    site.hub.set_faults(Faults(bytes_per_s=4 * LEAF_BYTES))
    async with site.join() as here:
        pull = await here.begin("a")
        state = await here.durable("a", LEAF_BYTES)
        deleted = await here.delete("a", f"{site.repo}@{state.commit}" if by_commit else "")
        assert deleted.ok, deleted.error
        outcome = await pull
        assert outcome.error is not None and outcome.error.code == "cancelled"
        await here.nothing_is_left("a")
        assert await here.state_now("a") is None


async def test_cancelling_one_of_two_downloads_does_not_harm_the_other(
    site: Site,
) -> None:
    size = site.make(files := {"model.safetensors": noise(8 * LEAF_BYTES, site.repo)})
    site.hub.set_faults(Faults(bytes_per_s=2 * LEAF_BYTES))
    async with site.join() as here:
        by_branch = await here.begin("a")
        commit = (await here.state("a", lambda s: bool(s.commit))).commit
        by_commit = await here.begin("a", f"{site.repo}@{commit}")
        await here.state("a", lambda s: s.phase == "fetching", f"{site.repo}@{commit}")
        await here.durable("a", LEAF_BYTES)
        await here.cancel("a", f"{site.repo}@{commit}")
        site.hub.set_faults(Faults())
        assert not (await by_commit).ok and (await by_branch).ok
        await here.assert_complete("a", files)
        assert site.hub_bytes() == size


async def test_I6_an_interrupted_cancel_ends_at_the_next_start(site: Site) -> None:
    site.make({"model.safetensors": noise(8 * LEAF_BYTES, site.repo)})
    site.hub.set_faults(Faults(bytes_per_s=4 * LEAF_BYTES))
    async with site.join() as here:
        pull = await here.begin("a")
        await here.durable("a", LEAF_BYTES)
        site["a"]["storage"].kill()
        cancelled = asyncio.create_task(here.cancel("a"))

        async def request_is_gone() -> bool:
            return await here.buckets.spec.get(download_key("a", site.repo)) is None

        await eventually(request_is_gone, "the request is withdrawn")
        site["a"]["fetcher"].kill()
        site["a"].start("storage", "fetcher")
        await site["a"].ready(here.here)

        async def all_gone() -> bool:
            return await here.state_now("a") is None

        await eventually(all_gone, "the withdrawal is finished")
        await here.nothing_is_left("a")
        for task in (pull, cancelled):
            task.cancel()


async def test_cancelling_what_was_never_requested_is_answered(site: Site) -> None:
    async with site.join() as here:
        question = StopDownloads(repo=site.repo)
        assert await RpcClient(here.here.nats)("fetcher", "a", "stop_downloads", question, Empty) == Empty()


async def test_what_cannot_run_here_is_fetched_only_when_insisted_on(site: Site) -> None:
    site.make(files := {"model-Q4_K_M.gguf": noise(300_000, site.repo), "README.md": b"# GGUF"})
    async with site.join() as here:
        code, message = await here.pull_fails("a")
        assert code == "unsupported" and "GGUF" in message and "--force" in message
        assert site.hub_bytes() == 0, "it is said before the bytes"
        forced = json.dumps({"model": site.repo, "force": True}).encode()
        outcome = await here.ask("a", "download", forced)
        assert outcome.ok, outcome.error
        await here.assert_complete("a", files)
        await here.pull_ok("a")  # it is here
        code, _ = await here.pull_fails("b")
        assert code == "unsupported"


async def test_an_unusable_environment_is_named_when_the_hub_is_asked(site: Site) -> None:
    site.make({"config.json": b"{}"})
    async with site.join() as here:
        await site["a"].restart(here.here, "fetcher", SSL_CERT_FILE="/gone/ca.pem", HTTPS_PROXY="http://proxy:http")
        code, message = await here.pull_fails("a")
        assert code == "refused" and "HTTPS_PROXY=http://proxy:http" in message
        await here.pull_ok("b")
        await here.pull_ok("a")  # from b: the hub is not needed
        await site["a"].restart(here.here, "fetcher")
