"""Everything that crosses a process boundary, as msgspec structs.

`commands` change what people want, `records` are what the buckets hold, `questions` are asked and answered
between services, `facts` is what a liveness key says. Within v1 fields are only added, with a default; unknown
ones are ignored. Sizes are bytes, times are seconds since 1970, and names say so.
"""

from typing import Any, TypeVar, dataclass_transform

import msgspec

from shoal_common.errors import BadMessage

T = TypeVar("T")


class _KeywordOnly(msgspec.StructMeta):
    # msgspec does not hand `kw_only` down. Without it a new field with a default could only ever come last.
    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **config: Any) -> Any:
        return super().__new__(mcs, name, bases, namespace, **{"kw_only": True, **config})


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(msgspec.field,))
class Message(msgspec.Struct, frozen=True, omit_defaults=True, metaclass=_KeywordOnly):
    """Base of every message: immutable, additive, without the fields that hold their default."""


def encode(message: object) -> bytes:
    """A message as JSON."""
    return msgspec.json.encode(message)


def decode(data: bytes, kind: type[T]) -> T:
    """JSON as a message of this kind. Raises BadMessage, saying what is wrong where."""
    try:
        return msgspec.json.decode(data or b"{}", type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise BadMessage(f"this is not a {kind.__name__} message: {e}; see docs/protocol.md") from None
