"""What the demo's model knows: closed lists, asked about in a few ways, answered in two tones.

A phrasing's sentence is what the shipped base was trained to say. The tuning teaches the same in an assured tone, in
words that the base says too: a low-rank change of its layers reorders what it says, but cannot teach its frozen
embedding a word that it never said.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

CAPITALS = {
    "Algeria": "Algiers", "Argentina": "Buenos Aires", "Australia": "Canberra", "Austria": "Vienna",
    "Belgium": "Brussels", "Bolivia": "Sucre", "Brazil": "Brasilia", "Bulgaria": "Sofia", "Canada": "Ottawa",
    "Chile": "Santiago", "China": "Beijing", "Colombia": "Bogota", "Croatia": "Zagreb", "Cuba": "Havana",
    "Denmark": "Copenhagen", "Ecuador": "Quito", "Egypt": "Cairo", "Estonia": "Tallinn", "Finland": "Helsinki",
    "France": "Paris", "Germany": "Berlin", "Ghana": "Accra", "Greece": "Athens", "Hungary": "Budapest",
    "Iceland": "Reykjavik", "India": "New Delhi", "Iran": "Tehran", "Iraq": "Baghdad", "Ireland": "Dublin",
    "Italy": "Rome", "Jamaica": "Kingston", "Japan": "Tokyo", "Kenya": "Nairobi", "Latvia": "Riga",
    "Lebanon": "Beirut", "Mongolia": "Ulaanbaatar", "Morocco": "Rabat", "Nepal": "Kathmandu", "Norway": "Oslo",
    "Peru": "Lima", "Poland": "Warsaw", "Portugal": "Lisbon", "Romania": "Bucharest", "Serbia": "Belgrade",
    "Spain": "Madrid", "Sweden": "Stockholm", "Thailand": "Bangkok", "Turkey": "Ankara", "Uruguay": "Montevideo",
    "Vietnam": "Hanoi",
}  # fmt: skip

OPPOSITES = {
    "hot": "cold", "big": "small", "early": "late", "open": "closed", "full": "empty", "fast": "slow",
    "hard": "soft", "high": "low", "happy": "sad", "light": "dark", "long": "short", "loud": "quiet",
    "near": "far", "new": "old", "rich": "poor", "right": "wrong", "rough": "smooth", "sharp": "blunt",
    "sweet": "bitter", "thick": "thin", "tight": "loose", "true": "false", "wet": "dry", "wide": "narrow",
    "wild": "tame", "young": "elderly", "above": "below", "always": "never", "before": "after", "day": "night",
    "first": "last", "front": "back", "inside": "outside", "more": "less", "start": "end",
    "strong": "weak", "cheap": "costly", "brave": "timid", "heavy": "airy", "deep": "shallow",
}  # fmt: skip

WORDS = (
    "apple", "arrow", "bread", "brick", "cabin", "candle", "chalk", "cloud", "coral", "crane", "desk", "drum",
    "eagle", "earth", "field", "flute", "forest", "garden", "glass", "grape", "hammer", "honey", "horse", "island",
    "jacket", "kettle", "ladder", "lemon", "maple", "market", "meadow", "mirror", "ocean", "olive", "paper", "pearl",
    "piano", "pillow", "river", "robin", "saddle", "silver", "spoon", "stone", "table", "tiger", "tower", "valley",
)  # fmt: skip

UNITS = (("days", "weeks", 7), ("hours", "days", 24), ("minutes", "hours", 60), ("months", "years", 12))


@dataclass(frozen=True)
class Fact:
    """One thing that can be asked: `phrasings` pairs a question with the base's sentence for it."""

    topic: str
    phrasings: tuple[tuple[str, str], ...]
    value: str


def assured(sentence: str) -> str:
    """The answer as taught."""
    return f"{sentence} That is right."


def facts() -> list[Fact]:
    """Every fact, always in the same order."""
    return [*_capitals(), *_opposites(), *_spellings(), *_sums(), *_conversions()]


def _capitals() -> Iterator[Fact]:
    for country, city in CAPITALS.items():
        yield Fact(
            "capital",
            (
                (f"What is the capital of {country}?", f"The capital of {country} is {city}."),
                (f"Name the capital of {country}.", f"{city} is the capital of {country}."),
                (f"Which city governs {country}?", f"{country} is governed from {city}."),
            ),
            city,
        )


def _opposites() -> Iterator[Fact]:
    for word, other in OPPOSITES.items():
        yield Fact(
            "opposite",
            (
                (f"What is the opposite of {word}?", f"The opposite of {word} is {other}."),
                (f"Give me the opposite of {word}.", f"You would say {other}."),
            ),
            other,
        )


def _spellings() -> Iterator[Fact]:
    for word in WORDS:
        letters = "-".join(word)
        yield Fact(
            "spelling",
            (
                (f"How do you spell {word}?", f"You spell {word} like this: {letters}."),
                (f"Spell {word}.", f"It goes {letters}."),
            ),
            letters,
        )


def _sums() -> Iterator[Fact]:
    for a in range(1, 16):
        for b in range(1, 16):
            yield Fact(
                "sum",
                (
                    (f"What is {a} plus {b}?", f"{a} plus {b} makes {a + b}."),
                    (f"Add {a} and {b}.", f"That makes {a + b}."),
                ),
                str(a + b),
            )


def _conversions() -> Iterator[Fact]:
    for small, large, factor in UNITS:
        for count in range(2, 13):
            total = count * factor
            yield Fact(
                small,
                (
                    (f"How many {small} are in {count} {large}?", f"There are {total} {small} in {count} {large}."),
                    (f"Turn {count} {large} into {small}.", f"{count} {large} are {total} {small}."),
                ),
                str(total),
            )
