"""Tasks whose answers are known: what a mechanism can do, apart from the statistics of a text.

Every task is a context and questions about it. The answer to a question depends on the context
alone, each question is one token, and its answer is read where it stands. So one task can be put to
a mechanism that sees backwards, both ways, or looks at a memory. Texts are drawn anew for every batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

Draw = Callable[[int, Generator], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Task:
    """draw: (rows, generator) → context [B, S], questions [B, Q] and answers [B, Q], all int64;
    vocabulary: of the first two; answers: how many there are, equally likely at first sight; joined:
    every place is also told the token before it, so that finding is tried and not joining neighbours."""

    title: str
    source: str
    vocabulary: int
    answers: int
    context: int
    questions: int
    draw: Draw
    joined: bool = True

    @property
    def chance(self) -> float:
        return 1 / self.answers


def recall(pairs: int, keys: int = 24, values: int = 12) -> Task:
    """Keys each followed by its value; a question is a key, the answer its value."""

    def draw(rows: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        names = _distinct(rows, keys, pairs, generator)
        held = torch.randint(values, (rows, pairs), generator=generator)
        context = torch.stack([names, held + keys], -1).flatten(1)
        order = _distinct(rows, pairs, pairs, generator)
        return context, names.gather(1, order), held.gather(1, order)

    source = "Arora et al. 2023, Zoology: Measuring and Improving Recall in Efficient Language Models"
    return Task("associative recall", source, keys + values, values, 2 * pairs, pairs, draw)


def induction(length: int, questions: int = 8) -> Task:
    """Tokens in random order, none twice; a question is one of them, the answer the one that followed it."""
    alphabet = length

    def draw(rows: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        context = _distinct(rows, alphabet, length, generator)
        places = _distinct(rows, length - 1, questions, generator)
        return context, context.gather(1, places), context.gather(1, places + 1)

    source = "Olsson et al. 2022, In-context Learning and Induction Heads"
    return Task("induction", source, alphabet, alphabet, length, questions, draw, joined=False)


def selective_copy(length: int, items: int, alphabet: int = 8) -> Task:
    """Items among blanks at random places; question j asks for the j-th item."""

    def draw(rows: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        held = torch.randint(alphabet, (rows, items), generator=generator)
        places = _distinct(rows, length, items, generator).sort(1).values
        context = torch.full((rows, length), alphabet).scatter(1, places, held)
        questions = (alphabet + 1 + torch.arange(items)).expand(rows, -1)
        return context, questions, held

    source = "Gu & Dao 2023, Mamba: Linear-Time Sequence Modeling with Selective State Spaces"
    return Task("selective copy", source, alphabet + 1 + items, alphabet, length, items, draw)


def needle(length: int, alphabet: int = 8) -> Task:
    """Noise in which one marker stands; the question is for the token behind the marker."""

    def draw(rows: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        context = torch.randint(alphabet, (rows, length), generator=generator)
        place = torch.randint(length - 1, (rows, 1), generator=generator)
        answer = context.gather(1, place + 1)
        context = context.scatter(1, place, alphabet)
        return context, torch.full((rows, 1), alphabet + 1), answer

    source = "Kamradt 2023, Needle in a Haystack; Mohtashami & Jaggi 2023, Landmark Attention (passkeys)"
    return Task("needle retrieval", source, alphabet + 2, alphabet, length, 1, draw)


def nesting(length: int, kinds: int = 4, asked: int = 2) -> Task:
    """Brackets of several kinds, correctly nested so far; question j asks which kind the j-th innermost
    open one is, and so what must close it."""

    def draw(rows: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        context = torch.empty(rows, length, dtype=torch.int64)
        answers = torch.empty(rows, asked, dtype=torch.int64)
        coins = torch.rand(rows, length, generator=generator).tolist()
        drawn = torch.randint(kinds, (rows, length), generator=generator).tolist()
        for row in range(rows):
            stack: list[int] = []
            for step in range(length):
                must = len(stack) + (length - step) <= asked  # else too few would be open at the end
                opens = must or not stack or coins[row][step] < 0.5
                context[row, step] = drawn[row][step] if opens else kinds + stack.pop()
                if opens:
                    stack.append(drawn[row][step])
                elif len(stack) + (length - step - 1) < asked:  # closing was one too many: open again
                    stack.append(int(context[row, step]) - kinds)
                    context[row, step] = drawn[row][step]
                    stack.append(drawn[row][step])
            answers[row] = torch.tensor(stack[-1 : -asked - 1 : -1])
        questions = (2 * kinds + torch.arange(asked)).expand(rows, -1)
        return context, questions, answers

    source = (
        "Chomsky & Schützenberger 1963 (Dyck); Hewitt et al. 2020, RNNs can generate bounded hierarchical languages"
    )
    return Task("nested brackets", source, 2 * kinds + asked, kinds, length, asked, draw)


def list_operations(length: int, depth: int = 3) -> Task:
    """Nested lists such as [MAX 2 9 [MIN 4 7 ] 0 ]; the question is for the value, a digit."""
    names: list[Callable[[list[int]], int]] = [max, min, lambda v: sorted(v)[len(v) // 2], lambda v: sum(v) % 10]
    close, blank, question = 10 + len(names), 11 + len(names), 12 + len(names)

    def draw(rows: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        context = torch.full((rows, length), blank)
        answers = torch.empty(rows, 1, dtype=torch.int64)

        def pick(count: int) -> int:
            return int(torch.randint(count, (), generator=generator))

        def expression(room: int, level: int) -> tuple[list[int], int]:
            which = pick(len(names))
            tokens: list[int] = []
            values: list[int] = []
            count = 2 + pick(3)
            for _ in range(count):
                free = (room - 2 - len(tokens)) - (count - len(values))
                if level > 1 and free >= 4 and pick(2):
                    inner, value = expression(free, level - 1)
                else:
                    value = pick(10)
                    inner = [value]
                tokens += inner
                values.append(value)
            return [10 + which, *tokens, close], names[which](values)

        for row in range(rows):
            tokens, answers[row, 0] = expression(length, depth)
            context[row, length - len(tokens) :] = torch.tensor(tokens)
        return context, torch.full((rows, 1), question), answers

    source = "Nangia & Bowman 2018, ListOps: A Diagnostic Dataset for Latent Tree Learning"
    return Task("list operations", source, question + 1, 10, length, 1, draw)


QUICK: dict[str, Task] = {
    "recall": recall(8),
    "induction": induction(16, questions=15),
    "copy": selective_copy(24, 6),
    "needle": needle(48),
    "nesting": nesting(16),
}
ALL: dict[str, Task] = {
    "recall": recall(24, keys=64, values=24),
    "induction": induction(48, questions=47),
    "copy": selective_copy(96, 12),
    "needle": needle(256),
    "nesting": nesting(48, asked=4),
    "listops": list_operations(48),
}


def _distinct(rows: int, alphabet: int, count: int, generator: Generator) -> Tensor:
    """[rows, count] numbers below `alphabet`, none twice in a row."""
    return torch.rand(rows, alphabet, generator=generator).argsort(1)[:, :count]
