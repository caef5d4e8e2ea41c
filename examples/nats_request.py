"""Ask a service over NATS, and read the cluster's state.

Usage: nats_request.py NODE
"""

import asyncio
import json
import os
import sys

from shoal_common.bus.connection import connected, login_of
from shoal_common.config import read_config

NEED_BYTES = 1_000_000_000


async def main(node: str) -> None:
    # The owner's key on this machine's node is ~/.shoal/identity/cli.nk. Any client of NATS can use it, over TLS.
    config = read_config("cli", os.environ)
    assert config.identity is not None, "this machine has no node yet: start one with `shoal up`"
    async with connected(config.nats, "example", timeout_s=10, login=login_of(config.identity, "cli")) as nats:
        # What would storage evict, to admit a gigabyte more? A reply is {"result": …} or {"error": …}.
        body = json.dumps({"need_bytes": NEED_BYTES}).encode()
        reply = await nats.client.request(f"shoal.v1.svc.storage.{node}.plan", body, timeout=10)
        answer = json.loads(reply.data)
        if "error" in answer:
            print(f"{answer['error']['code']}: {answer['error']['message']}")
        else:
            print(f"plan of {node}: {answer['result']}")

        # What every node's disk holds is in the bucket `state`, published by its storage.
        state = await nats.js.key_value("state")
        for key in sorted(key for key in await state.keys() if key.startswith("storage.")):
            disk = json.loads((await state.get(key)).value or b"{}")
            print(f"{key}: {disk['used_bytes']} bytes used")


asyncio.run(main(sys.argv[1]))
