"""The words of `state_machine.py`: what a download may have to do (actions), and what may happen to it (events)."""

from __future__ import annotations

import msgspec

from shoal_common.errors import ErrorBody, Paused, ShoalError
from shoal_common.messages.downloads import DownloadRequest, DownloadState


class Action(msgspec.Struct, frozen=True):
    """Something to do, in the order of a transition's actions."""


class Work(Action, frozen=True):
    """Takes long, and StopWork ends it. Ends as one of its events; at most one runs."""


class Wait(Work, frozen=True):
    """Do nothing for a while. Ends as WaitOver."""

    seconds: float


class Resolve(Work, frozen=True):
    """Find out what the files are. Ends as Resolved or WorkFailed."""


class ReserveSpace(Work, frozen=True):
    """Have storage reserve what is missing. Ends as Reserved or WorkFailed."""

    again: bool = False
    """What was reserved and fetched before may be gone."""


class Fetch(Work, frozen=True):
    """Fetch what is missing of what is reserved. Ends as Fetched or WorkFailed."""


class Seal(Work, frozen=True):
    """Have storage verify what has arrived. Ends as Sealed or WorkFailed."""


class AskForSpace(Work, frozen=True):
    """Ask storage for free space, when the disk changes or after a while. Ends as SpaceFree or SpaceShort."""

    after_s: float
    blob: str
    """The partial blob that could not be written, or ""."""


class Record(Action, frozen=True):
    """A change of what is stored. Runs to its end before anything else is handled; ends as its event or NotStored."""


class StoreRequest(Record, frozen=True):
    """Store a request for these layers. Ends as RequestStored."""

    command: str
    layers: list[list[int]]
    force: bool = False
    """Also a model in a format that cannot run here."""


class StorePause(Record, frozen=True):
    """Store in the request that it is paused, and answer `error` to whoever waits. Ends as PauseStored."""

    error: Paused


class StoreResume(Record, frozen=True):
    """Store in the request that it is not paused. Ends as ResumeStored."""


class RemoveRequest(Record, frozen=True):
    """Delete the request, and answer whoever waits that it was cancelled. Ends as RequestRemoved."""


class StoreEnd(Record, frozen=True):
    """Publish the end, delete the request, answer whoever waits. Ends as EndStored."""

    release: bool = False
    """Nothing durable has arrived: release the reservation as well."""


class Discard(Record, frozen=True):
    """Release the reservation, and delete the published state. Ends as Discarded."""


class StoreAgain(Record, frozen=True):
    """Store the request and the state again. Ends as StoredAgain."""


class StopWork(Action, frozen=True):
    """Stop the work under way, and return when it has stopped. It ends as no event."""


class Begin(Action, frozen=True):
    """Begin a new attempt, with what is on the disk."""

    forget_sources: bool
    """The attempt before has ended: its figures are not continued."""


class Publish(Action, frozen=True):
    """Publish the state now. If that fails it is repeated, and nothing waits for it."""


class EmitPaused(Action, frozen=True):
    """Emit `download_paused`."""


class FailWork(Action, frozen=True):
    """Let the work that has reported this end with this error."""

    error: ShoalError


class Answer(Action, frozen=True):
    """Answer the command."""

    text: str = ""


class Refuse(Action, frozen=True):
    """Answer the command with an error."""

    error: ShoalError


class DownloadEvent(msgspec.Struct, frozen=True):
    """Something that has happened."""


class Found(DownloadEvent, frozen=True):
    """The first event: what NATS has of this download, of this process or an earlier one."""

    request: DownloadRequest | None
    state: DownloadState | None


class DownloadRequested(DownloadEvent, frozen=True):
    """A command asks for these layers, or for all."""

    command: str
    layers: list[list[int]]
    keep_paused: bool = False
    force: bool = False


class PauseRequested(DownloadEvent, frozen=True):
    """A command asks for a pause."""


class ResumeRequested(DownloadEvent, frozen=True):
    """A command asks for the end of a pause."""


class CancelRequested(DownloadEvent, frozen=True):
    """A command asks to cancel, or to discard what a failed download left."""

    deletes_model: bool = False
    """Storage is about to delete the model: a download that is ready is forgotten as well."""


class StoreWiped(DownloadEvent, frozen=True):
    """NATS has lost what was stored."""


class RequestStored(DownloadEvent, frozen=True):
    """The request is stored, now for these layers."""

    layers: list[list[int]]


class PauseStored(DownloadEvent, frozen=True):
    """The pause is stored."""


class ResumeStored(DownloadEvent, frozen=True):
    """The end of the pause is stored, in a request for these layers."""

    layers: list[list[int]]


class RequestRemoved(DownloadEvent, frozen=True):
    """The request is deleted: the download is cancelled."""


class EndStored(DownloadEvent, frozen=True):
    """The end is stored."""


class Discarded(DownloadEvent, frozen=True):
    """Nothing of it is left."""


class StoredAgain(DownloadEvent, frozen=True):
    """The request and the state are stored again."""


class NotStored(DownloadEvent, frozen=True):
    """The record that was under way failed."""

    error: ShoalError


class WaitOver(DownloadEvent, frozen=True):
    """The wait has ended."""


class Resolved(DownloadEvent, frozen=True):
    """The files are known; these layers are fetched, or all."""

    layers: list[list[int]]


class Reserved(DownloadEvent, frozen=True):
    """What is missing is reserved."""

    is_whole_model: bool = False
    """Some layers were to be reserved, and the whole model is present."""


class Fetched(DownloadEvent, frozen=True):
    """What was reserved is present."""

    has_more: bool = False
    """It names more that is needed."""


class Sealed(DownloadEvent, frozen=True):
    """Storage has verified all of it."""


class SpaceFree(DownloadEvent, frozen=True):
    """Nothing is known to block the download any more."""


class SpaceShort(DownloadEvent, frozen=True):
    """The disk is still full, or storage does not say."""

    error: ErrorBody | None


class WorkFailed(DownloadEvent, frozen=True):
    """The work under way failed."""

    error: ShoalError
    done_bytes: int
    """Bytes that are durable."""
    may_retry: bool = True
    """False: the hub is switched off."""


class SourceWaiting(DownloadEvent, frozen=True):
    """What a source is waited for; "": it sends again."""

    reason: str


class ProgressStalled(DownloadEvent, frozen=True):
    """No leaf has become durable for a while, waits that do not count left out."""

    path: str
    stalled_s: float
    reason: str
