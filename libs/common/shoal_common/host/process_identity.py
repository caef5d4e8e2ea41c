"""This process's identity, whether another process is still alive, and which boot of the machine this is."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
import uuid
from functools import cache
from pathlib import Path

import psutil

from shoal_common.messages.liveness import ProcessIdentity

_SAME_START_S = 1.5
"""Two readings of a process's start time differ by clock ticks: less than this is the same process."""
_BOOT_BYTES = 16
_SYSCTL_TIMEOUT_S = 10.0


def host_id() -> str:
    """Return a value for this machine, this boot and this pid namespace: where it is equal, so are pids."""
    if sys.platform == "linux":
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
        namespace = Path("/proc/self/ns/pid").readlink().name.strip("pid:[]")
        return f"{socket.gethostname()}/{boot}/{namespace}"
    return f"{socket.gethostname()}/{int(psutil.boot_time())}"


@cache
def boot_id() -> bytes:
    """Return 16 bytes that identify this boot of this machine, equal for all its processes."""
    if sys.platform == "linux":
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    else:
        # Not the boot time, which moves when the clock is set: two processes would disagree.
        command = ("/usr/sbin/sysctl", "-n", "kern.bootsessionuuid")
        boot = subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SYSCTL_TIMEOUT_S).stdout
    return hashlib.sha256(boot.strip().encode()).digest()[:_BOOT_BYTES]


def network_id() -> str:
    """Return a value for this machine, boot and network namespace: where it is equal, loopback is shared."""
    if sys.platform == "linux":
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
        return f"{boot}/{Path('/proc/self/ns/net').readlink().name.strip('net:[]')}"
    return host_id()


def this_process() -> ProcessIdentity:
    """Return the identity of this process, with a new uid."""
    return ProcessIdentity(
        uid=uuid.uuid4().hex[:12],
        host=host_id(),
        pid=os.getpid(),
        pid_started_s=round(psutil.Process().create_time(), 1),
        network_namespace=network_id(),
    )


def is_dead(holder: ProcessIdentity, host: str) -> bool:
    """Return whether a process is certainly dead; known only of processes of this machine and boot."""
    if holder.host != host:
        return False
    try:
        process = psutil.Process(holder.pid)
        if abs(process.create_time() - holder.pid_started_s) > _SAME_START_S:
            return True
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False
