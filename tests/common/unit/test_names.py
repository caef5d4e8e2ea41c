"""Names from outside: valid ones come back unchanged, dangerous ones are refused."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shoal_common import names
from shoal_common.bus import subjects
from shoal_common.errors import BadName
from shoal_common.names import ModelRef

# The keys that nats-server and the KV specification accept; quoted names are one token, so without '.'.
KV_TOKEN = re.compile(r"[-/_=a-zA-Z0-9]+")
ANYTHING = st.text(alphabet=st.characters(categories=None), max_size=60)
"""Any code points, lone surrogates included: json.loads makes those from the hub's replies."""

PART = st.from_regex(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,20}[A-Za-z0-9_])?", fullmatch=True).filter(
    lambda p: ".." not in p and "--" not in p
)


@given(st.text(min_size=1))
@example("mlx-community/Qwen3-0.6B-4bit@main")
@example("=2E")
@example("*.>")
def test_I10_any_text_is_quoted_as_one_valid_key_token(text: str) -> None:
    token = names.quote_key(text)
    assert KV_TOKEN.fullmatch(token)
    quoted = re.sub(r"=([0-9A-F]{2})", lambda m: chr(int(m[1], 16)), token)
    assert quoted.encode("latin-1").decode() == text


@given(st.text(min_size=1), st.text(min_size=1))
def test_I10_different_names_never_share_a_key(one: str, other: str) -> None:
    assert (names.quote_key(one) == names.quote_key(other)) == (one == other)


@given(PART, PART, st.sampled_from(["", "main", "v1.0", "refs/pr/3", "0" * 40]))
def test_a_model_reads_back_as_it_is_written(org: str, name: str, revision: str) -> None:
    ref = ModelRef(f"{org}/{name}", revision or names.DEFAULT_REVISION)
    assert ModelRef.parse(str(ref)) == ref


@pytest.mark.parametrize(
    "text",
    [
        "",
        "name",
        "/",
        "org/",
        "/name",
        "a/b/c",
        "../etc",
        "org/..",
        "org/.hidden",
        "org/na..me",
        "org/na--me",
        "o--g/name",
        "-org/name",
        "org/name-",
        "org/na me",
        "org/name\n",
        "org/na\x00me",
        "org\\name/x",
        "org/%2e%2e",
        "org/name@",
        "org/name@../../x",
        "org/name@a//b",
        "org/name@-x",
        "org/name@v1\n",
        "org/n\u0430me",
        "org/" + "n" * 97,
        "org/name@" + "r" * 129,
    ],
)
def test_I10_hostile_models_are_refused(text: str) -> None:
    with pytest.raises(BadName):
        ModelRef.parse(text)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/etc/passwd",
        "..",
        "a/../b",
        "a//b",
        "./a",
        "a/.",
        "a/",
        "a\\b",
        "C:x",
        "a\nb",
        "a\x00b",
        "a?b",
        "a|b",
        "\ud800",
        "a" * 513,
        "é" * 128,
    ],
)
def test_I10_hostile_paths_are_refused(path: str) -> None:
    with pytest.raises(BadName):
        names.check_file_path(path)


@pytest.mark.parametrize("path", ["config.json", "model-00001-of-00002.safetensors", ".gitattributes", "a/ü.json"])
def test_paths_that_models_have_are_accepted(path: str) -> None:
    assert names.check_file_path(path) == path


@pytest.mark.parametrize("node", ["", "a.b", "*", ">", "A", "-a", "a-", "a b", "a/b", "..", "ü", "a\n", "a" * 64])
def test_I10_hostile_nodes_are_refused_and_make_no_subject(node: str) -> None:
    with pytest.raises(BadName):
        names.check_node(node)
    with pytest.raises(BadName):
        subjects.command("storage", node, "delete")


@given(ANYTHING)
def test_I10_every_check_returns_its_text_or_raises_bad_name(text: str) -> None:
    checks: list[Callable[[str], str]] = [
        names.check_commit,
        names.check_node,
        names.check_id,
        names.check_blob,
        names.check_file_path,
        lambda t: str(ModelRef.parse(t)) and t,
    ]
    for check in checks:
        try:
            assert check(text) == text
        except BadName as refusal:
            assert refusal.message


@given(st.tuples(PART, PART), st.text("0123456789abcdef", min_size=40, max_size=40))
def test_a_model_id_comes_apart_as_it_was_put_together(parts: tuple[str, str], commit: str) -> None:
    model = names.model_id("/".join(parts), commit)
    assert names.check_model_id(model) == model
    assert (names.repo_of(model), names.commit_of(model)) == ("/".join(parts), commit)


@pytest.mark.parametrize(
    "text", ["", "org/name", "org/name@main", "@" + "c" * 40, "a/b@c@" + "c" * 40, "../x@" + "c" * 40]
)
def test_I10_a_name_without_its_full_commit_is_no_model_id(text: str) -> None:
    with pytest.raises(BadName):
        names.check_model_id(text)


@given(ANYTHING, st.text("0123456789abcdef", min_size=4, max_size=4))
def test_I8_any_hostname_gives_a_valid_node_id(hostname: str, suffix: str) -> None:
    node = names.node_id_from_hostname(hostname, suffix)
    assert names.check_node(node).endswith(suffix)
