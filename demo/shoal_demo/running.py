"""A running hub for tests, benchmarks and demos: `with running_hub(root) as hub: ... hub.base_url ...`.

The listening socket is made here and handed over, so the port is known at once and connections wait in its queue:
the first answer is the sign of readiness, and nothing has to be polled.
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
from shoal_demo.app import Hub, HubConfig
from shoal_demo.faults import Faults
from shoal_demo.hub import base_url, listen, make_server
from shoal_demo.stats import Stats

READY_TIMEOUT_S = 20.0
ADMIN_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 10.0


class HubNotReadyError(RuntimeError):
    """The hub did not answer in time, or ended at once."""


class RunningHub:
    """A hub that accepts requests. Faults and stats go over its admin endpoints, in a thread and a process alike."""

    def __init__(self, address: str) -> None:
        self.base_url = address

    def set_faults(self, faults: Faults) -> None:
        """Replace all faults; what is not named in `faults` is off."""
        self._admin("PUT", "/_faults", msgspec.json.encode(faults))

    def faults(self) -> Faults:
        """The faults that are on, with the strikes they have left."""
        return msgspec.json.decode(self._admin("GET", "/_faults"), type=Faults)

    def reset_faults(self) -> None:
        """A healthy hub again."""
        self._admin("DELETE", "/_faults")

    def stats(self) -> Stats:
        """All counters since the start or the last reset."""
        return msgspec.json.decode(self._admin("GET", "/_stats"), type=Stats)

    def reset_stats(self) -> None:
        """All counters to zero."""
        self._admin("DELETE", "/_stats")

    def _admin(self, method: str, path: str, body: bytes | None = None, timeout_s: float = ADMIN_TIMEOUT_S) -> bytes:
        request = urllib.request.Request(self.base_url + path, data=body, method=method)
        # Without proxies: a proxy of the environment knows nothing of a hub on loopback.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=timeout_s) as answer:
            content: bytes = answer.read()
        return content

    def wait_ready(self, timeout_s: float) -> None:
        """Return when the hub has answered; raise HubNotReadyError when it has not within `timeout_s`."""
        try:
            self._admin("GET", "/api/models", timeout_s=timeout_s)
        except urllib.error.HTTPError:
            return  # refused, for want of a token for instance: an answer nevertheless
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
    """A hub over `root`, in a thread of this process or (`process`) in one of its own, stopped at the end.

    `other_lfs_host` redirects large files to `localhost` instead of 127.0.0.1: to clients another host, to which they
    must not send their token.
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
    server = make_server(Hub(config))
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
    """`python -m shoal_demo.hub` on an inherited socket, ended with the block."""
    command = [sys.executable, "-m", "shoal_demo.hub", "--root", str(config.root), "--fd", str(listener_fd)]
    command += ["--page-size", str(config.page_size), "--lfs-from-bytes", str(config.lfs_from_bytes)]
    if config.lfs_base_url is not None:
        command += ["--lfs-base-url", config.lfs_base_url]
    # The package may be on the path of this process only, without being installed.
    here = str(Path(__file__).parent.parent)
    environment = {**environ, "PYTHONPATH": pathsep.join(filter(None, [here, environ.get("PYTHONPATH")]))}
    # A file and not an argument: arguments are readable by every user of the machine.
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
                # Ctrl-C is for the one who started the hub: it stops the hub in order.
                start_new_session=True,
            )
        finally:
            # The child alone holds the socket now: should it die early, waiting clients learn of it at once.
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
