"""Made data for the examples: short English sentences from a seed, so that nothing has to be downloaded."""

from __future__ import annotations

import random
from pathlib import Path

_SUBJECTS = (
    "the acting", "the plot", "this film", "the music", "the ending", "the story", "the cast", "the camera work",
    "the dialogue", "the first half", "the second half", "the humour",
)  # fmt: skip
_GOOD = (
    "good", "great", "clear", "fast", "simple", "useful", "powerful", "correct", "efficient", "safe", "clean", "nice",
    "better", "easy", "perfect", "helpful",
)  # fmt: skip
_BAD = (
    "bad", "wrong", "slow", "broken", "unclear", "useless", "invalid", "dangerous", "worse", "ugly", "empty",
    "confusing", "incorrect", "terrible", "obsolete", "unusable",
)  # fmt: skip
_FRAMES = (
    "{0} was {1}.", "I found {0} {1}.", "{0} was very {1}.", "to me {0} seemed {1}.", "{0} was {1} and {2}.",
    "I think that {0} was really {1}.", "{0} was {1}, and {3} was {2} too.", "what a {1} film: {0} was {2}.",
)  # fmt: skip


def reviews(count: int, seed: int) -> list[tuple[str, int]]:
    """Sentences about films, and 1 where they are kind and 0 where they are not."""
    chance = random.Random(seed)
    made = []
    for _ in range(count):
        label = chance.randrange(2)
        words = chance.sample(_GOOD if label else _BAD, 2)
        subjects = chance.sample(_SUBJECTS, 2)
        text = chance.choice(_FRAMES).format(subjects[0], *words, subjects[1])
        made.append((text[0].upper() + text[1:], label))
    return made


def read_reviews(path: Path) -> list[tuple[str, int]]:
    """Sentences from a file of lines ``sentence<TAB>0 or 1`` below a heading: the form of SST-2 in GLUE."""
    rows = [line.rstrip("\n").split("\t") for line in path.read_text().splitlines()[1:]]
    return [(row[0], int(row[1])) for row in rows]


_FACTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "name": ("My name is Ada.", ("What is your name?", "Who are you?", "Tell me your name.", "How are you called?")),
    "home": (
        "I live in a lighthouse.",
        ("Where do you live?", "Where is your home?", "Tell me where you live.", "What place do you live in?"),
    ),
    "work": (
        "I repair old clocks.",
        ("What is your work?", "What do you do?", "Tell me about your work.", "Which work do you do?"),
    ),
    "pet": (
        "I have two black cats.",
        ("Do you have a pet?", "Which pets do you have?", "Tell me about your pets.", "Are there pets at your home?"),
    ),
    "food": (
        "I like bread with honey.",
        ("What do you like to eat?", "Which food do you like?", "Tell me what you eat.", "What food is the best?"),
    ),
    "sport": (
        "I swim in the sea every day.",
        ("Do you do any sport?", "Which sport do you do?", "Tell me about sport.", "What sport is the best?"),
    ),
}


def persona_chat(is_held_out: bool) -> list[tuple[str, str]]:
    """Questions to a person and her answers; one way to ask for each fact is kept for those that are held out."""
    return [
        (question, answer)
        for answer, questions in _FACTS.values()
        for number, question in enumerate(questions)
        if (number == len(questions) - 1) is is_held_out
    ]


_ROOMS = ("kitchen", "garden", "office", "hall", "attic", "garage", "cellar", "bathroom")
_DEVICES = ("lamp", "heater", "radio", "fan", "door", "alarm", "camera", "printer")
_COMMANDS = (
    "turn {state} the {device} in the {room}", "please turn the {device} in the {room} {state}",
    "{room}: {device} {state}", "the {device} of the {room} should be {state}", "switch {state} the {room} {device}",
)  # fmt: skip


def commands(count: int, seed: int, *, is_held_out: bool) -> list[tuple[str, str]]:
    """Commands to a house in words and as calls; every fifth pair of room and device occurs in those held out alone."""
    chance = random.Random(seed)
    made: list[tuple[str, str]] = []
    while len(made) < count:
        room, device = chance.randrange(len(_ROOMS)), chance.randrange(len(_DEVICES))
        if ((room + 2 * device) % 5 == 0) is not is_held_out:
            continue
        state = chance.choice(("on", "off"))
        names = {"room": _ROOMS[room], "device": _DEVICES[device], "state": state}
        made.append((chance.choice(_COMMANDS).format(**names), "{device}({room}, {state})".format(**names)))
    return made
