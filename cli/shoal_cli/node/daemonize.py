"""The process of `shoal up --detach`: options on stdin, one line on stdout with the outcome of starting."""

from __future__ import annotations

import os
import sys

import msgspec

from shoal_cli.node.control import ControlReply
from shoal_cli.node.node_plan import UpOptions
from shoal_cli.node.startup_report import StartupReport
from shoal_cli.node.up import run_node, send_report
from shoal_common.errors import ShoalError
from shoal_common.messages import encode


def main() -> int:
    """Run the node. Returns the exit code."""
    options = msgspec.json.decode(sys.stdin.buffer.read(), type=UpOptions)

    def on_started(report: StartupReport) -> None:
        send_report(ControlReply(result=msgspec.Raw(encode(report))))

    try:
        run_node(options, dict(os.environ), on_started, lambda _line: None)
    except ShoalError as e:
        send_report(ControlReply(error=e.body()))
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
