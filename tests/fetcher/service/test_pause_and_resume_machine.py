"""People pause, resume, cancel, delete and pull in any order, while services die and the hub comes and goes.

Real services on two nodes, a real hub. Checked after every step: the published state of each download agrees with a
person's last command, commands that waited for it are answered, nothing is requested from the hub for a paused
download, and nothing is left of a cancelled one. At the end everything is resumed, and every byte has its right hash.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from contextlib import AsyncExitStack

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from shoal_common.bus import subjects
from shoal_common.bus.keys import done_key, download_key
from shoal_common.messages.downloads import ENDED_PHASES, DownloadRequest, DownloadState
from shoal_common.messages.envelope import Outcome
from shoal_common.store.bitmap import LEAF_BYTES
from shoal_demo.faults import Faults, UnavailableFault
from tests.fetcher.hub_repos import noise
from tests.fetcher.pull_site import Pulls, Site, blobs, check_store, partials
from tests.harness.waiting import eventually

EXAMPLES, STEPS = 5, 14
NODES = st.sampled_from(["a", "b"])
SLOWLY = Faults(bytes_per_s=LEAF_BYTES)
GONE = Faults(unavailable=UnavailableFault(times=None))
TIMEOUT_S = 60.0
_examples = itertools.count()


class Person:
    """The last command to one node."""

    def __init__(self) -> None:
        self.word = "nothing"
        """`nothing`, `pull` (or resume), `pause`; after it has ended, or was cancelled, `nothing` again."""
        self.pulls: list[str] = []
        """Ids of pulls that have no answer yet."""
        self.sources: dict[str, int] = {}
        """Bytes received by source when it was paused."""


def make_machine(site: Site) -> type[RuleBasedStateMachine]:
    """Return a state machine over these services."""

    earlier: list[str] = []

    class PauseMachine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.runner, self.stack = asyncio.Runner(), AsyncExitStack()
            self.here: Pulls = self.runner.run(self.stack.enter_async_context(site.join()))
            self.model = f"{site.repo}-{next(_examples)}"
            self.files = {
                "model.safetensors": noise(3 * LEAF_BYTES + 5, self.model),
                "config.json": noise(300, self.model + "c"),
            }
            site.make(self.files, self.model)
            self.people = {"a": Person(), "b": Person()}
            self.gone = False

        @initialize()
        def begin(self) -> None:
            site.hub.set_faults(SLOWLY)
            # What a failed example has left must not fail the next one.
            for model in earlier:
                for node in self.people:
                    self.runner.run(self.here.delete(node, model))
            earlier.append(self.model)

        # Commands

        @rule(node=NODES)
        def pull(self, node: str) -> None:
            self.runner.run(self._pull(node))

        @rule(node=NODES, fetched_bytes=st.sampled_from([0, 1, LEAF_BYTES]))
        def pause(self, node: str, fetched_bytes: int) -> None:
            self.runner.run(self._until(node, fetched_bytes))
            self.runner.run(self._pause(node))

        @rule(node=NODES)
        def resume(self, node: str) -> None:
            self.runner.run(self._resume(node))

        @rule(node=NODES, verb=st.sampled_from(["cancel", "delete"]))
        def cancel_or_delete(self, node: str, verb: str) -> None:
            self.runner.run(self._cancel_or_delete(node, verb))

        @rule(node=NODES, verbs=st.lists(st.sampled_from(["pause", "resume", "cancel"]), min_size=2, max_size=4))
        def send_concurrently(self, node: str, verbs: list[str]) -> None:
            self.runner.run(self._send_concurrently(node, verbs))

        # Failures

        @rule(node=NODES, service=st.sampled_from(["fetcher", "storage"]))
        def kill_service(self, node: str, service: str) -> None:
            self.runner.run(site[node].restart(self.here.here, service))
            self.runner.run(self._check())

        @precondition(lambda self: not self.gone)
        @rule()
        def stop_hub(self) -> None:
            self.gone = True
            site.hub.set_faults(GONE)

        @precondition(lambda self: self.gone)
        @rule()
        def start_hub(self) -> None:
            self.gone = False
            site.hub.set_faults(SLOWLY)
            self.runner.run(self._check())

        def teardown(self) -> None:
            try:
                self.runner.run(self._run_to_completion())
                self.runner.run(self.stack.aclose())
            finally:
                self.runner.close()

        # Implementation

        async def _send(self, node: str, verb: str, service: str = "fetcher") -> Outcome:
            # With an id of its own: of identical commands the first one answers for all.
            body, identity = json.dumps({"model": self.model}).encode(), self._new_id(node)
            outcome = await self.here.ask(node, verb, body, identity, service)
            assert outcome.ok, outcome.error
            return outcome

        def _new_id(self, node: str) -> str:
            return f"{self.model.replace('/', '-')}-{node}-{next(_examples)}"

        async def _pull(self, node: str) -> None:
            person = self.people[node]
            person.pulls.append(identity := self._new_id(node))
            await self.here.here.client.publish(
                subjects.command("fetcher", node, "download"),
                json.dumps({"model": self.model}).encode(),
                headers={"Nats-Msg-Id": identity},
            )

            async def received() -> bool:
                request = await self._request(node)
                return (request is not None and identity in request.commands) or await self._answer(
                    identity
                ) is not None

            await eventually(received, "the pull has been heard", TIMEOUT_S)
            person.word = "pull"
            await self._check()

        async def _until(self, node: str, fetched_bytes: int) -> None:
            if self.people[node].word != "pull" or self.gone:
                return
            await self.here.state(
                node, lambda s: s.done_bytes >= fetched_bytes or s.phase in ENDED_PHASES, self.model, TIMEOUT_S
            )

        async def _pause(self, node: str) -> None:
            person = self.people[node]
            now = (await self._send(node, "pause")).result["models"][self.model]
            if now in ("paused", "was_paused"):
                assert person.word != "nothing" and (now == "paused" or person.word == "pause")
                person.word = "pause"
            else:
                assert now in ("unknown", *ENDED_PHASES) and person.word != "pause", now
                person.word = "nothing"
            await self._answered(node)
            state = await self.here.state_now(node, self.model)
            person.sources = state.sources if state else {}
            await self._check()

        async def _resume(self, node: str) -> None:
            person = self.people[node]
            now = (await self._send(node, "resume")).result["models"][self.model]
            expected = {
                "pause": ("resumed",),
                "pull": ("under_way", *ENDED_PHASES),
                "nothing": ("unknown", *ENDED_PHASES),
            }
            assert now in expected[person.word], (now, person.word)
            if person.word == "pause":
                person.word = "pull"
            await self._check()

        async def _cancel_or_delete(self, node: str, verb: str) -> None:
            await self._send(node, verb, "storage" if verb == "delete" else "fetcher")
            self.people[node].word = "nothing"
            await self._answered(node)
            assert await self._request(node) is None
            state = await self.here.state_now(node, self.model)
            assert state is None or (verb == "cancel" and state.phase == "ready"), state
            await self._check()

        async def _send_concurrently(self, node: str, verbs: list[str]) -> None:
            person = self.people[node]
            await asyncio.gather(*(self._send(node, verb) for verb in verbs))
            if person.word != "nothing":
                # The order of arrival is not known here: the stored request tells, and everything else must agree
                # with it.
                request = await self._request(node)
                person.word = "nothing" if request is None else "pause" if request.paused else "pull"
                state = await self.here.state_now(node, self.model)
                person.sources = state.sources if state else {}
            await self._check()

        async def _request(self, node: str) -> DownloadRequest | None:
            return await self.here.buckets.spec.get_as(download_key(node, self.model), DownloadRequest)

        async def _answer(self, identity: str) -> Outcome | None:
            return await self.here.buckets.done.get_as(done_key(identity), Outcome)

        async def _answered(self, node: str) -> None:
            """Require that the commands that waited for the download are answered."""
            person = self.people[node]
            for identity in person.pulls:
                outcome = await eventually(lambda i=identity: self._answer(i), "the pull has its answer", TIMEOUT_S)  # type: ignore[misc]  # mypy cannot infer it
                assert outcome.ok or (outcome.error is not None and outcome.error.code != "expired")
            person.pulls.clear()

        async def _check(self) -> None:
            for node, person in self.people.items():

                async def agrees(node: str = node, person: Person = person) -> bool:
                    request, state = await self._request(node), await self.here.state_now(node, self.model)
                    phase = state.phase if state else "unknown"
                    if person.word == "pause":
                        # At once and always: not eventually.
                        assert request is not None and request.paused, (
                            "a pause outlasts everything but a person's word"
                        )
                        assert phase == "paused", phase
                        assert state is not None and state.sources == person.sources, "bytes moved while paused"
                        return True
                    if request is None:
                        person.word = "nothing"
                        return phase == "unknown" or phase in ENDED_PHASES
                    assert not request.paused
                    return phase not in ("unknown", "paused") and phase not in ENDED_PHASES

                await eventually(agrees, f"what is said of {node} agrees with its person", TIMEOUT_S)
            if all(person.word != "pull" for person in self.people.values()):
                gets = self._gets()
                await asyncio.gather(*(self._send(node, "pause") for node in ("a", "b")))
                assert self._gets() == gets, "something was asked of the hub for what nobody fetches"

        def _gets(self) -> int:
            return sum(site.gets(path, self.model) for path in self.files)

        async def _run_to_completion(self) -> None:
            site.hub.set_faults(Faults())
            for node, person in self.people.items():
                await self._check()
                if person.word == "nothing" and await self.here.state_now(node, self.model) is None:
                    assert not partials(site[node])
                    continue
                state: DownloadState = await self.here.pull_ok(node, self.model)
                assert state.phase == "ready"
                person.word = "nothing"  # also after a pause: the pull has ended it
                await self._answered(node)
                await self.here.assert_complete(node, self.files, self.model)
            for node in self.people:
                check_store(site[node])
                outcome = await self.here.delete(node, self.model)
                assert outcome.ok, outcome.error
                await self.here.nothing_is_left(node, self.model)
                assert not blobs(site[node])
            earlier.remove(self.model)

    return PauseMachine


def test_phases_agree_with_the_last_command_whatever_happens(site: Site) -> None:
    # Models of other tests would weaken "nothing is left".
    asyncio.run(_emptied(site))
    run_state_machine_as_test(
        make_machine(site),
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


async def _emptied(site: Site) -> None:
    async with site.join() as here:
        for node in site.nodes.values():
            for path in node.layout.manifests.glob("*"):
                repo = path.name.replace("--", "/", 1)
                outcome = await here.delete(node.id, repo)
                assert outcome.ok, outcome.error
            body = b"{}"
            assert (await here.ask(node.id, "gc", body, service="storage")).ok
