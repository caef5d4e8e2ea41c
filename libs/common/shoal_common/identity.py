"""Who this process is, and whether another one is still alive; which boot of its machine this is."""

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

from shoal_common.messages.facts import Holder

_SAME_START_S = 1.5
"""Process start times come in clock ticks from different readings: closer than this is the same process."""
_BOOT_BYTES = 16
_SYSCTL_S = 10.0


def this_host() -> str:
    """This machine, this boot of it, and this pid namespace: within one such value a pid means one process."""
    if sys.platform == "linux":
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
        namespace = Path("/proc/self/ns/pid").readlink().name.strip("pid:[]")
        return f"{socket.gethostname()}/{boot}/{namespace}"
    return f"{socket.gethostname()}/{int(psutil.boot_time())}"


@cache
def boot_bytes() -> bytes:
    """16 bytes that name this boot of this machine, alike for all its processes: what a power cut ends."""
    if sys.platform == "linux":
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    else:
        # Not the time of the boot: that moves when the clock is set, and two processes would disagree.
        asked = ("/usr/sbin/sysctl", "-n", "kern.bootsessionuuid")
        boot = subprocess.run(asked, check=True, capture_output=True, text=True, timeout=_SYSCTL_S).stdout
    return hashlib.sha256(boot.strip().encode()).digest()[:_BOOT_BYTES]


def this_network() -> str:
    """This machine, this boot of it, and this network namespace: within one such value loopback is shared."""
    if sys.platform == "linux":
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
        return f"{boot}/{Path('/proc/self/ns/net').readlink().name.strip('net:[]')}"
    return this_host()


def this_process() -> Holder:
    """A holder record for this process, with a fresh uid."""
    return Holder(
        uid=uuid.uuid4().hex[:12],
        host=this_host(),
        pid=os.getpid(),
        pid_started_s=round(psutil.Process().create_time(), 1),
        network=this_network(),
    )


def is_gone(holder: Holder, host: str) -> bool:
    """Whether a holder is certainly dead. Only a process of this same machine and boot can be known to be."""
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
