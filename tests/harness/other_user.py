"""Another user of this machine, and a machine beside it, as they reach a port of ours: HTTP from a child process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

import pytest

OTHER_UID = 12345
_DEADLINE_S = 60.0
_CHILD = """
import encodings.idna, http.client, json, os, sys
host, port, uid, requests, headers = json.loads(sys.stdin.read())
if uid:
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
answers = []
for method, path in requests:
    connection = http.client.HTTPConnection(host, port, timeout=30)
    connection.request(method, path, headers=headers)
    answers.append(connection.getresponse().status)
    connection.close()
print(json.dumps(answers))
"""

Request = tuple[str, str]
"""Method and path."""


def statuses(
    host: str,
    port: int,
    requests: Sequence[Request],
    headers: Mapping[str, str] = {},
    uid: int = 0,
    within: tuple[str, ...] = (),
) -> dict[Request, int]:
    """Return the status of each request, sent by a child process.

    It becomes the user `uid` first, or runs within a command such as `ip netns exec`.
    """
    if uid and os.geteuid() != 0:
        pytest.skip("only root can become another user")
    done = subprocess.run(
        [*within, sys.executable, "-c", _CHILD],
        input=json.dumps([host, port, uid, list(requests), dict(headers)]),
        capture_output=True,
        text=True,
        timeout=_DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(requests, json.loads(done.stdout), strict=True))
