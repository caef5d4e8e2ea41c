"""Every script in examples/ runs as it is written, against a real cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shoal_demo import DEMO_MODEL
from tests.harness.shoal import ShoalCluster

EXAMPLES = Path(__file__).parents[2] / "examples"
ANSWER = "Fish swim together because"
PRINTS = {
    "curl/status.sh": ('"nats_connected":true', f'"model":"{DEMO_MODEL}"'),
    "curl/pull.sh": ('"phase":"ready"', '"node":"c"'),
    "curl/chat.sh": ('"content":"Fish"', "data: [DONE]"),
    "curl/events.sh": ('"event":"model_ready"', '"event":"placed"'),
    "huggingface_cli.sh": ("/snapshots/",),
    "huggingface_download.py": ("model-00001-of-00002.safetensors", "tokenizer.json"),
    "nats_command.py": (f"{DEMO_MODEL} is ready on b", "ok=True"),
    "nats_request.py": ("plan of b", "storage.a: ", "storage.c: "),
    "openai_chat.py": (ANSWER, "tokens in"),
    "openai_stream.py": (ANSWER, " tokens\n"),
}
"""What each prints, as its reader would check it."""
NODE_ARGUMENT = ("nats_command.py", "nats_request.py")


@pytest.fixture(scope="module")
def placed(cluster: ShoalCluster) -> ShoalCluster:
    """Return the cluster as the demo leaves it: the model on every node, and running on two."""
    cluster["a"].shoal("pull", DEMO_MODEL, "--all", check=True)
    cluster["a"].call("POST", "/v1/instances", {"model": DEMO_MODEL, "min_nodes": 2, "max_nodes": 2})
    return cluster


def settings_of_the_hub(environ: dict[str, str]) -> dict[str, str]:
    """Return what `eval "$(shoal hub)"` sets."""
    printed = subprocess.run(["shoal", "hub"], env=environ, capture_output=True, text=True, check=True, timeout=60)
    lines = [line.removeprefix("export ").partition("=") for line in printed.stdout.splitlines()]
    return {name: value for name, _, value in lines}


def test_every_example_has_a_line_in_the_readme_and_here() -> None:
    scripts = {str(p.relative_to(EXAMPLES)) for p in EXAMPLES.rglob("*") if p.suffix in (".py", ".sh")}
    assert scripts == PRINTS.keys()
    readme = (EXAMPLES / "README.md").read_text()
    assert not {name for name in scripts if f"`{name}`" not in readme}


@pytest.mark.parametrize("name", PRINTS)
def test_an_example_runs_as_written(placed: ShoalCluster, tmp_path: Path, name: str) -> None:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SHOAL_", "HF_", "OPENAI_"))}
    environ = {
        **inherited,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "SHOAL_GATEWAY": placed["a"].url,
        "SHOAL_HOME": str(placed["a"].home),
        "SHOAL_NATS": placed["a"].nats_url,
    }
    if name == "huggingface_download.py":
        environ |= settings_of_the_hub(environ)
    command = [sys.executable] if name.endswith(".py") else []
    arguments = ["b"] if name in NODE_ARGUMENT else []
    ran = subprocess.run(
        [*command, str(EXAMPLES / name), *arguments],
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert not {wanted for wanted in PRINTS[name] if wanted not in ran.stdout}, ran.stdout
