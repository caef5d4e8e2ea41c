"""The hub's token of whoever pulls, for the fetcher of their own node (docs/transfer.md)."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress

from shoal_cli.node_home import Home
from shoal_common.config import saved_node_id
from shoal_common.errors import ShoalError
from shoal_common.hub_token import GivenToken, check_token, give_token, read_endpoint
from shoal_common.redaction import remember_secret

_READ_TIMEOUT_S = 10.0
"""huggingface_hub may ask the hub for a new token in place of one that expires."""


def hand_over_token(
    home: Home, model: str, nodes: Sequence[str] | None, is_own_gateway: bool, environ: Mapping[str, str]
) -> str:
    """Give the token to this home's fetcher if its node is to download. Returns why it was not given, or "".

    `nodes`: those that are to download; None: all; empty: the gateway's own.
    """
    try:
        token = read_token()
        if not token:
            return ""
        own = saved_node_id(home.root)
        if not own:
            return "your token stays on this machine, which runs no node: pull on the node itself"
        if nodes is not None and (own not in nodes if nodes else not is_own_gateway):
            return (
                f"your token stays on this machine: pull on that node itself, or also to this one with --node {own}"
            )
        give_token(home.run, GivenToken(model, token, read_endpoint(environ)))
    except ShoalError as e:
        return f"your token was not used: {e.message}"
    return ""


def with_reason(error: ShoalError, not_given: str) -> ShoalError:
    """Return the hub's refusal with why it was not shown the token; other errors as they are."""
    if not_given and error.details.get("source") == "hub":
        return type(error)(f"{error.message}; {not_given}", **error.details)
    return error


def read_token() -> str:
    """Return the token as huggingface_hub finds it: HF_TOKEN, else that of `hf auth login`; "" without one."""
    found: list[str] = []

    def read() -> None:
        from huggingface_hub import get_token  # noqa: PLC0415  # takes a while

        with suppress(Exception):  # it could not be renewed: as if there were none
            found.append(get_token() or "")

    reading = threading.Thread(target=read, daemon=True)
    reading.start()
    reading.join(_READ_TIMEOUT_S)
    token = check_token(found[0]) if found else ""
    remember_secret(token)
    return token
