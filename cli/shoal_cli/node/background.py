"""The supervisor behind `shoal up --detach`: options on stdin, one line on stdout when the node is up or is not."""

from __future__ import annotations

import os
import sys

import msgspec

from shoal_cli.node.control import Reply
from shoal_cli.node.plan import UpOptions
from shoal_cli.node.report import UpReport
from shoal_cli.node.up import hand_over, run_node
from shoal_common.errors import ShoalError
from shoal_common.messages import encode


def main() -> int:
    """Run the node. Returns the exit code."""
    options = msgspec.json.decode(sys.stdin.buffer.read(), type=UpOptions)

    def when_up(report: UpReport) -> None:
        hand_over(Reply(result=msgspec.Raw(encode(report))))

    try:
        run_node(options, dict(os.environ), when_up, lambda _news: None)
    except ShoalError as e:
        hand_over(Reply(error=e.body()))
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
