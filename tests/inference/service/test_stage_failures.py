"""Stages that die, stop, hang or are attacked: which errors appear, and what works afterwards."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from pathlib import Path
from time import monotonic
from typing import Any

import psutil
import pytest

from shoal_common.errors import ErrorBody
from shoal_inference.stage.ipc.messages import Fatal, Linked, Listening, Start, Unlinked
from shoal_inference.stage.ipc.parent import StageProcess
from shoal_inference.stage.ring import handshake
from shoal_inference.stage.ring.frames import Kind, encode_frame, make_frame, ring_tag
from tests.harness.identities import Authority
from tests.harness.process import checked_run, source_path
from tests.inference.service.conftest import Models, Rings, Run
from tests.inference.stage_ring import SECRETS, Child, RingOfStages

PROMPT = (7, 21, 40, 3, 99, 250, 8, 12, 77, 5, 64)
LONG = 450
NOTICED_WITHIN_S = 10.0
START_DEADLINE_S = 45.0


def test_I6_I11_a_killed_middle_stage_is_replaced_and_answers(models: Models, own_ring: Rings, run: Run[Any]) -> None:
    ring = own_ring(models("llama"), (0, 2, 4, 6))
    whole = [t.token for t in run(ring.generate(PROMPT, LONG))]

    async def killed() -> tuple[list[int | None], float]:
        request = await ring.ask(PROMPT, LONG)
        await ring.token(request, 5)
        ring.signal(1, signal.SIGKILL)
        killed_s = monotonic()
        for rank in (0, 2):
            failed = await ring.failure(request, rank)
            assert failed.code == "stage_lost"
            # Either neighbour may notice first; rank 0 may then get rank 2's error message.
            assert "of instance i1 lost rank 1 (" in failed.message
            unlinked = await ring.children[rank].wait(Unlinked)
            assert unlinked.rank == 1
        took_s = monotonic() - killed_s
        tokens = [token.token for token in ring.tokens(request)]
        return tokens, took_s

    tokens, took_s = run(killed())
    assert took_s < NOTICED_WITHIN_S
    run(ring.respawn(1))
    rest = run(ring.generate(PROMPT, LONG, generated_tokens=tokens))
    assert tokens + [t.token for t in rest] == whole
    run(ring.check_idle())


def test_without_a_link_a_request_fails_at_once(models: Models, own_ring: Rings, run: Run[Any]) -> None:
    ring = own_ring(models("llama"), (0, 3, 6))

    async def alone() -> str:
        ring.signal(1, signal.SIGKILL)
        await ring.children[0].wait(Unlinked)
        return (await ring.failure(await ring.ask(PROMPT, 5))).code

    assert run(alone()) == "stage_lost"


def test_a_stopped_stage_times_the_request_out_and_recovers(models: Models, own_ring: Rings, run: Run[Any]) -> None:
    ring = own_ring(models("llama"), (0, 3, 6), step_timeout_s=1.0)

    async def stopped() -> str:
        request = await ring.ask(PROMPT, LONG)
        await ring.token(request, 5)
        ring.signal(1, signal.SIGSTOP)
        try:
            failed = await ring.failure(request)
        finally:
            ring.signal(1, signal.SIGCONT)
        assert request in failed.message
        return failed.code

    assert run(stopped()) == "expired"
    run(ring.check_idle())
    assert len(run(ring.generate(PROMPT, 5))) == 5


def test_a_stage_forgets_a_request_whose_frames_stop_coming(models: Models, own_ring: Rings, run: Run[Any]) -> None:
    # The test plays the predecessor: it opens a request and then sends nothing more.
    ring = own_ring(models("llama"), (0, 3, 6), idle_limit_s=0.4)

    async def abandoned() -> str:
        child = ring.children[1]
        ring.signal(0, signal.SIGKILL)
        await child.wait(Unlinked)
        code = "stage_lost"
        # The link to rank 0, which also is the next stage here, may be found lost a moment after the one from it.
        for request in ("left", "again"):
            if code == "stage_lost":
                _reader, writer = await greet(child, place(rank=0))
                meta = f'{{"request":"{request}","first_index":0,"max_tokens":5,"temperature":0.0,'
                meta += '"top_p":1.0,"seed":1,"generated":[]}'
                opening = make_frame(Kind.OPEN, ring_tag("i1", 3), bytes(16), meta=meta.encode())
                writer.write(encode_frame(opening))
                code = (await ring.failure(request, rank=1)).code
        assert (await child.stats()).sessions == 0
        writer.close()
        return code

    assert run(abandoned()) == "expired"


def test_a_ring_inside_tls_answers_alike_and_links_again(
    models: Models, own_ring: Rings, run: Run[Any], tmp_path: Path
) -> None:
    plain = [t.token for t in run(own_ring(models("llama"), (0, 3, 6)).generate(PROMPT, 30))]
    ring = own_ring(models("llama"), (0, 3, 6), authority=Authority(tmp_path))
    assert [t.token for t in run(ring.generate(PROMPT, 30))] == plain
    run(ring.children[1].process.stop())
    run(ring.respawn(1))
    assert [t.token for t in run(ring.generate(PROMPT, 30))] == plain


def test_a_moved_neighbour_is_followed(models: Models, own_ring: Rings, run: Run[Any]) -> None:
    ring = own_ring(models("llama"), (0, 3, 6))
    first_port = run(ring.children[1].wait(Listening)).port
    run(ring.children[1].process.stop())
    run(ring.respawn(1))
    assert run(ring.children[1].wait(Listening)).port != first_port
    assert len(run(ring.generate(PROMPT, 5))) == 5


def place(*, rank: int, secret: bytes = SECRETS[0], epoch: int = 3) -> handshake.RingPlace:
    return handshake.RingPlace(
        instance="i1", epoch=epoch, rank=rank, stages=2, successor_secret=secret, predecessor_secret=SECRETS[1]
    )


async def greet(child: Child, who: handshake.RingPlace) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to a stage as its predecessor, as far as the stage allows."""
    port = (await child.wait(Listening)).port
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    nonce = handshake.read_challenge(await reader.readexactly(handshake.CHALLENGE_BYTES))
    writer.write(handshake.hello(who, nonce, bytes(32)))
    if who.successor_secret == SECRETS[0] and who.epoch == 3:
        await reader.readexactly(handshake.PROOF_BYTES)
    return reader, writer


async def is_closed(reader: asyncio.StreamReader) -> bool:
    try:
        return await reader.read() == b""
    except ConnectionResetError:
        return True


@pytest.fixture(scope="module")
def besieged(models: Models, shared_rings: Rings) -> RingOfStages:
    return shared_rings(models("llama"), (0, 3, 6))


@pytest.mark.parametrize(
    "who",
    [place(rank=0, secret=b"guessed"), place(rank=0, secret=SECRETS[1]), place(rank=0, epoch=2)],
    ids=["wrong-secret", "secret-of-another-link", "old-epoch"],
)
def test_I12_a_stranger_is_refused_and_the_ring_stays_linked(
    who: handshake.RingPlace, besieged: RingOfStages, run: Run[Any]
) -> None:
    async def refused() -> None:
        before = (await besieged.children[1].stats()).refused_connections
        reader, writer = await greet(besieged.children[1], who)
        assert await is_closed(reader)
        writer.close()
        assert (await besieged.children[1].stats()).refused_connections == before + 1

    run(refused())
    assert len(run(besieged.generate(PROMPT, 4))) == 4


@pytest.mark.parametrize(
    "sent",
    [
        *[b"GET / HTTP/1.1\r\n\r\n", b"\xff\xff" + b"x" * 64, b"\x04\x00"],
        *[b'\x10\x00{"instance":"\x80"}', b"\xa0\x0f" + b'{"x":' + b"[" * 3995],
    ],
)
def test_bytes_that_are_no_hello_are_refused(sent: bytes, besieged: RingOfStages, run: Run[Any]) -> None:
    async def refused() -> None:
        port = (await besieged.children[0].wait(Listening)).port
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await reader.readexactly(handshake.CHALLENGE_BYTES)
        writer.write(sent)
        writer.write_eof()
        assert await is_closed(reader)
        writer.close()

    run(refused())
    assert len(run(besieged.generate(PROMPT, 4))) == 4


def hostile_frames() -> dict[str, bytes]:
    good = encode_frame(make_frame(Kind.END, ring_tag("i1", 3), bytes(16)))
    return {
        "bad-magic": b"HTTP" + good[4:],
        "other-version": good[:4] + b"\x09" + good[5:],
        "other-ring": encode_frame(make_frame(Kind.END, ring_tag("i1", 2), bytes(16))),
        "huge-payload": good[:48] + (1 << 60).to_bytes(8, "little") + good[56:],
        "huge-meta": good[:44] + b"\xff\xff\xff\xff" + good[48:],
        "truncated": good[:30],
    }


@pytest.mark.parametrize("name", hostile_frames())
def test_a_hostile_frame_closes_only_its_connection(name: str, besieged: RingOfStages, run: Run[Any]) -> None:
    # With the secret this connection replaces the real predecessor's, which then reconnects by itself.
    async def attacked() -> None:
        child = besieged.children[1]
        reader, writer = await greet(child, place(rank=0))
        writer.write(hostile_frames()[name])
        if name == "truncated":
            writer.write_eof()
        assert await is_closed(reader)
        writer.close()
        # Both connections are up again when a request succeeds; until then it is refused at once.
        while not await answered(besieged):
            pass

    run(attacked())


async def answered(ring: RingOfStages) -> bool:
    request = await ring.ask(PROMPT, 3)
    done = asyncio.create_task(ring.answer(request))
    failed = asyncio.create_task(ring.failure(request))
    await asyncio.wait({done, failed}, return_when=asyncio.FIRST_COMPLETED)
    ok = done.done()
    for task in (done, failed):
        task.cancel()
    await asyncio.gather(done, failed, return_exceptions=True)
    return ok


def test_the_child_exits_when_its_parent_is_gone(models: Models, run: Run[Any]) -> None:
    async def orphaned() -> int:
        async with await StageProcess.spawn() as process:
            child = Child(process, 0)
            await process.send(RingOfStages(models("llama"), (0, 6)).start_for(0))
            await child.wait(Listening)
            process._writer.close()  # as the kernel does when the parent dies
            return await process.wait()

    assert run(orphaned()) == 0


def test_a_stage_stopped_by_a_signal_is_killed_and_reaped(run: Run[Any]) -> None:
    async def stuck() -> int:
        process = await StageProcess.spawn()
        psutil.Process(process.pid).suspend()
        status = await process.stop(deadline_s=0.1)
        assert not psutil.pid_exists(process.pid)
        return status

    assert run(stuck()) == -signal.SIGKILL


def fatal_of(start: Start, run: Run[Any]) -> tuple[ErrorBody, int]:
    async def failed() -> tuple[ErrorBody, int]:
        async with await StageProcess.spawn() as process:
            await process.send(start)
            events = [event async for event in process]
            last = events[-1]
            assert isinstance(last, Fatal), events
            return last.error, await process.wait()

    result: tuple[ErrorBody, int] = run(failed())
    return result


def test_an_unsupported_architecture_is_named_with_the_supported(tmp_path: Path, run: Run[Any]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    fatal, status = fatal_of(RingOfStages(tmp_path, (0, 6)).start_for(0), run)
    assert (fatal.code, status) == ("unsupported", 1)
    assert "'mamba'" in fatal.message
    assert "llama" in fatal.message


def test_missing_weights_are_fatal_and_named(tmp_path: Path, models: Models, run: Run[Any]) -> None:
    for file in models("llama").iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    fatal, status = fatal_of(RingOfStages(tmp_path, (0, 6)).start_for(0), run)
    assert (fatal.code, status) == ("load_failed", 1)
    assert "safetensors" in fatal.message


def test_linked_is_sent_once_each_time_both_links_come_up(besieged: RingOfStages) -> None:
    kinds = [type(e) for e in besieged.children[1].events if isinstance(e, Linked | Unlinked)]
    assert kinds == [Linked, Unlinked] * (len(kinds) // 2) + [Linked] * (len(kinds) % 2)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills by a score")
def test_the_kernel_kills_a_stage_first_when_out_of_memory(besieged: RingOfStages) -> None:
    own = int(Path("/proc/self/oom_score_adj").read_text())
    for child in besieged.children:
        assert int(Path(f"/proc/{child.process.pid}/oom_score_adj").read_text()) > own


async def test_a_stage_imports_nothing_from_where_it_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("queue", "json", "mlx_lm"):
        (tmp_path / f"{module}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({module!r})\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f":{source_path()}")
    async with await StageProcess.spawn() as process:
        assert await process.stop(START_DEADLINE_S) == 1, (
            "it is up, and was told to stop before it had started anything"
        )
    assert not (tmp_path / "ran").exists()


def test_a_low_limit_of_files_stops_no_stage_and_stays() -> None:
    within = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 1000)); "
    imported = (
        "import shoal_inference.stage.compute.mlx_lm_adapter; print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    environment = {**os.environ, "PYTHONPATH": source_path()}
    done = checked_run(sys.executable, "-c", within + imported, timeout_s=60, environment=environment)
    assert done.stdout == "(256, 1000)\n"


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("generation_config.json", "[]", "generation_config.json holds a list, not an object"),
        ("config.json", "[]", "config.json holds a list, not an object"),
        ("config.json", "{", "config.json is no JSON"),
        ("tokenizer_config.json", "7", "tokenizer_config.json holds a int, not an object"),
        ("tokenizer.json", '{"version": "9.0", "model": {"type": "NewBPE"}}', "tokenizer.json, or a file beside it"),
    ],
)
def test_a_file_that_does_not_load_is_named_on_one_line(
    name: str, text: str, reason: str, models: Models, run: Run[Any], tmp_path: Path
) -> None:
    model_dir = tmp_path / "model"
    shutil.copytree(models("llama"), model_dir)
    (model_dir / name).write_text(text)
    error, _ = fatal_of(RingOfStages(model_dir, (0, 6)).start_for(0), run)
    assert error.code == "load_failed"
    assert reason in error.message and "\n" not in error.message and "see the stage's log" not in error.message
