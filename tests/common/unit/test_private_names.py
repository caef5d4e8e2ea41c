"""What Shoal uses of its libraries beyond their public interface: a new pin that changes it fails here, by name."""

from __future__ import annotations

import dis
import inspect

import tomlkit
import uvicorn
from nats.aio.subscription import Subscription
from nats.micro.request import Request
from nats.micro.service import Endpoint, Service
from tomlkit.items import Comment, Table, Trivia
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState


def attributes(kind: type, method: str = "__init__") -> set[str]:
    """Return the attributes that a method of a class sets."""
    steps = dis.get_instructions(getattr(kind, method))
    return {step.argval for step in steps if step.opname == "STORE_ATTR"}


def has_methods(kind: type, *names: str) -> bool:
    """Return whether a class has these methods."""
    return all(inspect.isfunction(getattr(kind, name, None)) for name in names)


def test_nats_py_has_what_the_rpc_server_reads_of_its_services() -> None:
    assert "_msg" in attributes(Request)
    assert attributes(Service) >= {"_endpoints", "_subscriptions"}
    assert "_subscription" in attributes(Endpoint)
    assert inspect.iscoroutinefunction(Subscription.drain)


def test_tomlkit_has_what_changing_a_section_uses() -> None:
    document = tomlkit.parse("[a]\nx = 1  # why\ny = 2\n")
    table = document["a"]
    assert isinstance(table, Table)
    assert [key.key for key, _ in table.value.body if key is not None] == ["x", "y"]
    table.value._insert_after("x", "z", tomlkit.item(3))
    comment = table.value.body[0][1].trivia.comment
    table.value.body[0] = (None, Comment(Trivia(comment=comment)))
    assert tomlkit.dumps(document) == "[a]\n# why\nz = 3\ny = 2\n"


def test_uvicorn_has_the_server_methods_that_shoal_overrides() -> None:
    assert has_methods(uvicorn.Server, "capture_signals", "startup", "main_loop", "on_tick")
    assert inspect.signature(uvicorn.Server.startup) == inspect.signature(uvicorn.Server.serve)
    assert list(inspect.signature(uvicorn.Server.on_tick).parameters) == ["self", "counter"]


def test_uvicorn_has_what_the_fileservers_connections_use() -> None:
    assert has_methods(
        HttpToolsProtocol,
        *("connection_made", "connection_lost", "data_received", "eof_received", "pause_writing", "resume_writing"),
        *("on_headers_complete", "on_body", "on_message_complete", "on_response_complete", "_start_asgi_task"),
        *("_unset_keepalive_if_required", "timeout_keep_alive_handler"),
    )
    assert attributes(HttpToolsProtocol) >= {
        *("client", "connections", "cycle", "flow", "headers", "loop", "parser", "server_state", "transport"),
        *("timeout_keep_alive", "timeout_keep_alive_task"),
    }
    assert "url" in attributes(HttpToolsProtocol, "on_message_begin")
    assert attributes(RequestResponseCycle) >= {
        *("scope", "disconnected", "keep_alive", "response_started", "response_complete"),
        *("chunked_encoding", "expected_content_length"),
    }
    assert attributes(FlowControl) >= {"write_paused"} and inspect.iscoroutinefunction(FlowControl.drain)
    assert "default_headers" in attributes(ServerState)
