"""A hub that is rate-limiting, broken, slow, odd or lying: the model arrives intact, or one line says why not."""

from __future__ import annotations

import hashlib

import pytest

from shoal_common.store.bitmap import LEAF_BYTES
from shoal_demo.faults import DropAtByte, Faults, RateLimit, UnavailableFault, WrongBytes
from tests.fetcher.hub_repos import noise
from tests.fetcher.pull_site import Site, blobs

BIG = 4 * LEAF_BYTES + 99


@pytest.fixture
def files(site: Site) -> dict[str, bytes]:
    """A model with one large and one small file, on the hub."""
    made = {"model.safetensors": noise(BIG, site.repo), "config.json": noise(300, site.repo + "c")}
    site.make(made)
    return made


@pytest.mark.parametrize("kinds", [("api",), ("get",)])
async def test_a_rate_limit_is_published_waited_for_and_survived(
    site: Site, files: dict[str, bytes], kinds: tuple[str, ...]
) -> None:
    site.hub.set_faults(Faults(rate_limit=RateLimit(times=2, retry_after_s=1, kinds=kinds)))  # type: ignore[arg-type]  # literals
    async with site.join() as here:
        pull = await here.begin("a")
        published = await here.state("a", lambda s: "429" in s.waiting_for)
        assert "hub 127.0.0.1" in published.waiting_for
        assert "limits our requests: retry in 1 s (HTTP 429)" in published.waiting_for
        assert (await pull).ok
        await here.assert_complete("a", files)
        state = await here.state_now("a")
        assert state is not None and state.waiting_for == "" and state.speed_bytes_per_s == 0
        assert site.hub_bytes() == BIG + 300


async def test_a_few_faults_of_the_hub_are_ridden_out(site: Site, files: dict[str, bytes]) -> None:
    site.hub.set_faults(Faults(unavailable=UnavailableFault(times=3)))
    async with site.join() as here:
        await here.pull_ok("a")
        await here.assert_complete("a", files)


async def test_a_connection_that_drops_costs_no_leaf_that_was_durable(site: Site, files: dict[str, bytes]) -> None:
    drop = DropAtByte(after_bytes=3 * LEAF_BYTES - 1000, times=1, glob="*.safetensors")
    site.hub.set_faults(Faults(drop_at_byte=drop))
    async with site.join() as here:
        state = await here.pull_ok("a")
        await here.assert_complete("a", files)
        name = f"{site.repo}/model.safetensors"
        assert site.hub.stats().files[name].ranges == [
            f"bytes=0-{BIG - 1}",
            f"bytes={2 * LEAF_BYTES}-{BIG - 1}",
        ]
        assert state.resumed_bytes == 0  # all of it is of this attempt


async def test_a_connection_that_keeps_dropping_progresses_by_leaves(site: Site, files: dict[str, bytes]) -> None:
    drop = DropAtByte(after_bytes=LEAF_BYTES + 70_000, times=None, glob="*.safetensors")
    site.hub.set_faults(Faults(drop_at_byte=drop))
    async with site.join() as here:
        await here.pull_ok("a")
        await here.assert_complete("a", files)


async def test_wrong_bytes_once_cost_one_restart(site: Site, files: dict[str, bytes]) -> None:
    site.hub.set_faults(Faults(wrong_bytes=WrongBytes(glob="*.safetensors", offset=LEAF_BYTES + 1, times=1)))
    async with site.join() as here:
        state = await here.pull_ok("a")
        await here.assert_complete("a", files)
        assert site.gets("model.safetensors") == 2
        assert state.sources == {"hub": 2 * BIG + 300}


@pytest.mark.parametrize("glob", ["*.safetensors", "*/config.json"])
async def test_I1_bytes_that_are_always_wrong_end_it_with_both_hashes(
    site: Site, files: dict[str, bytes], glob: str
) -> None:
    site.hub.set_faults(Faults(wrong_bytes=WrongBytes(glob=glob)))
    async with site.join() as here:
        before = set(blobs(site["a"]))
        code, message = await here.pull_fails("a")
        assert code == "corrupt"
        wrong = files[next(p for p in files if glob.endswith(p.rpartition(".")[2]))]
        flipped = bytes([wrong[0] ^ 0xFF]) + wrong[1:]
        for content in (wrong, flipped):
            name = hashlib.sha256(content).hexdigest()
            git = "git-" + hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            assert name[:16] in message or git[:16] in message, message
        state = await here.state_now("a")
        assert state is not None and state.phase == "failed" and state.error is not None
        assert state.error.message == message and state.error.code == "corrupt"
        right = {hashlib.sha256(c).hexdigest() for c in files.values() if c is not wrong}
        assert set(blobs(site["a"])) - before <= right
        # The other file was stopped at any point.
        assert state.done_bytes <= sum(len(c) for c in files.values() if c is not wrong)
        # Intact leaves stay for the next attempt; cancelling releases them.
        assert (await here.cancel("a")).result["cancelled"] is True
        await here.nothing_is_left("a")
        assert await here.state_now("a") is None


async def test_a_hub_without_ranges_is_read_from_the_start(site: Site, files: dict[str, bytes]) -> None:
    site.hub.set_faults(Faults(no_range=True, drop_at_byte=DropAtByte(after_bytes=2 * LEAF_BYTES + 5, times=1)))
    async with site.join() as here:
        state = await here.pull_ok("a")
        await here.assert_complete("a", files)
        assert site.gets("model.safetensors") == 2
        assert state.done_bytes == state.total_bytes == BIG + 300


async def test_a_slow_hub_shows_how_it_goes_and_gets_there(site: Site, files: dict[str, bytes]) -> None:
    site.hub.set_faults(Faults(bytes_per_s=2 * LEAF_BYTES))
    async with site.join() as here:
        pull = await here.begin("a")
        state = await here.state("a", lambda s: s.speed_bytes_per_s > 0 and 0 < s.done_bytes < s.total_bytes)
        assert state.phase == "fetching" and state.total_bytes == BIG + 300
        assert state.speed_bytes_per_s < 8 * LEAF_BYTES
        assert (await pull).ok
        await here.assert_complete("a", files)


async def test_a_model_without_its_token_fails_and_leaves_no_files(site: Site, files: dict[str, bytes]) -> None:
    site.hub.set_faults(Faults(require_token="secret"))
    async with site.join() as here:
        code, message = await here.pull_fails("a")
        assert code == "denied" and "HF_TOKEN" in message
        await here.nothing_is_left("a")


async def test_a_gated_model_fails_with_its_terms_and_leaves_no_files(site: Site, files: dict[str, bytes]) -> None:
    site.hub.set_faults(Faults(gated=("org/*",)))
    async with site.join() as here:
        code, message = await here.pull_fails("a")
        assert code == "denied" and "gated" in message and "HF_TOKEN" in message
        state = await here.state_now("a")
        assert state is not None and state.phase == "failed"
        await here.nothing_is_left("a")


async def test_a_hub_that_is_down_is_retried_and_leaves_no_files(site: Site, files: dict[str, bytes]) -> None:
    site.hub.set_faults(Faults(unavailable=UnavailableFault(times=None)))
    async with site.join() as here:
        code, message = await here.pull_fails("a")
        assert code == "hub_unavailable" and "503" in message
        assert site.hub.stats().requests.api == 4
        await here.nothing_is_left("a")
