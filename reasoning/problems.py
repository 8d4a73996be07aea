"""The problem world: word problems in plain English, exact solutions, and solutions with mistakes.

A problem has 2 to 6 events in a fixed order; each event changes how many things a person has. The
reference solution has one step for each event, and a last step with the answer. The pretraining
text contains mistakes like human text does: under a few conditions, the *traps*, a step is more
often wrong than right; elsewhere slips are rare. After a mistake the solution continues with the
wrong value. Reference solutions have no mistakes.

Everything is generated from fixed seeds and is byte-identical on every machine. Splits are disjoint
by construction: the hash of a problem's events, which its text determines, decides its split.
"""

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from reasoning.records import Problem
from reasoning.steps import STEP_NUMBER

TRAP_MISTAKE_RATE = 0.60  # share of traps with a mistake in the pretraining text
SLIP_RATE = 0.03  # share of all other steps with a mistake
SLIPS = (-10, -2, -1, 1, 2, 10)  # error of the result of such a step
MAX_VALUE = 99  # largest reference value: a model learns two-digit arithmetic in minutes
EVENT_COUNTS = {2: 0.34, 3: 0.34, 4: 0.22, 5: 0.06, 6: 0.04}
HARD_EVENT_COUNTS = {5: 0.6, 6: 0.4}

_NUMBER = re.compile(r"(?<![\d.])\d+(?![\d.])")

# split -> (range of the hash, in thousandths; seed; size; distribution of the number of events)
SPLITS = {
    "pretrain": ((0, 600), 1, None, EVENT_COUNTS),
    "train": ((600, 800), 2, 20_000, EVENT_COUNTS),
    "validation": ((800, 850), 3, 2_000, EVENT_COUNTS),
    "test": ((850, 900), 4, 2_000, EVENT_COUNTS),
    "hard_validation": ((900, 950), 5, 500, HARD_EVENT_COUNTS),
    "hard": ((950, 1000), 6, 1_000, HARD_EVENT_COUNTS),
    "hard_train": ((600, 800), 7, 10_000, HARD_EVENT_COUNTS),
}

_SHE = "Mia Ana Zoe Lily Nora Emma Ruth Sara Ines Tara Maya Lena"
_HE = "Tom Ben Max Leo Sam Omar Ivan Paul Hugo Finn Ravi Noah"
NAMES = {**dict.fromkeys(_SHE.split(), "She"), **dict.fromkeys(_HE.split(), "He")}
_THINGS = (
    "apples books cards coins stamps shells marbles pencils beads stickers eggs plums "
    "buttons nuts candles tickets roses cups stones cookies pears keys toys balls"
)
THINGS = _THINGS.split()

# kind of event -> its weight, and its forms: (text, whether the form is always a trap). {P} is the
# pronoun, {t} the things, {k} and {m} the operands. `lose` is a trap if its subtraction borrows.
#   gain v + k, lose v - k, times v * k, share v / k, sets v + k * m, hand_out v - k * m
FORMS: dict[str, tuple[float, list[tuple[str, bool]]]] = {
    "gain": (
        0.16,
        [
            ("{P} buys {k} more {t}.", False),
            ("{P} finds {k} {t}.", False),
            ("A friend brings {k} {t}.", False),
        ],
    ),
    "lose": (
        0.14,
        [
            ("{P} loses {k} {t}.", False),
            ("{P} sells {k} {t}.", False),
            ("Then {k} {t} go missing.", False),
        ],
    ),
    "times": (
        0.17,
        [
            ("Soon there are {k} times as many {t}.", True),
            ("The {t} become {k} times as many.", True),
            ("The pile of {t} {doubles}.", False),
        ],
    ),
    "share": (
        0.19,
        [
            ("{P} makes {k} equal piles of {t} and keeps one.", False),
            ("{P} keeps only one of {k} equal shares.", False),
        ],
    ),
    "sets": (
        0.17,
        [
            ("{P} gets {k} boxes of {m} {t}.", True),
            ("{P} buys {k} boxes with {m} {t} each.", True),
            ("{P} gets {k} bags of {m} {t}.", False),
            ("{P} buys {k} bags with {m} {t} each.", False),
            ("{P} finds {k} jars of {m} {t}.", False),
        ],
    ),
    "hand_out": (
        0.17,
        [
            ("{P} gives {m} {t} to each of {k} friends.", False),
            ("Then {k} friends take {m} {t} each.", False),
        ],
    ),
}


@dataclass(frozen=True)
class Event:
    """One event: its kind, the index of its form, and its operands (m = 0 if there is only one)."""

    kind: str
    form: int
    k: int
    m: int = 0

    def apply(self, value: int) -> int:
        """The number of things after the event. A division is rounded down; a remainder occurs only
        after a mistake."""
        operations = {
            "gain": value + self.k,
            "lose": value - self.k,
            "times": value * self.k,
            "share": value // self.k,
        }
        product = {"sets": value + self.k * self.m, "hand_out": value - self.k * self.m}
        return {**operations, **product}[self.kind]

    def is_trap(self, value: int) -> bool:
        """Whether this event is a trap when there are `value` things."""
        borrows = self.kind == "lose" and value % 10 < self.k % 10
        return borrows or FORMS[self.kind][1][self.form][1]

    def text(self, pronoun: str, things: str) -> str:
        form = FORMS[self.kind][1][self.form][0]
        doubles = {2: "doubles", 3: "triples"}.get(self.k)
        return form.format(P=pronoun, t=things, k=self.k, m=self.m, doubles=doubles)

    def equations(self, value: int) -> tuple[str, int]:
        """The right step, without its number, and the value after it."""
        after = self.apply(value)
        if self.kind in ("sets", "hand_out"):
            sign, product = "+" if self.kind == "sets" else "-", self.k * self.m
            return f"{self.k} * {self.m} = {product}, {value} {sign} {product} = {after}", after
        sign = {"gain": "+", "lose": "-", "times": "*", "share": "/"}[self.kind]
        return f"{value} {sign} {self.k} = {after}", after

    def trap_mistake(self, value: int) -> tuple[str, int]:
        """The wrong step of this trap, without its number, and the value after it."""
        if self.kind == "lose":  # the borrow is forgotten: 42 - 17 = 35
            return f"{value} - {self.k} = {value - self.k + 10}", value - self.k + 10
        if self.kind == "times":  # "3 times as many" read as 3 more: 12 + 3 = 15
            return f"{value} + {self.k} = {value + self.k}", value + self.k
        total = self.k + self.m  # boxes are added, not multiplied: 3 + 4 = 7
        return f"{self.k} + {self.m} = {total}, {value} + {total} = {value + total}", value + total

    def slip(self, value: int, rng: random.Random) -> tuple[str, int]:
        """The right equation with a wrong result, by one of SLIPS; and that result."""
        text, after = self.equations(value)
        wrong = max(0, after + rng.choice(SLIPS))
        wrong = wrong if wrong != after else after + 1
        return text[: text.rindex("=")] + f"= {wrong}", wrong


@dataclass(frozen=True)
class Story:
    """What a problem is generated from: the person, the things, their number, and the events."""

    name: str
    things: str
    start: int
    events: tuple[Event, ...]

    def prompt(self) -> str:
        pronoun = NAMES[self.name]
        events = " ".join(event.text(pronoun, self.things) for event in self.events)
        question = f"How many {self.things} does {self.name} have now?"
        return f"{self.name} has {self.start} {self.things}. {events} {question}"

    def values(self) -> list[int]:
        values = [self.start]
        for event in self.events:
            values.append(event.apply(values[-1]))
        return values

    def problem(self) -> Problem:
        values = self.values()
        steps = [
            f"Step {k + 1}: {event.equations(values[k])[0]}" for k, event in enumerate(self.events)
        ]
        traps = [event.is_trap(values[k]) for k, event in enumerate(self.events)]
        return Problem(
            self.prompt(), str(values[-1]), [*steps, f"Answer: {values[-1]}"], [*traps, False]
        )

    def human_solution(self, rng: random.Random) -> tuple[list[str], list[bool]]:
        """A solution of the pretraining text: (its steps, whether each step but the last is a
        mistake)."""
        steps, mistakes, value = [], [], self.start
        for k, event in enumerate(self.events):
            trap = event.is_trap(value)
            mistake = rng.random() < (TRAP_MISTAKE_RATE if trap else SLIP_RATE)
            if mistake:
                text, value = event.trap_mistake(value) if trap else event.slip(value, rng)
            else:
                text, value = event.equations(value)
            steps.append(f"Step {k + 1}: {text}")
            mistakes.append(mistake)
        return [*steps, f"Answer: {value}"], mistakes


def _draw_event(value: int, rng: random.Random) -> Event | None:
    """A random event that leaves 1 to MAX_VALUE things; None if the drawn event does not."""
    kind = rng.choices(list(FORMS), [weight for weight, _ in FORMS.values()])[0]
    form = rng.randrange(len(FORMS[kind][1]))
    k, m = rng.randint(2, 40), 0
    if kind == "times":
        k = rng.randint(2, 3) if "{doubles}" in FORMS[kind][1][form][0] else rng.randint(2, 5)
    elif kind == "share":
        k = rng.randint(2, 6)
        if value % k:
            return None
    elif kind in ("sets", "hand_out"):
        k, m = rng.randint(2, 6), rng.randint(2, 9)
        if k + m == k * m:  # 2 boxes of 2: the trap's result would be right
            return None
    event = Event(kind, form, k, m)
    return event if 1 <= event.apply(value) <= MAX_VALUE else None


def _draw_story(rng: random.Random, event_counts: dict[int, float]) -> Story:
    count = rng.choices(list(event_counts), list(event_counts.values()))[0]
    name, things, start = rng.choice(list(NAMES)), rng.choice(THINGS), rng.randint(3, 60)
    events: list[Event] = []
    value = start
    while len(events) < count:
        event = _draw_event(value, rng)
        if event is not None:
            events.append(event)
            value = event.apply(value)
    return Story(name, things, start, tuple(events))


def _hash_share(story: Story) -> int:
    """0..999, a hash of the start and the events (kinds and operands, not the wording)."""
    key = repr((story.start, [(event.kind, event.k, event.m) for event in story.events]))
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 1000


def stories(split: str) -> Iterator[Story]:
    """The stories of a split in their fixed order, each once; infinitely many for `pretrain`."""
    (low, high), seed, size, event_counts = SPLITS[split]
    rng = random.Random(seed)
    seen: set[str] = set()
    while size is None or len(seen) < size:
        story = _draw_story(rng, event_counts)
        prompt = story.prompt()
        if low <= _hash_share(story) < high and prompt not in seen:
            seen.add(prompt)
            yield story


def problems(split: str) -> Iterator[Problem]:
    """The problems of a split with their reference solutions."""
    return (story.problem() for story in stories(split))


def pretraining_texts(seed: int = 0) -> Iterator[tuple[Problem, list[str]]]:
    """Infinitely many (problem, solution with mistakes) for the miniatures; each problem once."""
    rng = random.Random(f"human mistakes {seed}")
    for story in stories("pretrain"):
        yield story.problem(), story.human_solution(rng)[0]


def corrupted(story: Story, rng: random.Random) -> list[str]:
    """A solution with one random error, and later steps that follow from it: data for judges.

    The error is a trap's mistake, a slip, or a changed operand, at a random event."""
    wrong_at = rng.randrange(len(story.events))
    steps, value = [], story.start
    for k, event in enumerate(story.events):
        if k == wrong_at:
            kind = rng.choice(["slip", "trap", "misread"])
            if kind == "trap" and event.is_trap(value):
                text, value = event.trap_mistake(value)
            elif kind == "misread":
                other = replace(event, k=max(1, event.k + rng.choice([-2, -1, 1, 2, 10])))
                text, value = other.equations(value)
            else:
                text, value = event.slip(value, rng)
        else:
            text, value = event.equations(value)
        steps.append(f"Step {k + 1}: {text}")
    return [*steps, f"Answer: {value}"]


def changed_numbers(steps: list[str], rng: random.Random) -> Iterator[tuple[list[str], str]]:
    """Each way to change one number of one step, except the last step, by one of SLIPS.

    Yields (steps, description). The number keeps its length, and the later steps do not change."""
    for k, step in enumerate(steps[:-1]):
        label = STEP_NUMBER.match(step)
        for number in _NUMBER.finditer(step, label.end() if label else 0):
            other = str(max(0, int(number[0]) + rng.choice(SLIPS)))
            if len(other) == len(number[0]):
                changed = step[: number.start()] + other + step[number.end() :]
                description = f"put in: {other} for {number[0]} in step {k + 1}"
                yield [*steps[:k], changed, *steps[k + 1 :]], description
