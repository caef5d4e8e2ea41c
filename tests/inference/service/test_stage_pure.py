"""The pure parts of a stage, without a process or a socket."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_common.errors import PromptTooLong
from shoal_common.messages.generation import Generate, TokenEvent
from shoal_inference.stage import errors
from shoal_inference.stage.compute import prefill
from shoal_inference.stage.compute.engine import from_hidden, step_seed, to_hidden
from shoal_inference.stage.ipc import messages
from shoal_inference.stage.ipc.blas import child_environment
from shoal_inference.stage.ring import handshake
from shoal_inference.stage.ring.frames import (
    HEADER_BYTES,
    ITEM_BYTES,
    MAGIC,
    Dtype,
    Flag,
    Kind,
    decode_header,
    encode_frame,
    make_frame,
    ring_tag,
)

STAGE = Path(errors.__file__).parent
DOCS = Path(__file__).parents[3] / "docs" / "wire-activations.md"


@given(
    kind=st.sampled_from(Kind),
    dtype=st.sampled_from(Dtype),
    flags=st.sampled_from([Flag.NONE, Flag.SAMPLE, Flag.FINISHED]),
    seq=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 33)),
    request=st.binary(min_size=16, max_size=16),
    meta=st.binary(max_size=200),
)
def test_a_frame_survives_a_round_trip(
    kind: Kind, dtype: Dtype, flags: Flag, seq: int, shape: tuple[int, int, int], request: bytes, meta: bytes
) -> None:
    payload = bytes(shape[0] * shape[1] * shape[2] * ITEM_BYTES[dtype])
    frame = make_frame(
        kind,
        ring_tag("i", 1),
        request,
        seq=seq,
        flags=flags,
        dtype=dtype,
        shape=shape,
        meta=meta,
        payload=payload,
    )
    data = encode_frame(frame)
    assert decode_header(data[:HEADER_BYTES]) == frame.header
    assert data[HEADER_BYTES:] == meta + payload


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES), st.booleans())
def test_any_64_bytes_are_a_header_or_a_bad_frame(data: bytes, with_magic: bool) -> None:
    if with_magic:
        data = MAGIC + b"\x01" + data[5:]
    try:
        header = decode_header(data)
    except errors.BadFrame:
        return
    assert header.payload_bytes == header.batch * header.tokens * header.width * ITEM_BYTES[header.dtype]


def test_the_documented_sample_is_what_the_code_writes() -> None:
    frame = make_frame(
        Kind.HIDDEN,
        ring_tag("i1", 3),
        bytes(range(16)),
        seq=2,
        flags=Flag.SAMPLE,
        dtype=Dtype.BF16,
        shape=(1, 1, 4),
        payload=bytes.fromhex("803f0040403f80bf"),
    )
    documented = DOCS.read_text().split("```hex")[1].split("```")[0]
    digits = "".join(line.split("|")[0] for line in documented.strip().splitlines())
    assert bytes.fromhex(digits) == encode_frame(frame)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_a_hidden_state_crosses_bit_by_bit(dtype: mx.Dtype) -> None:
    h = mx.random.normal((1, 5, 24), key=mx.random.key(1)).astype(dtype).transpose(0, 2, 1)
    back = from_hidden(to_hidden(h))
    assert back.dtype == dtype
    assert mx.array_equal(back, h).item()


def place(**changes: Any) -> handshake.RingPlace:
    rank = changes.get("rank", 0)
    secrets = {"successor_secret": b"%d" % rank, "predecessor_secret": b"%d" % ((rank - 1) % 3)}
    return handshake.RingPlace(**{"instance": "i1", "epoch": 1, "rank": rank, "stages": 3, **secrets, **changes})


def test_neighbours_with_the_secret_authenticate_each_other() -> None:
    nonce, own = bytes(32), bytes([1]) * 32
    hello = handshake.hello(place(), nonce, own)
    assert handshake.check_hello(place(rank=1), nonce, hello[2:]) == own
    handshake.check_welcome(place(), nonce, own, handshake.welcome(place(rank=1), nonce, own))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"successor_secret": b"other"}, "proof"),
        ({"successor_secret": b"2"}, "proof"),
        ({"epoch": 2}, "epoch"),
        ({"instance": "i2"}, "instance"),
        ({"rank": 1}, "rank"),
        ({"rank": 2}, "rank"),
    ],
)
def test_strangers_are_refused_and_distinguished_in_the_log(changes: dict[str, Any], expected: str) -> None:
    hello = handshake.hello(place(**changes), bytes(32), bytes(32))
    with pytest.raises(errors.HandshakeRefused, match=expected):
        handshake.check_hello(place(rank=1), bytes(32), hello[2:])


@pytest.mark.parametrize("body", [b'{"instance":"\x80"}', b'{"x":' + b"[" * 4000, b"", b"[1]", b"\xff"])
def test_a_hello_that_does_not_decode_is_refused(body: bytes) -> None:
    with pytest.raises(errors.HandshakeRefused, match="does not decode"):
        handshake.check_hello(place(rank=1), bytes(32), body)


def test_a_hello_recorded_earlier_does_not_match_a_fresh_nonce() -> None:
    hello = handshake.hello(place(), bytes(32), bytes(32))
    with pytest.raises(errors.HandshakeRefused, match="proof"):
        handshake.check_hello(place(rank=1), bytes([9]) * 32, hello[2:])


def test_a_listener_without_the_secret_gets_no_hidden_states() -> None:
    forged = handshake.welcome(place(rank=1, predecessor_secret=b"other"), bytes(32), bytes(32))
    with pytest.raises(errors.HandshakeRefused, match="welcome"):
        handshake.check_welcome(place(), bytes(32), bytes(32), forged)


@given(st.integers(1, 200), st.integers(1, 50))
def test_prefill_steps_cover_the_prompt_and_sample_once(count: int, chunk: int) -> None:
    steps = list(prefill.steps(count, chunk))
    assert [token for s in steps for token in range(s.start, s.stop)] == list(range(count))
    assert [s.sample for s in steps] == [False] * (len(steps) - 1) + [True]
    assert (steps[-1].start, steps[-1].stop) == (count - 1, count)
    assert all(0 < s.stop - s.start <= chunk for s in steps)


@given(
    prompt=st.integers(1, 40),
    answered=st.integers(0, 40),
    max_tokens=st.integers(1, 60),
    context=st.integers(1, 60),
)
def test_an_admitted_answer_never_outgrows_the_context(
    prompt: int, answered: int, max_tokens: int, context: int
) -> None:
    ask = Generate(instance="i", request="r", max_tokens=max_tokens, generated_tokens=[1] * answered)
    try:
        plan = prefill.admit(ask, (1,) * prompt, context_tokens=context, vocabulary=5, stop_token_ids=())
    except PromptTooLong:
        assert prompt >= context
        return
    assert plan.prompt_tokens + plan.max_tokens <= context
    assert 1 <= plan.max_tokens <= max_tokens
    assert (plan.ended == "length") == (answered >= plan.max_tokens)


def test_a_tokens_seed_depends_on_its_index_alone() -> None:
    assert len({step_seed(5, index) for index in range(100)}) == 100
    assert step_seed(5, 3) == step_seed(5, 3)


def test_a_line_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(msgspec.MsgspecError):
        messages.decode_to_child(b'{"type":"no-such"}')


def test_a_line_is_a_message_whatever_the_text_holds() -> None:
    message = messages.RequestEvent(event=TokenEvent(request="r", token=1, text='a\nb\r"\u2028'))
    line = messages.encode_line(message)
    assert line.count(b"\n") == 1
    assert messages.decode_from_child(line) == message


def test_mlx_lm_is_called_in_one_module_only() -> None:
    imports = re.compile(r"^\s*(?:from|import) mlx_lm\b", re.MULTILINE)
    callers = [path.name for path in STAGE.rglob("*.py") if imports.search(path.read_text())]
    assert callers == ["mlx_lm_adapter.py"]


def test_a_child_is_given_openblas_where_there_is_one(tmp_path: Path) -> None:
    library = tmp_path / "openblas-pthread" / "libopenblas.so.0"
    library.parent.mkdir()
    library.touch()
    env = child_environment({"A": "1"}, platform="linux", directories=[library.parent])
    assert env == {"A": "1", "LD_PRELOAD": str(library), "OPENBLAS_NUM_THREADS": "1"}


def test_a_child_keeps_its_environment_where_no_openblas_is_used(tmp_path: Path) -> None:
    (tmp_path / "libopenblas.so.0").touch()
    reference = tmp_path / "reference"
    reference.mkdir()
    (reference / "libblas.so.3").touch()
    assert child_environment({}, platform="linux", directories=[reference]) == {}
    assert child_environment({}, platform="darwin", directories=[tmp_path]) == {}
    chosen = {"LD_PRELOAD": "/opt/libblas-mine.so"}
    assert child_environment(chosen, platform="linux", directories=[tmp_path]) == chosen
