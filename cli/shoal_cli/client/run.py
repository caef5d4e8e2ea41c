"""`shoal run`: bring a model here if it is nowhere, place it if nothing answers, then talk."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from rich.console import Console

from shoal_cli.client.answers import StatusAnswer
from shoal_cli.client.conversation import Conversation, Sampling
from shoal_cli.client.gateway import Gateway
from shoal_cli.client.placing import find_instance, is_held_as, place, until_ready, wish
from shoal_cli.client.pull import Pull, display
from shoal_cli.client.typed import TypedLines, confirmed
from shoal_cli.sizes import show_seconds
from shoal_common.errors import Refused, ShoalError
from shoal_common.names import DEFAULT_REVISION, ModelRef, is_commit

_HELP = "/exit ends (so does Ctrl-D), /clear starts afresh, Ctrl-C stops an answer"


class Run:
    """One `shoal run`. Answers go to stdout; all else to stderr, so that a pipe gets the answer only."""

    def __init__(self, gateway: Gateway, model: str, exactly: int | None, sampling: Sampling, err: Console) -> None:
        self._gateway, self._ref, self._exactly = gateway, ModelRef.parse(model), exactly
        self._sampling, self._err = sampling, err

    def once(self, prompt: str) -> int:
        """Answer one prompt."""
        self._answer(self._prepare(ask=None), prompt)
        return 0

    def interactively(self, lines: TypedLines) -> int:
        """Talk until /exit or Ctrl-D."""
        talk = self._prepare(ask=lines.confirm)
        self._err.print(f"[dim]{self._ref}: {_HELP}[/dim]")
        while (words := lines.next_line()) is not None:
            match words.strip():
                case "":
                    continue
                case "/exit" | "/quit" | "/bye":
                    return 0
                case "/clear":
                    talk.clear()
                    self._err.print("[dim]forgotten[/dim]")
                case "/help" | "/?":
                    self._err.print(f"[dim]{_HELP}[/dim]")
                case text if text.startswith("/"):
                    self._err.print(f"[dim]there is no {text.split()[0]}: {_HELP}[/dim]", markup=True)
                case text:
                    self._one_turn(talk, text)
        print()
        return 0

    def _one_turn(self, talk: Conversation, text: str) -> None:
        try:
            self._answer(talk, text)
        except KeyboardInterrupt:
            self._err.print("[dim](stopped)[/dim]")
        except ShoalError as e:
            # The instance may be back in a moment: the conversation is worth keeping.
            self._err.print(f"shoal: {e.message}", markup=False, style="red", soft_wrap=True)

    def _answer(self, talk: Conversation, text: str) -> None:
        began_s, answer, whole = time.monotonic(), talk.ask(text), False
        try:
            for piece in answer:
                sys.stdout.write(piece)
                sys.stdout.flush()
            whole = True
        finally:
            answer.close()  # hanging up is what tells the gateway that nobody reads on
            if not whole and sys.stdout.isatty():
                sys.stdout.write("\n")
                sys.stdout.flush()
        sys.stdout.write("\n")
        sys.stdout.flush()
        took_s = time.monotonic() - began_s
        if self._err.is_terminal and sys.stdout.isatty() and talk.completion_tokens:
            cut = ", cut at --max-tokens" if talk.finish_reason == "length" else ""
            speed = talk.completion_tokens / max(took_s, 1e-3)
            span = f"{took_s:.1f} s" if took_s < 10 else show_seconds(took_s)
            self._err.print(f"[dim]{talk.completion_tokens} tokens in {span}, {speed:.1f}/s{cut}[/dim]")

    def _prepare(self, ask: Callable[[str], bool] | None) -> Conversation:
        status = self._gateway.get("/v1/status", StatusAnswer)
        instance = find_instance(self._gateway, self._ref, status)
        if instance is None:
            self._bring(status, ask)
            body = wish(str(self._ref), self._exactly, None, [], 0)
            self._err.print(f"[dim]placing {self._ref}[/dim]")
            instance = place(self._gateway, body, self._tell, confirmed if ask else None)
        elif instance.phase != "ready":
            instance = until_ready(self._gateway, instance, self._tell)
        return Conversation(self._gateway, instance.id, self._sampling)

    def _tell(self, words: str) -> None:
        self._err.print(words, style="dim", markup=False)

    def _bring(self, status: StatusAnswer, ask: Callable[[str], bool] | None) -> None:
        ref = self._ref
        known_here = ref.revision == DEFAULT_REVISION or is_commit(ref.revision)
        if known_here and any(m.repo == ref.repo and is_held_as(m.commit, ref) for m in status.models):
            return
        if known_here and ask is not None and not ask(f"{ref} is on no node. Pull it to {status.node}? [Y/n] "):
            raise Refused(f"{ref} is on no node and was not pulled; `shoal pull {ref} --node NODE` chooses where")
        pull = Pull(self._gateway, str(ref))
        pull.ask([], everywhere=False)
        with display(self._err, as_json=False) as shown:
            pull.follow(shown)
        for error in pull.errors.values():
            raise error
