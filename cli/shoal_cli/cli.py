"""Runs one command line. Every failure is one line on stderr and the exit code of its error.

A verb's module is imported when the verb is typed, and what a command needs is imported when it runs: `shoal version`
must not wait for an HTTP client.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.main import get_command

from shoal_cli.command_app import GroupHelp
from shoal_cli.commands.options import GatewayOption, HomeOption
from shoal_cli.errors import permission_denied_message, usage_message
from shoal_common import VERSION
from shoal_common.errors import BadInput, Denied, ShoalError
from shoal_common.host.file_kinds import wrong_kind
from shoal_common.redaction import redact, remember_secrets

_INTERRUPTED = 130
_COMPLETE_VARIABLE = "_SHOAL_COMPLETE"
"""Set by the shell's completion script; Typer then answers instead of running a command."""

SECTIONS: dict[str, tuple[str, ...]] = {
    "This machine": ("up", "down", "restart", "logs", "doctor", "key"),
    "Models": ("pull", "pause", "resume", "cancel", "ls", "models", "rm", "hub"),
    "Running models": ("run", "place", "ps", "stop", "rebalance"),
    "Disks and transfers": ("storage", "transfer", "gc", "verify", "repair"),
    "Cluster": ("status", "events", "node", "invite", "join", "leave"),
    "Other": ("demo", "version"),
}
"""Every verb, as `shoal --help` groups them. Each is the `app` of the module of its name in `commands/`."""

MEANT = {
    "remove": "rm",
    "delete": "rm",
    "uninstall": "rm",
    "login": "key",
    "top": "ps",
    "start": "up",
    "serve": "run",
    "chat": "run",
    "load": "place",
    "unload": "stop",
    "kill": "stop",
    "list": "ls",
    "show": "status",
    "info": "status",
    "inspect": "status",
    "nodes": "status",
    "search": "ls",
    "download": "pull",
    "install": "pull",
    "config": "storage set",
    "disk": "storage",
    "check": "doctor",
    "upgrade": "version",
}
"""What other programs call a command, and its name here."""

EXAMPLES = """Examples:
  shoal up                                        run a node here; Ctrl-C stops it
  shoal up -d --max-storage 200GB                 in the background, with at most 200 GB of models
  shoal up --bind 0.0.0.0                         let other machines join: `shoal invite` prints a code for one
  shoal join 192.168.1.6:4222                     join that machine's cluster, with a code
  shoal pull mlx-community/Qwen3-0.6B-4bit --all  download a model to every node
  shoal run mlx-community/Qwen3-0.6B-4bit         chat with it
  shoal run mlx-community/Qwen3-0.6B-4bit "Why do fish swim in shoals?"
  shoal status                                    nodes, disks, models, instances
  shoal doctor                                    find out what is wrong and what to do about it
  shoal storage set --max-storage 200GB --eviction-policy lru --all

Environment:
  SHOAL_HOME      the node's directory (~/.shoal)     SHOAL_NATS    NATS servers to join, comma-separated
  SHOAL_GATEWAY   URL of another node's gateway       SHOAL_API_KEY the key of that node (`shoal key` there)
  SHOAL_DEBUG=1   show tracebacks

Exit codes:
  0 success   2 usage error   3 not found   4 refused   5 unavailable or busy: try again
  6 credential missing   7 timed out   8 corrupt data   9 already running
  10 incompatible version   1 any other failure   130 Ctrl-C
"""


class VerbGroup(GroupHelp):
    """The verbs, each imported when it is needed."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return every verb."""
        return [verb for verbs in SECTIONS.values() for verb in verbs]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return one verb's command, or None."""
        if cmd_name not in self.list_commands(ctx):
            return None
        command = get_command(import_module(f"shoal_cli.commands.{cmd_name}").app)
        command.name = cmd_name
        return command

    def meant(self, name: str) -> str:
        """Return the verb that other programs call so, or ""."""
        return MEANT.get(name.lower(), "")

    def command_sections(self, ctx: Any) -> Mapping[str, Sequence[str]]:
        """Return the verbs by the heading they stand under in the help."""
        return SECTIONS


root = typer.Typer(cls=VerbGroup, rich_markup_mode=None, pretty_exceptions_enable=False)


@root.callback(
    invoke_without_command=True,
    epilog=EXAMPLES,
    subcommand_metavar="COMMAND …",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
def shoal(
    ctx: typer.Context,
    home: HomeOption = "",
    gateway: GatewayOption = "",
    version: Annotated[bool, typer.Option("--version", "-V", help="print the version")] = False,
) -> int:
    """Run large language models across the machines you have."""
    if version:
        typer.echo(f"shoal {VERSION}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
    return 0


def run(arguments: Sequence[str]) -> int:
    """Carry out a command line; `help VERB` is `VERB --help`. Returns the exit code."""
    environ = dict(os.environ)
    remember_secrets(environ)
    command = get_command(root)
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    if environ.get(_COMPLETE_VARIABLE):
        command.main(list(arguments), prog_name="shoal")
    try:
        # Not `command.main`: it maps Ctrl-C and a closed pipe to outcomes of its own.
        with command.make_context("shoal", list(arguments)) as ctx:
            return int(command.invoke(ctx) or 0)
    except typer.Exit as e:
        return e.exit_code
    except typer.TyperException as e:
        return _fail(e, usage_message(e), BadInput.exit_code, environ)
    except ShoalError as e:
        return _fail(e, e.message, e.exit_code, environ)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has closed it; Python must not complain about that at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except PermissionError as e:
        return _fail(e, permission_denied_message(e), Denied.exit_code, environ)
    except OSError as e:
        named = wrong_kind(e) or _disk_error(e, environ)
        if named is None:
            return _fail(e, _unexpected(e), 1, environ)
        return _fail(e, named.message, named.exit_code, environ)
    except Exception as e:  # noqa: BLE001  # people get one line, never a traceback; SHOAL_DEBUG shows it
        return _fail(e, _unexpected(e), 1, environ)


def _disk_error(error: OSError, environ: Mapping[str, str]) -> ShoalError | None:
    from shoal_cli.node.home_disk import disk_error  # noqa: PLC0415
    from shoal_common.config import home_directory  # noqa: PLC0415

    return disk_error(error, Path(error.filename) if error.filename else home_directory(environ))


def _unexpected(error: Exception) -> str:
    return f"{type(error).__name__}: {error}; SHOAL_DEBUG=1 shows the traceback"


def _fail(error: BaseException, message: str, code: int, environ: Mapping[str, str]) -> int:
    if environ.get("SHOAL_DEBUG"):
        raise error
    print(f"shoal: {redact(' '.join(message.split()))}", file=sys.stderr)
    return code
