"""A library with part of what the hub has of a model: a pull fetches the rest, and takes the part as it is."""

from __future__ import annotations

from pathlib import Path

from shoal_common.bus.keys import model_key
from shoal_common.messages.manifest import Manifest
from shoal_common.messages.storage import ModelState
from shoal_common.settings_file import change_settings
from tests.fetcher.hub_repos import noise
from tests.fetcher.pull_site import Pulls, Site
from tests.harness.waiting import eventually
from tests.storage.library_fixtures import cached, safetensors


async def set_libraries(here: Pulls, node: str, *libraries: Path) -> None:
    paths = [str(path) for path in libraries]
    change_settings(here.site[node].home, {"storage": {"libraries": paths or None}}, lambda _: None)
    outcome = await here.ask(node, "reload", b"{}", service="storage")
    assert outcome.ok, outcome.error


async def pulled_and_deleted(here: Pulls) -> Manifest:
    """Return the hub's manifest, of no node."""
    await here.pull_ok("b")
    manifest = await here.manifest("b")
    assert (await here.delete("b")).ok
    return manifest


async def test_a_library_that_lacks_small_files_is_completed_by_a_pull(site: Site, tmp_path: Path) -> None:
    """As `hf download --include "model*" config.json` leaves a cache: no file in it names the rest."""
    part = {"config.json": noise(300, site.repo), "model.safetensors": safetensors(noise(300_000, site.repo))}
    files = {**part, "tokenizer.json": noise(5000, site.repo + "t")}
    site.make(files)
    async with site.join() as here:
        manifest = await pulled_and_deleted(here)
        cached(tmp_path / "hub", site.repo, manifest.commit, part)
        await set_libraries(here, "a", tmp_path / "hub")
        key = model_key("a", manifest.model)
        await eventually(lambda: here.buckets.state.get_as(key, ModelState), "the library's model is offered")
        site.hub.reset_stats()
        await here.pull_ok("a")
        assert {f.path for f in (await here.manifest("a")).files} == set(files)
        assert site.hub_bytes() == 5000, "what the library has is not fetched again"
        await here.pull_ok("b")
        await here.assert_complete("b", files)
        assert (await here.delete("a")).ok
        await set_libraries(here, "a")


async def test_one_weight_file_of_several_is_no_model_and_no_hindrance(site: Site, tmp_path: Path) -> None:
    part = {"model-00002-of-00002.safetensors": safetensors(noise(200_000, site.repo))}
    first = {"model-00001-of-00002.safetensors": safetensors(noise(200_000, site.repo + "1"))}
    files = {**part, **first, "config.json": noise(300, site.repo)}
    site.make(files)
    async with site.join() as here:
        manifest = await pulled_and_deleted(here)
        cached(tmp_path / "hub", site.repo, manifest.commit, part)
        await set_libraries(here, "a", tmp_path / "hub")
        for node in ("b", "a"):
            await here.pull_ok(node)
            await here.assert_complete(node, files)
        await set_libraries(here, "a")
