"""`shoal doctor`."""

from __future__ import annotations

import typer

from shoal_cli.cli_context import CliContext
from shoal_cli.command_app import CommandHelp, new_app
from shoal_cli.commands.options import HomeOption, JsonOption
from shoal_common import VERSION

app = new_app()

_JSON = """It changes nothing, works while NATS or the node is down, and checks from this machine: when two nodes
do not reach each other, run it on both. Exit code 0 when nothing is a problem, else 1.
--json prints {"home", "node", "version", "worst", "findings": [{"check", "level", "what", "remedy", "about"}]}; a
level is "ok", "skipped" (it could not be checked; another finding says why), "warning" or "problem". Fields are
only ever added."""


@app.command(cls=CommandHelp, epilog=_JSON)
def doctor(ctx: typer.Context, as_json: JsonOption = False, home: HomeOption = "") -> int:
    """Find out what is wrong here and what to do about it."""
    # These import the NATS client, which `shoal --help` must not wait for.
    from shoal_cli.doctor import render  # noqa: PLC0415
    from shoal_cli.doctor.finding import exit_code  # noqa: PLC0415
    from shoal_cli.doctor.run import run_checks  # noqa: PLC0415

    cli = CliContext(ctx)
    report = run_checks(cli.home, cli.environ)
    if cli.as_json:
        cli.print_json(render.to_json(report, VERSION))
    else:
        render.print_report(report, cli.out)
    return exit_code(report.findings)
