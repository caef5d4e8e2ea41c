"""Ask a service over NATS, and read the cluster's state (`pip install nats-py`).

Usage: nats_request.py NODE
"""

import asyncio
import json
import os
import sys

import nats

NEED_BYTES = 1_000_000_000


async def main(node: str) -> None:
    # Of a cluster that other machines may join, the URL has the secret: nats://SECRET@192.168.1.5:4222
    connection = await nats.connect(os.environ.get("SHOAL_NATS", "nats://127.0.0.1:4222"))

    # What would storage evict, to admit a gigabyte more? A reply is {"result": …} or {"error": …}.
    body = json.dumps({"need_bytes": NEED_BYTES}).encode()
    reply = json.loads((await connection.request(f"shoal.v1.svc.storage.{node}.plan", body, timeout=10)).data)
    if "error" in reply:
        print(f"{reply['error']['code']}: {reply['error']['message']}")
    else:
        print(f"plan of {node}: {reply['result']}")

    # What every node's disk holds is in the bucket `state`, published by its storage.
    state = await connection.jetstream().key_value("state")
    for key in sorted(key for key in await state.keys() if key.startswith("storage.")):
        disk = json.loads((await state.get(key)).value or b"{}")
        print(f"{key}: {disk['used_bytes']} bytes used")
    await connection.close()


asyncio.run(main(sys.argv[1]))
