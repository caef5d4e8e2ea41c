"""The longer words of `--help`: examples, and what `--json` prints."""

from __future__ import annotations

EXAMPLES = """examples:
  shoal up                                        run a node here; Ctrl-C stops it
  shoal up -d --max-storage 200GB                 in the background, with 200 GB for models at most
  shoal up --bind 0.0.0.0                         let other machines join; prints what to type there
  shoal pull mlx-community/Qwen3-0.6B-4bit --all  bring a model to every node
  shoal run mlx-community/Qwen3-0.6B-4bit         talk to it
  shoal run mlx-community/Qwen3-0.6B-4bit "Why do fish swim in shoals?"
  shoal status                                    nodes, disks, models, instances
  shoal doctor                                    what is wrong here, and what to do about it
  shoal storage set --max-storage 200GB --eviction-policy lru --all

environment:
  SHOAL_HOME      the node's directory (~/.shoal)     SHOAL_NATS    NATS servers to join, comma-separated
  SHOAL_GATEWAY   address of a gateway elsewhere      SHOAL_SECRET  the cluster's secret
  SHOAL_DEBUG=1   show traces of failures

exit codes:
  0 done   2 not understood   3 not found   4 refused   5 away or busy: try again
  6 credential missing   7 deadline passed   8 corrupt   9 already running
  10 another version   1 anything else   130 Ctrl-C
"""

AS_JSON = {
    "status": """--json prints GET /v1/status of the gateway as it is: {"node", "version",
"nats_connected", "nodes": [{"node", "live", "services": {name: {"version", "pid", "host", "uptime_s", "addresses"}},
"missing_services", "other_versions": {service: version},
"link", "memory_total_bytes", "memory_available_bytes", "storage": {…} or null}], "models": […],
"downloads": […], "instances": […]}. Fields are only ever added.""",
    "doctor": """It changes nothing, works while NATS or the node is down, and looks from this machine: run it on both
when two nodes do not reach each other. Exit code 0 when nothing is a problem, else 1.
--json prints {"home", "node", "version", "worst", "findings": [{"check", "level", "what", "remedy", "about"}]}; a
level is "ok", "skipped" (it could not be looked at; another finding says why), "warning" or "problem". Fields are
only ever added.""",
    "pull": """--json prints nothing until the download has ended on every node, then {"downloads": [{"node", "model",
"phase", "commit", "total_bytes", "done_bytes", "verified_bytes", "resumed_bytes", "sources": {source: bytes},
"source_speeds": {source: bytes per second}, "eta_s", "switched": {source: times}, "error", …}], "commands":
{node: id}}. The exit code is that of the first node that failed. Fields are only ever added.""",
    "models": """As `shoal ls`; see there for what --json prints.""",
    "ls": """With --fits --json prints {"models": [{"model", "size_bytes", "tier": "fits", "tight", "force" or "",
"preview": as `shoal place --preview` has it, or null, "why"}]}. Without,
--json prints {"models": [{"model", "repo", "commit", "nodes": [node], "size_bytes",
"adopted_from": {node: directory of a read-only root}}]}. Fields are only ever added.""",
    "storage": """--json prints the API's answer: show {"node", "nodes": [{"node", "live", "disk_free_bytes",
"storage": {…} or null}]}; set {"nodes": {node: {"max_storage_bytes", "eviction_policy", "headroom_bytes",
"partial_retention_s", "read_only_roots", "roots", the limits of `shoal transfer`, "used_bytes", "from_environment",
"note"}}}; plan {"nodes": {node:
{"need_bytes", "garbage", "garbage_bytes", "unfinished" and "victims": [{"model", "frees_bytes", "last_use_s"}],
"frees_bytes", "enough", "evictable_bytes", "kept"}}}; pin and unpin {"nodes": {node: {"models", "pinned"}}}. Fields
are only ever added.""",
    "transfer": """--json prints the API's answer: show {"node", "nodes": [{"node", "live", "storage": {…,
"max_upload_bytes_per_s", "max_hub_bytes_per_s", "max_peer_bytes_per_s", "from_environment"} or null}]}; set what
`shoal storage set --json` prints. RATE is bytes per second: 20MB, 500kB, none. Fields are only ever added.""",
    "pause": """--json prints {"model", "nodes": {node: {"models": {model: "paused", "was_paused", "unknown", or the
phase it has ended with}}}}. Fields are only ever added.""",
    "resume": """--json prints {"model", "nodes": {node: {"models": {model: "resumed", "under_way", "unknown", or the
phase it has ended with}}}}. Fields are only ever added.""",
    "cancel": """--json prints {"model", "nodes": {node: {"cancelled", "was"}}}. Fields are only ever added.""",
    "place": """--json prints the instance as GET /v1/instances/{id} has it; with --preview what GET
/v1/placements/preview answers: {"model", "context_tokens", "estimated", "previews": [{"layout", "tier",
"is_low_memory", "stages": [{"node", "first_layer", "last_layer", "needed_bytes", "available_bytes", "tight_bytes",
"total_bytes", "freeing_bytes", "link_s", "link_measured"}], "tokens_per_s", "first_token_s", "fetch_bytes"}]}. Fields
are only ever added.""",
    "rebalance": """Nothing moves by itself. --json prints {"rebalances": [{"instance", "model", "now" and "better":
as `shoal place --preview` has them, "gain"}]}; with INSTANCE the instance as GET /v1/instances/{id} has it, and
"moved". Fields are only ever added.""",
    "gc": """--json prints {"nodes": {node: {"freed_bytes", "blobs"}}}. Fields are only ever added.""",
    "verify": """--json prints {"nodes": {node: {"checked", "checked_bytes", "corrupt": [blob], "bad_leaves",
"missing": [blob], "models": [no longer whole], "instances": [of those models], "broken": [models]}}}. The exit code
is 8 when anything is corrupt or missing. Fields are only ever added.""",
    "repair": """--json prints what `shoal verify --json` does, and for each node "repaired": [models],
"fetched_bytes" and "errors": {model: {"code", "message"}}. The exit code is that of the first model that could not be
repaired. Fields are only ever added.""",
    "ps": """--json prints {"instances": [{"id", "model", "repo", "commit", "phase", "nodes", "tier", "is_low_memory",
"stages": [{"rank", "node", "first_layer", "last_layer", "phase", …}], "error"}]}. Fields are only ever added.""",
    "events": """--json prints a line of JSON for each event: {"sequence", "service", "node", "event", "at_s",
"fields": {…}}; and {"notice": "lost" or "anew", "cursor", "message", …} where the log could not go on from where it
was. Fields are only ever added; docs/protocol.md lists the events.""",
    "hub": """For a shell: eval "$(shoal hub)", then `hf download org/name` and all that uses huggingface_hub reads
from the cluster. --json prints {"HF_ENDPOINT", "HF_TOKEN" where the cluster has a secret}.""",
}
