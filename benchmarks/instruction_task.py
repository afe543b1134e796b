"""Questions with one right word, made from a seed: which person, thing, place or next word the text before it names.

A question is three messages of a chat and its answer; a wrong answer is a word of the same text, so that no answer can be
told by its kind. Every question is a text of its own, and those that are measured are none of those that are learnt from.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

__all__ = ["Question", "make_questions"]


def _words(text: str) -> list[str]:
    return text.split()


SYSTEM = "Answer with one word."
NAMES = _words(
    "Anna Peter Maria Paul Laura David Emma Simon Julia Mark Sarah Adam Lucy Henry Clara Oscar Alice Thomas Nina Martin "
    "Rose Victor Helen Daniel"
)
THINGS = _words(
    "lamp rope book coin drum vase clock brush bell knife map ring chair mirror ladder candle basket hammer blanket camera "
    "whistle helmet bottle guitar"
)
PLACES = _words(
    "barn attic kitchen garden cellar garage office tower library stable school church market harbor forest museum hotel "
    "castle temple bakery theater station hospital palace"
)
_FACTS = 5
_LISTED = 8
KINDS = ("place", "person", "thing", "next")


@dataclass(frozen=True)
class Question:
    """One question: its kind, what the user says, the right word and a wrong one of the same text."""

    kind: str
    text: str
    answer: str
    wrong: str

    @property
    def prompt(self) -> list[dict[str, str]]:
        """The chat up to the answer."""
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": self.text}]


def make_questions(seed: int, number: int, apart_from: frozenset[str] = frozenset()) -> list[Question]:
    """That many questions with texts of their own, the kinds in turn.

    Args:
        seed: of everything in them.
        number: how many.
        apart_from: texts that none of them may be.
    """
    chance, seen, questions = random.Random(seed), set(apart_from), []
    while len(questions) < number:
        question = _make(KINDS[len(questions) % len(KINDS)], chance)
        if question.text not in seen:
            seen.add(question.text)
            questions.append(question)
    return questions


def _make(kind: str, chance: random.Random) -> Question:
    if kind == "next":
        words = chance.sample(THINGS, _LISTED)
        at = chance.randrange(_LISTED - 1)
        text = f"The words are {', '.join(words)}. Which word comes after {words[at]}?"
        return Question(kind, text, words[at + 1], chance.choice([*words[:at], *words[at + 2 :]]))
    facts = list(zip(*(chance.sample(words, _FACTS) for words in (NAMES, THINGS, PLACES)), strict=True))
    told = " ".join(f"{name} has a {thing} in the {place}." for name, thing, place in facts)
    at, other = chance.sample(range(_FACTS), 2)
    name, thing, place = facts[at]
    asked, column = {
        "place": (f"Where is the {thing}?", 2),
        "person": (f"Who has something in the {place}?", 0),
        "thing": (f"What does {name} have?", 1),
    }[kind]
    return Question(kind, f"{told} {asked}", facts[at][column], facts[other][column])
