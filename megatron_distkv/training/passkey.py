"""Passkeys in prose: what the demo model learns, and what long contexts are evaluated with. Needs numpy only.

A statement is `<<ABC=12345>>`: three letters name the key, five distinct digits are its value. A question repeats the
statement up to `=`, and the model goes on with the digits. The markers `<<`, `=`, `>>` and digits occur nowhere else.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

BOS, EOS, VOCAB_SIZE = 256, 257, 272
NUM_DIGITS = 5
_LETTERS = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", np.uint8)
_OPEN, _IS, _CLOSE = b"<<", b"=", b">>"
_ANSWER_START = len(_OPEN) + 3 + len(_IS)
STATEMENT_LENGTH = _ANSWER_START + NUM_DIGITS + len(_CLOSE)
# The same on every Python: a run that goes on elsewhere sees the batches that it would have seen.
_BUILT_IN = Path(__file__).with_name("prose") / "python_help.txt"
# The last tenth of the text is never trained on.
HELD_OUT_SHARE = 0.1

Bytes = npt.NDArray[np.uint8]


class Key(NamedTuple):
    name: bytes
    digits: bytes

    @property
    def statement(self) -> bytes:
        return _OPEN + self.name + _IS + self.digits + _CLOSE

    @property
    def question(self) -> bytes:
        return b" " + _OPEN + self.name + _IS


class Prose(NamedTuple):
    training: Bytes
    held_out: Bytes

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.training.data)
        digest.update(self.held_out.data)
        return digest.hexdigest()


class Row(NamedTuple):
    """`token_ids` `[length + 1]`; `is_answer` marks digits that can be recalled: all statements but the first."""

    token_ids: npt.NDArray[np.int64]
    is_answer: npt.NDArray[np.float32]


class Prompt(NamedTuple):
    token_ids: list[int]
    digits: bytes


def load_prose(path: Path | None) -> Prose:
    """The text at `path`, or the package's own (Python's help topics), without digits and markers."""
    raw = (path or _BUILT_IN).read_bytes()
    text = np.frombuffer(raw.translate(None, b"0123456789<>="), np.uint8)
    cut = int(len(text) * (1 - HELD_OUT_SHARE))
    return Prose(text[:cut], text[cut:])


def new_key(rng: np.random.Generator) -> Key:
    name = _LETTERS[rng.integers(0, 26, 3)].tobytes()
    return Key(name, bytes((ord("0") + rng.permutation(10)[:NUM_DIGITS]).astype(np.uint8)))


def training_row(rng: np.random.Generator, prose: Bytes, length: int, max_density: float) -> Row:
    """One key, stated twice or more often in `length` tokens of prose; statements take at most `max_density` of them.

    How often is log-uniform, so that rows with two statements, which is what recall is measured with, stay common.
    """
    most = max(2, int(length * max_density / STATEMENT_LENGTH))
    count = int(np.exp(rng.uniform(np.log(2), np.log(most + 1))))
    num_prose = length - count * STATEMENT_LENGTH
    source = _excerpt(rng, prose, num_prose)
    cuts = np.sort(rng.integers(0, num_prose + 1, count))
    statement = np.frombuffer(new_key(rng).statement, np.uint8)
    ids = np.empty(length + 1, np.int64)
    is_answer = np.zeros(length + 1, np.float32)
    ids[0], at, taken = BOS, 1, 0
    for number, cut in enumerate(cuts):
        ids[at : at + cut - taken] = source[taken:cut]
        at, taken = at + cut - taken, cut
        ids[at : at + STATEMENT_LENGTH] = statement
        if number > 0:
            is_answer[at + _ANSWER_START : at + _ANSWER_START + NUM_DIGITS] = 1
        at += STATEMENT_LENGTH
    ids[at:] = source[taken:]
    return Row(ids, is_answer)


def training_batch(
    rng: np.random.Generator, prose: Bytes, num_rows: int, length: int, max_density: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Token ids and answer masks `[rows, length + 1]`."""
    rows = [training_row(rng, prose, length, max_density) for _ in range(num_rows)]
    return np.stack([row.token_ids for row in rows]), np.stack([row.is_answer for row in rows])


def prompt(rng: np.random.Generator, prose: Bytes, length: int, depth: float) -> Prompt:
    """Exactly `length` tokens: one statement at `depth` (0: the start, 1: the end), its question last."""
    key = new_key(rng)
    num_prose = length - 1 - STATEMENT_LENGTH - len(key.question)
    if num_prose < 0:
        raise ValueError(f"a passkey prompt needs at least {length - num_prose} tokens, got {length}")
    source = _excerpt(rng, prose, num_prose).tobytes()
    cut = int(num_prose * depth)
    return Prompt([BOS, *source[:cut], *key.statement, *source[cut:], *key.question], key.digits)


def prompts(
    seed: int, prose: Bytes, lengths: Sequence[int], depths: Sequence[float]
) -> list[tuple[int, float, Prompt]]:
    """One prompt per length and depth, reproducible from `seed`."""
    rng = np.random.default_rng(seed)
    return [(length, depth, prompt(rng, prose, length, depth)) for length in lengths for depth in depths]


def _excerpt(rng: np.random.Generator, prose: Bytes, length: int) -> Bytes:
    """`length` bytes from a random place; a text that is too short is repeated."""
    if length >= len(prose):
        prose = np.tile(prose, length // len(prose) + 2)
    start = int(rng.integers(0, len(prose) - length))
    return prose[start : start + length]
