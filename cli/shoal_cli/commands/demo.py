"""`shoal demo`."""

from __future__ import annotations

import importlib.util
import os
import sys

import typer

from shoal_cli.command_app import CommandHelp, new_app
from shoal_common.errors import NotFound

app = new_app()


@app.command(cls=CommandHelp, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def demo(ctx: typer.Context) -> int:
    """Run the demo, a small cluster on this machine. All other arguments are passed on to it."""
    if importlib.util.find_spec("shoal_demo") is None or importlib.util.find_spec("shoal_demo.__main__") is None:
        raise NotFound(
            "the demo is not installed: run `make` in Shoal's repository, where it is the directory `demo`"
        )
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-P", "-m", "shoal_demo", *ctx.args])
