"""What each process of a node sets for itself before anything else, and for the Python that it starts."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from shoal_common.host.private_files import PRIVATE_UMASK, make_private_directory

NEEDED_FILES = 1024
"""A fileserver holds 256 connections, and a blob's file for each; the fetcher as many again."""
FILE_LIMIT_REMEDY = (
    f"raise the hard limit: `ulimit -n {4 * NEEDED_FILES}` as root before `shoal up`, LimitNOFILE= in systemd's "
    "units, `launchctl limit maxfiles` on macOS; then restart the node"
)
_WANTED_FILES = (65_536, 10_240)
"""macOS refuses more than 10,240, even where it reports no limit."""


def set_up_process() -> int:
    """Keep what this process and its children write from other users; raise the limit of open files and return it."""
    os.umask(PRIVATE_UMASK)
    return raise_file_limit()


def raise_file_limit() -> int:
    """Raise the soft limit of open files as far as is of use. Returns it; -1: none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in _WANTED_FILES:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if soft == resource.RLIM_INFINITY or soft >= limit:
            break
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            return limit
    return -1 if soft == resource.RLIM_INFINITY else soft


def file_limit_problem(limit: int) -> str:
    """Return what is wrong with a limit of open files, and what to do; "" where it suffices. Pure."""
    if limit < 0 or limit >= NEEDED_FILES:
        return ""
    return (
        f"may have {limit} files and connections open, fewer than the {NEEDED_FILES} it may need: {FILE_LIMIT_REMEDY}"
    )


@contextmanager
def limits_kept() -> Iterator[None]:
    """Keep this process's limits while a library is imported that sets them: it fails below what it wants."""
    real = resource.setrlimit
    vars(resource)["setrlimit"] = lambda *_: None
    try:
        yield
    finally:
        vars(resource)["setrlimit"] = real


def enter_run_directory(home: Path) -> None:
    """Work in the home's `run`, not where a person started this, whose files its children could import."""
    environ = python_environment(os.environ)
    os.environ.clear()
    os.environ.update(environ)
    run = home / "run"
    with suppress(OSError):  # a full disk
        make_private_directory(run)
    os.chdir(run if run.is_dir() else home)


def python_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which Python imports nothing from where it is started.

    Relative entries of PYTHONPATH become absolute; an empty one, which stands for the working directory, is left out.
    """
    safe = {**environ, "PYTHONSAFEPATH": "1"}
    entries = [str(Path(entry).absolute()) for entry in safe.pop("PYTHONPATH", "").split(os.pathsep) if entry]
    return safe | ({"PYTHONPATH": os.pathsep.join(entries)} if entries else {})
