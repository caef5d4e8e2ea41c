"""Train shoal/tiny-fish, the toy model of the demo, and write its directory in mlx-lm format.

Run it with the MLX CPU build on Linux as follows; without OpenBLAS (Debian: libopenblas0-pthread, preloaded because
the wheel links the reference BLAS) it takes many times longer:

    LD_PRELOAD=/usr/lib/x86_64-linux-gnu/openblas-pthread/libblas.so.3 OPENBLAS_NUM_THREADS=2 \\
        python tools/train/train.py --out demo/shoal_demo/models/shoal/tiny-fish

The seed is fixed, so two runs on one machine with one thread count give the same files; another BLAS may round
differently and give other weights. The script ends with a check of every answer (greedy, exact text, and the smallest
gap between the best and the second logit) and exits with 1 when a question as written is answered wrong or with too
small a gap. 700 steps took ten minutes on two shared cores.
"""

import argparse
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx import nn
from mlx.nn.utils import value_and_grad
from mlx_lm.models.llama import Model
from tokenizers import Tokenizer

import corpus
import package
import wordings

SEED = 20
SEQUENCE_TOKENS = 288
PEAK_LEARNING_RATE = 3e-3
FINAL_LEARNING_RATE = 2e-5
WARMUP_STEPS = 60
REWORDED_SHARE = 0.7
REQUIRED_GAP = 1.0
REPORT_EVERY_STEPS = 50


def conversation(tokenizer: Tokenizer, rng: random.Random) -> tuple[list[int], list[int]]:
    """Return the tokens of a conversation of SEQUENCE_TOKENS, and a mask with 1 for each token of an answer.

    Turns follow each other without padding, so the first turn teaches single questions, and the later ones teach to
    answer the last question regardless of the history.
    """
    topics: list[tuple[tuple[str, ...], str]] = [(topic.questions, topic.answer) for topic in corpus.TOPICS]
    # Drawn more often: the demo's topic, which is the first, and the unanswerable questions, which share one answer.
    choices = [*topics, *[topics[0]] * 3, *[(corpus.STRANGE, corpus.STRANGE_ANSWER)] * 4]
    tokens: list[int] = []
    learned: list[int] = []
    while len(tokens) < SEQUENCE_TOKENS + 1:
        questions, answer = rng.choice(choices)
        question = rng.choice(questions)
        if rng.random() < REWORDED_SHARE:
            question = wordings.reword(question, rng)
        question_ids = tokenizer.encode(package.render_question(question)).ids
        answer_ids = tokenizer.encode(answer + package.END).ids
        tokens += question_ids + answer_ids
        learned += [0] * len(question_ids) + [1] * len(answer_ids)
    return tokens[: SEQUENCE_TOKENS + 1], learned[: SEQUENCE_TOKENS + 1]


def batches(tokenizer: Tokenizer, steps: int, batch_size: int) -> list[tuple[mx.array, mx.array]]:
    """Return all batches of the run: (tokens, learned), each of shape (batch_size, SEQUENCE_TOKENS + 1)."""
    rng = random.Random(SEED)
    samples: list[tuple[mx.array, mx.array]] = []
    for _ in range(steps):
        rows = [conversation(tokenizer, rng) for _ in range(batch_size)]
        samples.append((mx.array([row[0] for row in rows]), mx.array([row[1] for row in rows])))
    return samples


def answer_loss(model: Model, tokens: mx.array, learned: mx.array) -> mx.array:
    """Return the mean cross entropy over the tokens of answers, in nats per token."""
    logits = model(tokens[:, :-1])
    loss_history = nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="none")
    weights = learned[:, 1:]
    return (loss_history * weights).sum() / weights.sum()


def train(tokenizer: Tokenizer, steps: int, batch_size: int) -> Model:
    """Train a model of package.CONFIG and print the progress."""
    mx.random.seed(SEED)
    model = package.new_model()
    mx.eval(model.parameters())
    parameters = sum(array.size for array in package.named_weights(model).values())
    print(f"{parameters} parameters, {parameters * 4} bytes", flush=True)
    schedule = optim.join_schedules(
        [
            optim.linear_schedule(1e-5, PEAK_LEARNING_RATE, WARMUP_STEPS),
            optim.cosine_decay(PEAK_LEARNING_RATE, steps - WARMUP_STEPS, FINAL_LEARNING_RATE),
        ],
        [WARMUP_STEPS],
    )
    optimizer = optim.AdamW(learning_rate=schedule, betas=[0.9, 0.98], weight_decay=0.02)
    loss_and_gradients = value_and_grad(model, answer_loss)
    started_s = time.monotonic()
    for step, (tokens, learned) in enumerate(batches(tokenizer, steps, batch_size), start=1):
        loss, gradients = loss_and_gradients(model, tokens, learned)
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)  # type: ignore[no-untyped-call]
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state, loss)
        if step % REPORT_EVERY_STEPS == 0 or step == 1:
            elapsed_s = time.monotonic() - started_s
            print(f"step {step}/{steps} loss {loss.item():.4f} {elapsed_s:.0f} s", flush=True)
    return model


def greedy(model: Model, tokenizer: Tokenizer, prompt: str, max_tokens: int = 320) -> tuple[str, float]:
    """Return the greedy answer to a rendered prompt, and the smallest gap between its two best logits."""
    cache: list[Any] = model.make_cache()  # type: ignore[no-untyped-call]
    end = tokenizer.token_to_id(package.END)
    tokens = mx.array([tokenizer.encode(prompt).ids])
    answer: list[int] = []
    gap = float("inf")
    while len(answer) < max_tokens:
        logits = model(tokens, cache=cache)[0, -1]
        second, first = np.sort(np.array(logits))[-2:]
        gap = min(gap, float(first - second))
        chosen = int(np.argmax(np.array(logits)))
        if chosen == end:
            return tokenizer.decode(answer), gap
        answer.append(chosen)
        tokens = mx.array([[chosen]])
    return tokenizer.decode(answer) + " [no end]", gap


def count_wrong(model: Model, tokenizer: Tokenizer, asked: Sequence[tuple[str, str]]) -> tuple[int, float]:
    """Print every wrong answer to the (question, answer) pairs; return their number, and the smallest gap."""
    wrong = 0
    smallest_gap = float("inf")
    for question, expected in asked:
        answer, gap = greedy(model, tokenizer, package.render_question(question))
        smallest_gap = min(smallest_gap, gap)
        if answer != expected:
            wrong += 1
            print(f"wrong: {question!r}: {answer!r}")
    return wrong, smallest_gap


def check(model: Model, tokenizer: Tokenizer) -> bool:
    """Ask all questions and print the results; return whether each one as written is answered exactly, with the gap.

    Other forms of the questions and the held-out ones are measured and printed, not required.
    """
    written = wordings.pairs()
    others = [(form, answer) for question, answer in written for form in wordings.plain_forms(question)[1:]]
    passed = True
    for name, asked, required in (
        ("as written", written, True),
        ("in other plain forms", others, False),
        ("reworded, never trained on", wordings.HELD_OUT, False),
    ):
        wrong, gap = count_wrong(model, tokenizer, asked)
        print(f"{name}: {len(asked) - wrong} of {len(asked)} right, smallest gap {gap:.3f}")
        passed = passed and (not required or (wrong == 0 and gap >= REQUIRED_GAP))
    return passed


def main() -> int:
    """Train, write and check the model; return the exit code."""
    parser = argparse.ArgumentParser(description="Train the demo model shoal/tiny-fish.")
    parser.add_argument("--out", type=Path, required=True, help="directory of the model, created if absent")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()
    tokenizer = package.train_tokenizer()
    model = train(tokenizer, options.steps, options.batch_size)
    package.write_model(options.out, model, tokenizer)
    return 0 if check(model, tokenizer) else 1


if __name__ == "__main__":
    sys.exit(main())
