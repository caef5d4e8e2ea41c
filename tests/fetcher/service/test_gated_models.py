"""Gated and private models: pulled with the token of whoever pulls, on their node, and from there by the others."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from shoal_common.hub_token import SOCKET_NAME, GivenToken, give_token
from shoal_common.messages.envelope import Outcome
from shoal_common.store.bitmap import LEAF_BYTES
from shoal_demo.faults import Faults
from tests.fetcher.hub_repos import noise
from tests.fetcher.pull_site import Pulls, Site

TOKEN = "hf_of_the_person_who_pulls"


@pytest.fixture
def files(site: Site) -> dict[str, bytes]:
    """A model with large and small files, of a hub that has one token for all gated and private models."""
    made = {f"model-{i}.safetensors": noise(3 * LEAF_BYTES + i, f"{site.repo}{i}") for i in range(3)}
    made |= {"config.json": site.repo.encode(), "tokenizer.json": noise(5_000, site.repo)}
    site.make(made)
    site.hub.set_faults(Faults(gated=("org/*",), gated_token=TOKEN))
    return made


async def give(site: Site, node: str, token: str = TOKEN, model: str = "") -> None:
    """Hand a token to a node's fetcher, as `shoal pull` does there."""
    given = GivenToken(model or site.repo, token, site.hub.base_url)
    await asyncio.to_thread(give_token, site[node].home / "run", given)


async def both(site: Site, here: Pulls) -> list[Outcome]:
    """Pull on a with the token, and on b without one, at the same time."""
    await give(site, "a")
    pulls = [await here.begin("a"), await here.begin("b")]
    return [await pull for pull in pulls]


async def test_the_token_of_who_pulls_gets_a_gated_model(site: Site, files: dict[str, bytes]) -> None:
    async with site.join() as here:
        assert (await here.pull_fails("a"))[0] == "denied"
        await give(site, "a")
        await here.pull_ok("a")
        await here.assert_complete("a", files)
        state = await here.pull_ok("b")
        await here.assert_complete("b", files)
        assert set(state.sources) == {"a"}, "a node without a token reads from the one that has it"


async def test_a_token_is_of_its_model_and_ends_with_the_download(site: Site, files: dict[str, bytes]) -> None:
    other = f"{site.repo}-other"
    site.make(files, other)
    async with site.join() as here:
        await give(site, "a")
        assert (await here.pull_fails("a", other))[0] == "denied"
        site.hub.set_faults(Faults(gated=("org/*",), gated_token=TOKEN, bytes_per_s=LEAF_BYTES))
        pull = await here.begin("a")
        await here.durable("a")
        await here.cancel("a")
        assert not (await pull).ok
        code, message = await here.pull_fails("a")
        assert code == "denied" and "pull it with your token" in message


async def test_nodes_without_a_token_leave_the_hub_to_one_with(site: Site, files: dict[str, bytes]) -> None:
    async with site.join() as here:
        outcomes = await both(site, here)
        assert [o.error for o in outcomes] == [None, None]
        for node in ("a", "b"):
            await here.assert_complete(node, files)
        state = await here.state_now("b")
        assert state is not None and "hub" not in state.sources
        await here.no_lease_is_left()
    assert site.hub.stats().answers.get(403, 0) <= 8, "each of b's first blobs asks at most once"


async def test_a_private_model_is_waited_for_until_it_is_there(site: Site, files: dict[str, bytes]) -> None:
    site.hub.set_faults(Faults(private=("org/*",), gated_token=TOKEN, bytes_per_s=8 * LEAF_BYTES))
    async with site.join() as here:
        assert [o.error for o in await both(site, here)] == [None, None]
        await here.assert_complete("b", files)


async def test_two_nodes_without_a_token_do_not_wait_for_each_other(site: Site, files: dict[str, bytes]) -> None:
    async with site.join() as here:
        pulls = [asyncio.create_task(here.pull(node)) for node in ("a", "b")]
        for pull in pulls:
            error = (await pull).error
            assert error is not None and error.code == "denied" and "pull it with your token" in error.message
        for node in ("a", "b"):
            await here.cancel(node)


async def test_a_download_ends_when_the_node_with_the_token_does(site: Site, files: dict[str, bytes]) -> None:
    site.hub.set_faults(Faults(gated=("org/*",), gated_token=TOKEN, bytes_per_s=LEAF_BYTES // 2))
    async with site.join() as here:
        await give(site, "a")
        pull = await here.begin("a")
        await here.durable("a")
        waiting = await here.begin("b")
        await here.state("b", lambda s: s.phase == "fetching")
        await here.cancel("a")
        error = (await waiting).error
        assert error is not None and error.code == "denied"
        await pull
        await here.cancel("b")


async def test_a_killed_fetcher_forgets_the_token_and_says_so(site: Site, files: dict[str, bytes]) -> None:
    site.hub.set_faults(Faults(gated=("org/*",), gated_token=TOKEN, bytes_per_s=2 * LEAF_BYTES))
    async with site.join() as here:
        await give(site, "a")
        pull = await here.begin("a")
        arrived = (await here.durable("a")).done_bytes
        await site["a"].restart(here.here, "fetcher")
        failed = await here.state("a", lambda s: s.phase == "failed")
        assert failed.error is not None and failed.error.code == "denied"
        assert "pull it with your token" in failed.error.message and failed.done_bytes >= arrived
        pull.cancel()
        site.hub.set_faults(Faults(gated=("org/*",), gated_token=TOKEN))
        await give(site, "a")
        state = await here.pull_ok("a")
        await here.assert_complete("a", files)
        assert state.resumed_bytes >= arrived


async def test_I12_a_token_is_found_nowhere_but_at_the_hub(site: Site, files: dict[str, bytes]) -> None:
    wrong = "hf_marked_wrong_token"
    async with site.join() as here:
        await give(site, "a", wrong)
        code, message = await here.pull_fails("a")
        assert code == "denied" and "pull it with your token" in message and wrong not in message
        await give(site, "a")
        await here.pull_ok("a")
        socket = site["a"].home / "run" / SOCKET_NAME
        assert stat.S_IMODE(socket.stat().st_mode) == 0o600
        pids = [site.server.pid, *(s.pid for node in site.nodes.values() for s in node.services.values())]
        processes = [psutil.Process(pid) for pid in pids]
        assert not [p for p in processes for text in (p.cmdline(), p.environ()) if _holds_token(repr(text).encode())]
    tops = [site.server.directory, *(node.home for node in site.nodes.values())]
    searched = [content for top in tops for content in _under(top)]
    assert any(site.repo.encode() in content for content in searched)
    assert not any(map(_holds_token, searched))


def _holds_token(content: bytes) -> bool:
    return TOKEN.encode() in content or b"hf_marked_wrong_token" in content


def _under(top: Path) -> Iterator[bytes]:
    """Yield the content of each file."""
    for path in top.rglob("*"):
        if path.is_file():
            with suppress(FileNotFoundError):  # a temporary one
                yield path.read_bytes()
