"""Run a hub for tests, benchmarks and demos: `with running_hub(root) as hub: ... hub.base_url ...`.

The listening socket is created here and handed over, so the port is known at once and connections wait in its queue:
the first response shows readiness, without polling.
"""

import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from os import close, environ, pathsep
from pathlib import Path
from tempfile import NamedTemporaryFile

import msgspec

from shoal_demo import MODELS_DIR
from shoal_demo.app import DemoHub, HubConfig
from shoal_demo.faults import Faults
from shoal_demo.hub import base_url, listen, make_server
from shoal_demo.stats import TransferStats

READY_TIMEOUT_S = 20.0
ADMIN_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 10.0


class HubNotReadyError(RuntimeError):
    """The hub did not answer in time, or exited at once."""


class RunningHub:
    """A hub that accepts requests. Faults and stats go over its admin endpoints, for a thread and a process alike."""

    def __init__(self, address: str) -> None:
        self.base_url = address

    def set_faults(self, faults: Faults) -> None:
        """Replace all faults."""
        self._admin("PUT", "/_faults", msgspec.json.encode(faults))

    def faults(self) -> Faults:
        """Return the current faults with their remaining `times`."""
        return msgspec.json.decode(self._admin("GET", "/_faults"), type=Faults)

    def reset_faults(self) -> None:
        """Turn all faults off."""
        self._admin("DELETE", "/_faults")

    def stats(self) -> TransferStats:
        """Return all counters since the start or the last reset."""
        return msgspec.json.decode(self._admin("GET", "/_stats"), type=TransferStats)

    def reset_stats(self) -> None:
        """Set all counters to zero."""
        self._admin("DELETE", "/_stats")

    def _admin(self, method: str, path: str, body: bytes | None = None, timeout_s: float = ADMIN_TIMEOUT_S) -> bytes:
        request = urllib.request.Request(self.base_url + path, data=body, method=method)
        # Without proxies: a configured proxy cannot reach a hub on loopback.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=timeout_s) as answer:
            content: bytes = answer.read()
        return content

    def wait_ready(self, timeout_s: float) -> None:
        """Return when the hub answers. Raises HubNotReadyError after `timeout_s`."""
        try:
            self._admin("GET", "/api/models", timeout_s=timeout_s)
        except urllib.error.HTTPError:
            return  # refused, for instance without a token: the hub answers
        except OSError as error:
            message = f"the hub at {self.base_url} did not answer within {timeout_s} s: {error}"
            raise HubNotReadyError(message) from error


@contextmanager
def running_hub(
    root: Path = MODELS_DIR,
    *,
    page_size: int = HubConfig.page_size,
    lfs_from_bytes: int = HubConfig.lfs_from_bytes,
    other_lfs_host: bool = False,
    token: str | None = None,
    process: bool = False,
    host: str = "127.0.0.1",
    port: int = 0,
    ready_timeout_s: float = READY_TIMEOUT_S,
) -> Iterator[RunningHub]:
    """Run a hub of `root` while the body runs, in a thread or (`process`) in a child process.

    `other_lfs_host` redirects large files to `localhost` instead of 127.0.0.1: for clients that is another host, to
    which they must not send their token.
    """
    listener = listen(host, port)
    address = base_url(listener)
    config = HubConfig(
        root=root,
        page_size=page_size,
        lfs_from_bytes=lfs_from_bytes,
        lfs_base_url=f"http://localhost:{listener.getsockname()[1]}" if other_lfs_host else None,
        token=token,
    )
    if process:
        with _hub_process(config, listener.detach()):
            yield _ready(address, ready_timeout_s)
        return
    server = make_server(DemoHub(config))
    thread = threading.Thread(target=server.run, args=([listener],), name="hub", daemon=True)
    thread.start()
    try:
        yield _ready(address, ready_timeout_s)
    finally:
        server.should_exit = True
        thread.join(STOP_TIMEOUT_S)


def _ready(address: str, timeout_s: float) -> RunningHub:
    hub = RunningHub(address)
    hub.wait_ready(timeout_s)
    hub.reset_stats()
    return hub


@contextmanager
def _hub_process(config: HubConfig, listener_fd: int) -> Iterator[None]:
    """Run `python -m shoal_demo.hub` on an inherited socket while the body runs."""
    command = [sys.executable, "-P", "-m", "shoal_demo.hub", "--root", str(config.root), "--fd", str(listener_fd)]
    command += ["--page-size", str(config.page_size), "--lfs-from-bytes", str(config.lfs_from_bytes)]
    if config.lfs_base_url is not None:
        command += ["--lfs-base-url", config.lfs_base_url]
    # The package may be on this process's path only, not installed.
    package_dir = str(Path(__file__).parent.parent)
    environment = {**environ, "PYTHONPATH": pathsep.join(filter(None, [package_dir, environ.get("PYTHONPATH")]))}
    # A file, because every user of the machine can read arguments.
    with NamedTemporaryFile("w", encoding="utf-8", suffix=".token") as token_file:
        if config.token is not None:
            token_file.write(config.token)
            token_file.flush()
            command += ["--token-file", token_file.name]
        try:
            child = subprocess.Popen(
                command,
                pass_fds=[listener_fd],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # Ctrl-C reaches only the parent, which stops the hub in order.
                start_new_session=True,
            )
        finally:
            # Only the child holds the socket now: if it dies early, waiting clients see that at once.
            close(listener_fd)
        try:
            yield
        finally:
            child.terminate()
            try:
                child.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
