"""The models of this node's store: incomplete ones, corrupt blobs, and nodes that sealed such blobs. Pure."""

from __future__ import annotations

from shoal_cli.doctor.finding import Finding, join_names, or_ok
from shoal_common.messages.storage import StorageState
from shoal_common.units import format_count

CHECK = "models"


def check(node: str, state: StorageState | None) -> list[Finding]:
    """Return what is wrong with them. `state` is what storage publishes; None where it does not run."""
    if state is None:
        return [Finding(CHECK, "skipped", "not checked: storage does not run, or NATS cannot be reached")]
    wrong = [
        Finding(CHECK, "problem", f"{model} is incomplete", f"`shoal repair {model} --node {node}` repairs it", model)
        for model in state.incomplete
    ]
    if state.quarantined:
        blobs = join_names([f"{blob[:16]}…" for blob in state.quarantined])
        what = f"{format_count(len(state.quarantined), 'corrupt blob')} in quarantine: {blobs}"
        remedy = "`shoal repair` downloads them again; a disk that keeps corrupting files is failing"
        wrong.append(Finding(CHECK, "warning", what, remedy))
    for sealer in state.distrusted_sealers:
        what = f"the seals of node {sealer} do not count here: it sealed a corrupt blob"
        remedy = f"check the disk and the memory of node {sealer}; docs/transfer.md says how to trust it again"
        wrong.append(Finding(CHECK, "warning", what, remedy, f"node {sealer}"))
    return or_ok(CHECK, wrong, f"{format_count(state.model_count, 'model')}, none incomplete")
