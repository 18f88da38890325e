"""A small grammar that writes a play, so that the ladder climbs without a download.

Long-range patterns are built in: the answer repeats the thing that was asked for, whoever is
addressed speaks next, and a scene's place comes back at its end.
"""

import random

NAMES = ["Anna", "Bruno", "Clara", "Dario", "Edith", "Felix", "Greta", "Hugo", "Viktor", "Zeno"]
THINGS = ["lantern", "kettle", "ladder", "basket", "fiddle", "blanket", "compass", "spade", "map"]
LOOKS = ["old", "red", "copper", "borrowed", "broken", "heavy", "blue", "wooden", "rusty", "yellow"]
PLACES = [
    *("by the mill", "under the bridge", "behind the oven", "in the orchard", "at the quay"),
    *("on the hay cart", "beside the well", "near the chapel", "between the barrels"),
]
TIMES = ["this morning", "yesterday", "before supper", "at dawn", "last week", "after the rain"]
GREETINGS = [
    "Good morrow, {b}. I dreamed of the river {time}.",
    "You look tired, {b}! Did you not sleep {time}?",
    "Come in, {b}, and shut the door: the wind is cold.",
    "{b}! I looked for you {time}.",
]
QUESTIONS = [
    "Have you seen the {look} {thing}, {b}?",
    "Where did you leave my {look} {thing}?",
    "Who took the {look} {thing}, {b}? It was {place} {time}.",
    "I need the {look} {thing} quickly; nobody knows where it is.",
]
ANSWERS = [
    "The {look} {thing}? It lies {place}, {a}.",
    "{c} carried the {thing} away {time}, and put it {place}.",
    "Your {thing}, {a}? I saw no {look} {thing}; ask {c}.",
    "Look {place}. If the {thing} is not there, then {c} has it.",
]
ENDINGS = [
    "Then I shall go and look {place}. Thank you, {b}.",
    "So the {look} {thing} is {place}! Let us fetch it, {b}.",
    "Ask {c}? I would rather buy another {thing}.",
    "Enough of it, {b}. Supper is ready, and {c} is waiting.",
]


def write(scenes: int = 300, seed: int = 0) -> str:
    """About 240 characters a scene; the same text for the same seed."""
    pick = random.Random(seed)
    lines = []
    for number in range(1, scenes + 1):
        a, b, c = pick.sample(NAMES, 3)
        words = {"a": a, "b": b, "c": c, "look": pick.choice(LOOKS), "thing": pick.choice(THINGS)}
        words |= {"place": pick.choice(PLACES), "time": pick.choice(TIMES)}
        lines.append(f"Scene {number}, {words['place']}.\n")
        turns = [(a, GREETINGS), (a, QUESTIONS), (b, ANSWERS), (a, ENDINGS)]
        for speaker, sentences in turns[pick.randrange(2) :]:
            lines.append(f"{speaker.upper()}:\n{pick.choice(sentences).format(**words)}\n")
    return "\n".join(lines)
