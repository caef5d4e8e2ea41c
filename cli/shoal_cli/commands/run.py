"""`shoal run`: pull a model if no node has it, place it if no instance answers, then chat."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Annotated

import typer

from shoal_cli.api.chat import Conversation, Sampling
from shoal_cli.api.downloads import ModelPull
from shoal_cli.api.hub_token import hand_over_token, with_reason
from shoal_cli.api.names import resolve_model
from shoal_cli.api.placement import find_instance, matches_revision, place, placement_request, wait_ready_or_move
from shoal_cli.cli_context import CliContext
from shoal_cli.command_app import CommandHelp, new_app
from shoal_cli.commands.options import GatewayOption, HomeOption, ModelArgument, in_range
from shoal_cli.render.line_editor import LineEditor, confirm
from shoal_cli.render.progress_display import progress_display
from shoal_common.errors import BadInput, Denied, Refused, ShoalError
from shoal_common.messages.views import StatusView
from shoal_common.names import DEFAULT_REVISION, ModelRef, is_commit
from shoal_common.units import format_duration

app = new_app()
_HELP = "/exit or Ctrl-D ends, /clear starts over, Ctrl-C stops an answer"


@app.command(cls=CommandHelp)
def run(
    ctx: typer.Context,
    model: ModelArgument,
    prompt: Annotated[
        list[str],
        typer.Argument(metavar="[PROMPT]", show_default=False, help="one prompt; default: stdin, or a chat"),
    ] = [],  # noqa: B006
    exactly: Annotated[
        int | None,
        typer.Option(
            "--nodes", metavar="N", callback=in_range(1), show_default=False, help="run it over exactly N nodes"
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", metavar="N", callback=in_range(1), help="longest answer")
    ] = 2048,
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="X", callback=in_range(0, 2), help="0 to 2; 0 is greedy")
    ] = 0.7,
    gateway: GatewayOption = "",
    home: HomeOption = "",
) -> int:
    """Chat with a model; pulls and places it if needed."""
    cli = CliContext(ctx)
    session = ChatSession(cli, resolve_model(cli.gateway, model), exactly, Sampling(max_tokens, temperature))
    if prompt:
        return session.answer_once(" ".join(prompt))
    if sys.stdin is not None and sys.stdin.isatty():
        return session.chat(LineEditor(cli.home.chat_history))
    text = sys.stdin.read().strip() if sys.stdin is not None else ""
    if not text:
        raise BadInput("stdin is empty: pipe a prompt into it, or give one after the model")
    return session.answer_once(text)


class ChatSession:
    """One `shoal run`. Answers go to stdout, everything else to stderr: a pipe gets the answer only."""

    def __init__(self, cli: CliContext, model: str, exactly: int | None, sampling: Sampling) -> None:
        self._cli, self._gateway, self._err = cli, cli.gateway, cli.err
        self._ref, self._exactly, self._sampling = ModelRef.parse(model), exactly, sampling

    def answer_once(self, prompt: str) -> int:
        """Answer one prompt. Returns the exit code."""
        self._answer(self._prepare(ask=None), prompt)
        return 0

    def chat(self, editor: LineEditor) -> int:
        """Chat until /exit or Ctrl-D. Returns the exit code."""
        conversation = self._prepare(ask=editor.confirm)
        self._err.print(f"[dim]{self._ref}: {_HELP}[/dim]")
        while (line := editor.next_line()) is not None:
            match line.strip():
                case "":
                    continue
                case "/exit" | "/quit" | "/bye":
                    return 0
                case "/clear":
                    conversation.clear()
                    self._err.print("[dim]cleared[/dim]")
                case "/help" | "/?":
                    self._err.print(f"[dim]{_HELP}[/dim]")
                case text if text.startswith("/"):
                    self._err.print(f"[dim]unknown command {text.split()[0]}: {_HELP}[/dim]", markup=True)
                case text:
                    self._take_turn(conversation, text)
        print()
        return 0

    def _take_turn(self, conversation: Conversation, text: str) -> None:
        try:
            self._answer(conversation, text)
        except KeyboardInterrupt:
            self._err.print("[dim](stopped)[/dim]")
        except ShoalError as e:
            # The instance may be back in a moment: the conversation is worth keeping.
            self._err.print(f"shoal: {e.message}", markup=False, style="red", soft_wrap=True)

    def _answer(self, conversation: Conversation, text: str) -> None:
        began_s, answer, complete = time.monotonic(), conversation.ask(text), False
        try:
            for piece in answer:
                sys.stdout.write(piece)
                sys.stdout.flush()
            complete = True
        finally:
            answer.close()  # closing the connection is what stops the gateway
            if not complete and sys.stdout.isatty():
                sys.stdout.write("\n")
                sys.stdout.flush()
        sys.stdout.write("\n")
        sys.stdout.flush()
        took_s = time.monotonic() - began_s
        if self._err.is_terminal and sys.stdout.isatty() and conversation.completion_tokens:
            cut = ", cut at --max-tokens" if conversation.finish_reason == "length" else ""
            speed = conversation.completion_tokens / max(took_s, 1e-3)
            duration = f"{took_s:.1f} s" if took_s < 10 else format_duration(took_s)
            self._err.print(f"[dim]{conversation.completion_tokens} tokens in {duration}, {speed:.1f}/s{cut}[/dim]")

    def _prepare(self, ask: Callable[[str], bool] | None) -> Conversation:
        status = self._gateway.get("/v1/status", StatusView)
        instance = find_instance(self._gateway, self._ref, status, self._exactly)
        body = placement_request(str(self._ref), self._exactly, None, [], 0)
        if instance is None:
            self._pull_if_missing(status, ask)
            self._err.print(f"[dim]placing {self._ref}[/dim]")
            instance = place(self._gateway, body, self._report, confirm if ask else None)
        elif instance.phase != "ready":
            instance = wait_ready_or_move(self._gateway, instance, body, self._report)
        return Conversation(self._gateway, instance.id, self._sampling)

    def _report(self, text: str) -> None:
        self._err.print(text, style="dim", markup=False)

    def _pull_if_missing(self, status: StatusView, ask: Callable[[str], bool] | None) -> None:
        ref = self._ref
        is_comparable = ref.revision == DEFAULT_REVISION or is_commit(ref.revision)
        if is_comparable and any(m.repo == ref.repo and matches_revision(m.commit, ref) for m in status.models):
            return
        if is_comparable and ask is not None and not ask(f"{ref} is on no node. Pull it to {status.node}? [Y/n] "):
            raise Refused(f"{ref} is on no node and was not pulled; `shoal pull {ref} --node NODE` chooses where")
        pull, cli = ModelPull(self._gateway, str(ref)), self._cli
        not_given = hand_over_token(cli.home, pull.model, [], cli.has_own_gateway, cli.environ)
        try:
            pull.request([], all_nodes=False)
        except Denied as e:
            raise with_reason(e, not_given) from None
        with progress_display(self._err, as_json=False) as display:
            pull.follow(display)
        for error in pull.errors.values():
            raise with_reason(error, not_given)
