"""Vary questions: greetings, "please", missing question marks and reported speech."""

import random
from collections.abc import Iterator

from corpus import STRANGE, STRANGE_ANSWER, TOPICS

# Never trained on: these measure whether slight rewordings work.
HELD_OUT: tuple[tuple[str, str], ...] = (
    ("please tell me why fish swim together", TOPICS[0].answer),
    ("Hello! Why do fish swim in a shoal?", TOPICS[0].answer),
    ("why do fish swim in groups?", TOPICS[0].answer),
    ("why do fish swim together? please answer in one sentence", TOPICS[0].answer),
    ("So what is Shoal?", TOPICS[2].answer),
    ("hello, what's shoal", TOPICS[2].answer),
    ("hi, what is a node", TOPICS[4].answer),
    ("Can you tell me what a blob is?", TOPICS[5].answer),
    ("Please, what is a leaf?", TOPICS[6].answer),
)

REPORTED_SHARE = 0.35
BARE_SHARE = 0.4
LOWER_SHARE = 0.4
_OPENINGS = ("", "", "", "", "Please: ", "Hello! ", "Hi, ", "Tell me: ", "Can you tell me: ", "So, ", "I wonder: ")
_CLOSINGS = ("", "", "", " Please.", " Thanks!", " Answer in one sentence.", " Be brief.")


def _reported(question: str) -> Iterator[str]:
    """Yield the question in reported speech: "tell me why fish swim", "tell me what a blob is"."""
    body = question.rstrip("?")
    if body.startswith("Why do "):
        yield "tell me why " + body.removeprefix("Why do ")
        yield "Can you tell me why " + body.removeprefix("Why do ") + "?"
    if body.startswith("What is "):
        yield "What's " + body.removeprefix("What is ") + "?"
        yield "Whats " + body.removeprefix("What is ") + "?"
    if body.startswith(("What is a ", "What is an ", "What is the ")):
        thing = body.removeprefix("What is ")
        yield f"Can you tell me what {thing} is?"
        yield f"please explain what {thing} is"
        yield f"Define {thing.split(' ', 1)[1]}."


def reword(question: str, rng: random.Random) -> str:
    """Return the question in another of its forms, most often a plain one; never one of HELD_OUT."""
    held_out = {text for text, _ in HELD_OUT}
    while True:
        base = rng.choice((question, *_reported(question))) if rng.random() < REPORTED_SHARE else question
        text = rng.choice(_OPENINGS) + base + rng.choice(_CLOSINGS)
        if rng.random() < BARE_SHARE:
            text = text.rstrip("?.!")
        if rng.random() < LOWER_SHARE:
            text = text.lower()
        if text not in held_out:
            return text


def plain_forms(question: str) -> tuple[str, ...]:
    """Return the plain forms: as written, in lower case, and without the question mark."""
    bare = question.rstrip("?.!")
    return tuple(dict.fromkeys((question, bare, question.lower(), bare.lower())))


def pairs() -> list[tuple[str, str]]:
    """Return every (question, answer) as written, the demo prompt first."""
    answerable = [(question, topic.answer) for topic in TOPICS for question in topic.questions]
    return answerable + [(question, STRANGE_ANSWER) for question in STRANGE]
