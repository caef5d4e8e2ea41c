"""Send a command over NATS: download a model to a node.

Usage: nats_command.py NODE
"""

import asyncio
import json
import os
import sys
import uuid

from shoal_common.bus.connection import connected, login_of
from shoal_common.config import read_config

MODEL = "shoal/tiny-fish"
TIMEOUT_S = 600


async def main(node: str) -> None:
    # The owner's key on this machine's node is ~/.shoal/identity/cli.nk. Any client of NATS can use it, over TLS.
    config = read_config("cli", os.environ)
    assert config.identity is not None, "this machine has no node yet: start one with `shoal up`"
    async with connected(config.nats, "example", timeout_s=10, login=login_of(config.identity, "cli")) as nats:
        subject = f"shoal.v1.cmd.fetcher.{node}.download"
        body = json.dumps({"model": MODEL}).encode()
        # A repeated id does the work once, so a sender that is not sure just sends again.
        headers = {"Nats-Msg-Id": str(uuid.uuid4())}

        # The command is stored, runs once its node is up, and its reply says how it ended.
        reply = await nats.client.request(subject, body, timeout=TIMEOUT_S, headers=headers)
        outcome = json.loads(reply.data)
        if outcome["ok"]:
            print(f"{outcome['result']['model']} is {outcome['result']['phase']} on {outcome['node']}")
        else:
            print(f"{outcome['error']['code']}: {outcome['error']['message']}")

        # Who did not wait finds the outcome here, for an hour.
        done = await nats.js.key_value("done")
        entry = await done.get(outcome["id"])
        print(f"outcome {outcome['id']}: ok={json.loads(entry.value or b'{}')['ok']}")


asyncio.run(main(sys.argv[1]))
