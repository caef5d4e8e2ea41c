"""Send a command over NATS: download a model to a node (`pip install nats-py`).

Usage: nats_command.py NODE
"""

import asyncio
import json
import os
import sys
import uuid

import nats

MODEL = "shoal/tiny-fish"
TIMEOUT_S = 600


async def main(node: str) -> None:
    # Of a cluster that other machines may join, the URL has the secret: nats://SECRET@192.168.1.5:4222
    connection = await nats.connect(os.environ.get("SHOAL_NATS", "nats://127.0.0.1:4222"))
    subject = f"shoal.v1.cmd.fetcher.{node}.download"
    body = json.dumps({"model": MODEL}).encode()
    # A repeated id does the work once, so a sender that is not sure just sends again.
    headers = {"Nats-Msg-Id": str(uuid.uuid4())}

    # The command is stored, runs once its node is up, and its reply says how it ended.
    reply = await connection.request(subject, body, timeout=TIMEOUT_S, headers=headers)
    outcome = json.loads(reply.data)
    if outcome["ok"]:
        print(f"{outcome['result']['model']} is {outcome['result']['phase']} on {outcome['node']}")
    else:
        print(f"{outcome['error']['code']}: {outcome['error']['message']}")

    # Who did not wait finds the outcome here, for an hour.
    done = await connection.jetstream().key_value("done")
    entry = await done.get(outcome["id"])
    print(f"outcome {outcome['id']}: ok={json.loads(entry.value or b'{}')['ok']}")
    await connection.close()


asyncio.run(main(sys.argv[1]))
