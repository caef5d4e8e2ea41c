"""The hub's transfers: heads, ranges, faults, stats."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import time
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
)
from huggingface_hub.utils._http import http_backoff, parse_ratelimit_headers

from shoal_demo.app import DemoHub, HubConfig
from shoal_demo.faults import DropAtByte, Faults, RateLimit, UnavailableFault, WrongBytes
from shoal_demo.hub_server import RunningHub, running_hub
from shoal_demo.stats import RequestCounts
from tests.hub.hub_fixtures import FILES, LARGE, MODEL, git_oid, resolve

# Heads and ranges


def test_heads_carry_what_clients_plan_with_and_no_bytes(hub: RunningHub, web: httpx2.Client, api: HfApi) -> None:
    commit = api.model_info(MODEL).sha
    small = web.head(resolve("config.json"))
    content = FILES["config.json"]
    assert small.headers["ETag"] == f'"{git_oid(content)}"'
    assert small.headers["Content-Length"] == str(len(content))
    assert small.headers["X-Repo-Commit"] == commit
    large = web.head(resolve("weights.bin"), follow_redirects=False)
    sha256 = hashlib.sha256(LARGE).hexdigest()
    assert large.status_code == 302
    assert large.headers["Location"].startswith(f"/_lfs/{sha256}")
    assert large.headers["X-Linked-Etag"] == f'"{sha256}"'
    assert large.headers["X-Linked-Size"] == str(len(LARGE))
    assert large.headers["X-Repo-Commit"] == commit
    behind = web.head(large.headers["Location"])
    assert (behind.headers["ETag"], behind.headers["Content-Length"]) == (f'"{sha256}"', str(len(LARGE)))
    assert hub.stats().bytes == 0
    assert hub.stats().requests == RequestCounts(api=1, head=3, get=0)


@pytest.mark.parametrize("path", ["weights.bin", "README.md"])
@pytest.mark.parametrize(
    ("header", "span"),
    [
        ("bytes=0-0", slice(0, 1)),
        ("bytes=2-5", slice(2, 6)),
        ("bytes=3-", slice(3, None)),
        ("bytes=-4", slice(-4, None)),
        ("bytes=1-999999999", slice(1, None)),
        ("bytes=-999999999", slice(0, None)),
    ],
)
def test_range_answers_206_with_exactly_those_bytes(web: httpx2.Client, path: str, header: str, span: slice) -> None:
    content = FILES[path]
    answer = web.get(resolve(path), headers={"Range": header})
    first, end, _ = span.indices(len(content))
    assert answer.status_code == 206
    assert answer.content == content[span]
    assert answer.headers["Content-Range"] == f"bytes {first}-{end - 1}/{len(content)}"
    assert answer.headers["Accept-Ranges"] == "bytes"


@pytest.mark.parametrize("header", [f"bytes={len(LARGE)}-", f"bytes={len(LARGE) + 5}-{len(LARGE) + 9}", "bytes=-0"])
def test_range_beyond_the_file_answers_416_with_its_size(hub: RunningHub, web: httpx2.Client, header: str) -> None:
    answer = web.get(resolve("weights.bin"), headers={"Range": header})
    assert answer.status_code == 416
    assert answer.headers["Content-Range"] == f"bytes */{len(LARGE)}"
    assert hub.stats().bytes == 0


@pytest.mark.parametrize("header", ["bytes=0-1,4-5", "bytes=5-2", "bytes=-", "lines=1-2", "bytes=x-y"])
def test_range_that_makes_no_single_span_is_ignored(web: httpx2.Client, header: str) -> None:
    answer = web.get(resolve("config.json"), headers={"Range": header})
    assert (answer.status_code, answer.content) == (200, FILES["config.json"])


def test_range_of_a_changed_file_answers_with_the_full_file(web: httpx2.Client) -> None:
    same = {"Range": "bytes=2-3", "If-Range": f'"{git_oid(FILES["config.json"])}"'}
    assert web.get(resolve("config.json"), headers=same).status_code == 206
    other = {"Range": "bytes=2-3", "If-Range": '"something else"'}
    assert web.get(resolve("config.json"), headers=other).status_code == 200


# Faults


def test_rate_limit_answers_429_with_the_reset_time_and_stops(hub: RunningHub, api: HfApi) -> None:
    hub.set_faults(Faults(rate_limit=RateLimit(times=2, retry_after_s=7, kinds=("api",))))
    for _ in range(2):
        with pytest.raises(HfHubHTTPError, match="Retry after 7 seconds") as limited:
            api.model_info(MODEL)
        headers = limited.value.response.headers
        assert headers["Retry-After"] == "7"
        parsed = parse_ratelimit_headers(headers)
        assert parsed is not None and (parsed.remaining, parsed.reset_in_seconds) == (0, 7)
    assert api.model_info(MODEL).id == MODEL
    assert hub.faults() == Faults()
    assert hub.stats().answers == {429: 2, 200: 1}


def test_client_that_backs_off_gets_past_a_rate_limit(hub: RunningHub) -> None:
    hub.set_faults(Faults(rate_limit=RateLimit(times=1, retry_after_s=0)))
    assert http_backoff("GET", hub.base_url + resolve("config.json")).status_code == 200


def test_unavailable_answers_503_as_often_as_configured(hub: RunningHub, web: httpx2.Client) -> None:
    hub.set_faults(Faults(unavailable=UnavailableFault(times=2, kinds=("get",))))
    assert web.head(resolve("config.json")).status_code == 200
    assert [web.get(resolve("config.json")).status_code for _ in range(3)] == [503, 503, 200]


def test_drop_at_byte_closes_after_exactly_that_byte(hub: RunningHub, web: httpx2.Client) -> None:
    hub.set_faults(Faults(drop_at_byte=DropAtByte(after_bytes=1_500_000, times=1)))
    got = bytearray()
    with pytest.raises(httpx2.RemoteProtocolError), web.stream("GET", resolve("weights.bin")) as answer:
        for chunk in answer.iter_raw():
            got += chunk
    assert got == LARGE[:1_500_000]
    assert hub.stats().files[f"{MODEL}/weights.bin"].bytes == 1_500_000
    assert web.get(resolve("weights.bin")).content == LARGE


def test_client_resumes_a_dropped_download_with_a_range(
    hub: RunningHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The client keeps only whole chunks, 10 MB by default: with those it would restart this file.
    chunk_bytes = 1 << 16
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", chunk_bytes)
    kept_bytes = 2_000_000 // chunk_bytes * chunk_bytes
    hub.set_faults(Faults(drop_at_byte=DropAtByte(after_bytes=2_000_000, times=1, glob="*/weights.bin")))
    got = hf_hub_download(MODEL, "weights.bin", endpoint=hub.base_url, cache_dir=tmp_path, token=False)
    assert Path(got).read_bytes() == LARGE
    file = hub.stats().files[f"{MODEL}/weights.bin"]
    assert (file.gets, file.ranges) == (2, [f"bytes={kept_bytes}-"])
    assert file.bytes == 2_000_000 + len(LARGE) - kept_bytes


def test_wrong_bytes_flips_one_byte_in_every_answer_that_has_it(hub: RunningHub, web: httpx2.Client) -> None:
    offset = (1 << 20) + 17
    wrong = bytearray(LARGE)
    wrong[offset] ^= 0xFF
    hub.set_faults(Faults(wrong_bytes=WrongBytes(glob="*.bin", offset=offset)))
    assert web.get(resolve("config.json")).content == FILES["config.json"]
    for _ in range(2):
        assert web.get(resolve("weights.bin")).content == wrong
    span = {"Range": f"bytes={offset - 1}-{offset + 1}"}
    assert web.get(resolve("weights.bin"), headers=span).content == wrong[offset - 1 : offset + 2]


def test_wrong_bytes_spends_its_strikes_only_where_they_show(hub: RunningHub, web: httpx2.Client) -> None:
    hub.set_faults(Faults(wrong_bytes=WrongBytes(offset=100, times=1)))
    for span in ("bytes=0-99", "bytes=101-200"):
        first, last = map(int, span.removeprefix("bytes=").split("-"))
        assert web.get(resolve("weights.bin"), headers={"Range": span}).content == LARGE[first : last + 1]
    assert web.get(resolve("weights.bin")).content != LARGE
    assert web.get(resolve("weights.bin")).content == LARGE


def test_bytes_per_s_is_the_rate_of_all_bodies_together(hub: RunningHub, web: httpx2.Client) -> None:
    hub.set_faults(Faults(bytes_per_s=200_000))
    started_s = time.monotonic()
    for span in ("bytes=0-39999", "bytes=40000-79999"):
        assert len(web.get(resolve("weights.bin"), headers={"Range": span}).content) == 40_000
    assert time.monotonic() - started_s >= 0.4 * 0.95


def test_no_range_answers_200_with_the_full_body(hub: RunningHub, web: httpx2.Client) -> None:
    hub.set_faults(Faults(no_range=True))
    answer = web.get(resolve("weights.bin"), headers={"Range": "bytes=5-9"})
    assert (answer.status_code, answer.content) == (200, LARGE)
    assert "Accept-Ranges" not in answer.headers


def test_faults_that_are_not_understood_change_nothing(hub: RunningHub, web: httpx2.Client) -> None:
    hub.set_faults(Faults(no_range=True))
    for body in ('{"no_rnage": true}', '{"bytes_per_s": "fast"}', "faults"):
        answer = web.put("/_faults", content=body)
        assert answer.status_code == 400
        assert "none was set" in answer.json()["error"]
    assert hub.faults() == Faults(no_range=True)


def test_hub_without_admin_has_no_switches(root: Path) -> None:
    async def ask(path: str) -> int:
        transport = httpx2.ASGITransport(DemoHub(HubConfig(root=root, admin=False)).app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://hub") as client:
            return (await client.get(path)).status_code

    assert [asyncio.run(ask(path)) for path in ("/api/models", "/_faults", "/_stats")] == [200, 404, 404]


# Stats


def test_stats_distinguish_paths_ranges_and_kinds(hub: RunningHub, web: httpx2.Client) -> None:
    web.get(f"/api/models/{MODEL}")
    web.head(resolve("config.json"))
    web.get(resolve("config.json"))
    for span in ("bytes=0-9", "bytes=10-29"):
        web.get(resolve("weights.bin"), headers={"Range": span})
    stats = hub.stats()
    assert stats.requests == RequestCounts(api=1, head=1, get=5)
    assert stats.answers == {200: 3, 302: 2, 206: 2}
    assert stats.bytes == len(FILES["config.json"]) + 30
    large = stats.files[f"{MODEL}/weights.bin"]
    assert (large.gets, large.bytes, large.ranges) == (2, 30, ["bytes=0-9", "bytes=10-29"])
    hub.reset_stats()
    assert hub.stats().requests == RequestCounts()


def test_stats_count_what_was_sent_when_the_client_disconnects(tmp_path: Path) -> None:
    size_bytes = 64 << 20
    (tmp_path / "a/large").mkdir(parents=True)
    with (tmp_path / "a/large/w.safetensors").open("wb") as file:
        file.truncate(size_bytes)
    with running_hub(tmp_path) as hub:
        head = httpx2.head(f"{hub.base_url}/a/large/resolve/main/w.safetensors", trust_env=False)
        address = httpx2.URL(hub.base_url)
        assert address.port is not None
        with socket.create_connection((address.host, address.port)) as connection:
            request = f"GET {head.headers['Location']} HTTP/1.1\r\nHost: {address.host}\r\n\r\n"
            connection.sendall(request.encode())
            received_bytes = 0
            while received_bytes < 200_000:
                received_bytes += len(connection.recv(1 << 16))
            while_open = hub.stats().bytes
        # The response headers are less than 2 KiB of what was received.
        assert received_bytes - 2048 <= while_open < size_bytes / 2
        assert hub.stats().bytes < size_bytes / 2
