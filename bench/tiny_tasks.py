"""Chat tasks whose answers can be checked, for training and judging the bundled tiny model.

Each kind draws a content (the words or numbers a task is about), some phrasings of it and the one right answer. A
stable hash of the kind and the content decides whether a task is held out, so a phrasing never leaks an answer.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Message = dict[str, str]
Draw = tuple[str, Sequence[str], str]  # content key, phrasings, answer

CATEGORIES: dict[str, tuple[str, ...]] = {
    "animal": tuple(
        "bear bee bird cat cow crow deer dog duck fish fly fox frog goat goose hare hen horse lamb lion mouse owl ox "
        "pig rabbit rat sheep snake swan wolf".split()
    ),
    "fruit or food": tuple(
        "apple bread butter cake cheese cherry corn cream egg grape honey meat milk nut pear pie plum rice salt soup "
        "sugar tea".split()
    ),
    "color": tuple("black blue brown gold gray green pink purple red silver white yellow".split()),
    "part of the body": tuple(
        "arm back chin ear eye face finger foot hair hand head heart knee leg lip mouth neck nose tooth".split()
    ),
    "thing to wear": tuple("apron belt boot cap cloak coat dress glove hat ring scarf shirt shoe sock".split()),
    "thing in a house": tuple(
        "bed bench box chair clock cup door floor key knife lamp mirror plate pot roof spoon stairs table wall "
        "window".split()
    ),
    "person": tuple(
        "baby boy brother captain child cook doctor father friend girl king lady maid man mother prince princess queen "
        "sailor sister soldier teacher woman".split()
    ),
    "thing in nature": tuple(
        "cloud field flower forest garden grass hill lake leaf moon mountain rain river rock rose sea sky snow star "
        "stone sun tree water wind wood".split()
    ),
}
OPPOSITES: dict[str, str] = dict(
    pair.split("/")
    for pair in (
        "big/small hot/cold old/young happy/sad light/dark fast/slow early/late open/closed full/empty rich/poor "
        "strong/weak high/low long/short hard/soft wet/dry near/far day/night good/bad up/down first/last thick/thin "
        "clean/dirty loud/quiet right/wrong true/false sweet/bitter sharp/dull above/below before/after always/never "
        "inside/outside begin/end give/take push/pull come/go laugh/cry love/hate win/lose find/hide buy/sell "
        "remember/forget many/few deep/shallow wide/narrow brave/afraid kind/cruel wise/foolish"
    ).split()
)
OPPOSITES |= {right: left for left, right in OPPOSITES.items()}
NOUNS: tuple[str, ...] = tuple(word for group in CATEGORIES.values() for word in group)
WORDS: tuple[str, ...] = tuple(dict.fromkeys((*NOUNS, *OPPOSITES)))
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
NUMERALS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SYSTEM_TURNS = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "You are a small and friendly model. Answer with the result only.",
    "Give the answer and nothing else.",
)
PREFIX_TURN = 'Start every answer with "Answer:".'
HELD_OUT_IN = 10


@dataclass(frozen=True)
class Task:
    """One question with its only right answer; `content` names what it is about, whatever the phrasing."""

    kind: str
    content: str
    prompt: str
    answer: str


def is_held_out(kind: str, content: str) -> bool:
    """Whether a task belongs to the held-out tenth: a stable hash, the same on every machine and in every run."""
    digest = hashlib.blake2b(f"{kind}|{content}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_IN == 0


def _words(rng: random.Random, low: int, high: int) -> list[str]:
    return rng.sample(WORDS, rng.randint(low, high))


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words)


def _copy(rng: random.Random) -> Draw:
    text = " ".join(_words(rng, 2, 6))
    return text, (f"Repeat: {text}", f"Say this: {text}", f"Copy these words: {text}", f"Repeat after me: {text}"), text


def _reverse(rng: random.Random) -> Draw:
    words = _words(rng, 2, 5)
    text = " ".join(words)
    asks = (f"Reverse the order of the words: {text}", f"Say these words backwards: {text}", f"Reverse: {text}")
    return text, asks, " ".join(reversed(words))


def _count(rng: random.Random) -> Draw:
    words = _words(rng, 1, 8)
    text = " ".join(words)
    asks = (f"How many words are here: {text}", f"Count the words: {text}", f"Number of words in: {text}")
    return text, asks, str(len(words))


def _add(rng: random.Random) -> Draw:
    a, b = rng.randrange(100), rng.randrange(100)
    asks = (f"What is {a} + {b}?", f"{a} + {b} =", f"Add {a} and {b}.", f"What is {a} plus {b}?", f"{a} + {b}")
    return f"{min(a, b)} {max(a, b)}", asks, str(a + b)


def _subtract(rng: random.Random) -> Draw:
    b, a = sorted((rng.randrange(100), rng.randrange(100)))
    asks = (f"What is {a} - {b}?", f"{a} - {b} =", f"Subtract {b} from {a}.", f"What is {a} minus {b}?", f"{a} - {b}")
    return f"{a} {b}", asks, str(a - b)


def _compare(rng: random.Random) -> Draw:
    top = rng.choice((100, 1000))
    a, b = rng.sample(range(top), 2)
    if rng.random() < 0.5:
        asks = (f"Which is larger, {a} or {b}?", f"Which number is bigger: {a} or {b}?", f"The larger of {a} and {b}?")
        return f"max {a} {b}", asks, str(max(a, b))
    asks = (f"Which is smaller, {a} or {b}?", f"Which number is less: {a} or {b}?", f"The smaller of {a} and {b}?")
    return f"min {a} {b}", asks, str(min(a, b))


def _nth(rng: random.Random) -> Draw:
    words = _words(rng, 3, 6)
    at, text = rng.randrange(len(words)), _listed(words)
    name = ORDINALS[at]
    asks = (f"What is the {name} word: {text}?", f"Give the {name} word of: {text}", f"Pick the {name} word: {text}")
    return f"{at} {text}", asks, words[at]


def _ends(rng: random.Random) -> Draw:
    words = _words(rng, 2, 8)
    side, text = rng.choice(("first", "last")), " ".join(words)
    asks = (f"Which word comes {side}: {text}", f"What is the {side} word of this list: {text}", f"{side} word: {text}")
    return f"{side} {text}", asks, words[0 if side == "first" else -1]


def _sort(rng: random.Random) -> Draw:
    numbers = rng.sample(range(100), rng.randint(2, 5))
    text, down = ", ".join(map(str, numbers)), rng.random() < 0.3
    answer = ", ".join(map(str, sorted(numbers, reverse=down)))
    if down:
        return f"down {text}", (f"Sort from largest to smallest: {text}", f"Sort in descending order: {text}"), answer
    asks = (f"Sort these numbers: {text}", f"Put in order: {text}", f"Sort from smallest to largest: {text}")
    return f"up {text}", asks, answer


def _sequence(rng: random.Random) -> Draw:
    step = rng.choice((1, 2, 3, 4, 5, 10, -1, -2, -5))
    start = rng.randrange(100) if step > 0 else rng.randrange(-4 * step, 100)
    text = ", ".join(str(start + step * i) for i in range(4))
    asks = (f"What number comes next: {text}?", f"Continue: {text}", f"What is the next number after {text}?")
    return text, asks, str(start + 4 * step)


def _member(rng: random.Random) -> Draw:
    words = _words(rng, 2, 7)
    inside = rng.random() < 0.5
    word = rng.choice(words) if inside else rng.choice([w for w in WORDS if w not in words])
    text = _listed(words)
    asks = (f"Is {word} in this list: {text}?", f"Does the list contain {word}? {text}", f"Is {word} among: {text}?")
    return f"{word} in {text}", asks, "yes" if inside else "no"


def _repeat(rng: random.Random) -> Draw:
    word, times = rng.choice(WORDS), rng.randint(2, 7)
    name = rng.choice((str(times), NUMERALS[times - 1]))
    asks = (f"Repeat the word {word} {name} times.", f"Say {word} {name} times.", f"Write {word} {name} times.")
    return f"{word} {times}", asks, " ".join([word] * times)


def _opposite(rng: random.Random) -> Draw:
    words = rng.sample(tuple(OPPOSITES), rng.randint(2, 3))
    text = _listed(words)
    asks = (f"Give the opposites: {text}", f"What are the opposites of: {text}?", f"Opposite of each word: {text}")
    return text, asks, _listed([OPPOSITES[word] for word in words])


def _category(rng: random.Random) -> Draw:
    names = rng.sample(tuple(CATEGORIES), rng.randint(2, 4))
    words = [rng.choice(CATEGORIES[name]) for name in names]
    at, text = rng.randrange(len(words)), _listed(words)
    article = "an" if names[at][0] in "aeiou" else "a"
    name = f"{article} {names[at]}"
    asks = (f"Which of these is {name}: {text}?", f"Find {name}: {text}", f"Pick the word that is {name}: {text}")
    return f"{names[at]}: {text}", asks, words[at]


def _spell(rng: random.Random) -> Draw:
    words = rng.sample(WORDS, 2)
    text = " and ".join(words)
    asks = (f"Spell {text}.", f"Spell the words {text}.", f"How do you spell {text}?")
    return " ".join(words), asks, " ".join("-".join(word) for word in words)


def _parity(rng: random.Random) -> Draw:
    number = rng.randrange(3000)
    asks = (f"Is {number} even or odd?", f"Even or odd: {number}", f"Is the number {number} odd or even?")
    return str(number), asks, ("even", "odd")[number % 2]


def _remove(rng: random.Random) -> Draw:
    words = _words(rng, 3, 6)
    word, text = rng.choice(words), " ".join(words)
    asks = (f"Remove {word} from: {text}", f"Leave out {word}: {text}", f"Say this without {word}: {text}")
    return f"{word} {text}", asks, " ".join(w for w in words if w != word)


def _replace(rng: random.Random) -> Draw:
    new, *words = _words(rng, 3, 6)
    old, text = rng.choice(words), " ".join(words)
    asks = (f"Replace {old} with {new}: {text}", f"Change {old} to {new} in: {text}", f"Put {new} for {old}: {text}")
    return f"{old} {new} {text}", asks, " ".join(new if w == old else w for w in words)


KINDS: dict[str, Callable[[random.Random], Draw]] = {
    "copy": _copy,
    "reverse": _reverse,
    "count": _count,
    "add": _add,
    "subtract": _subtract,
    "compare": _compare,
    "nth": _nth,
    "ends": _ends,
    "sort": _sort,
    "sequence": _sequence,
    "member": _member,
    "repeat": _repeat,
    "opposite": _opposite,
    "category": _category,
    "spell": _spell,
    "parity": _parity,
    "remove": _remove,
    "replace": _replace,
}


def draw_task(kind: str, rng: random.Random, held_out: bool) -> Task:
    """Draw one task of `kind` from the training nine tenths, or from the held-out tenth."""
    while True:
        content, phrasings, answer = KINDS[kind](rng)
        if is_held_out(kind, content) == held_out:
            return Task(kind, content, rng.choice(phrasings), answer)


def dialogue(rng: random.Random, task: Task) -> list[Message]:
    """Messages that end with the answer of `task`: sometimes under a system turn, sometimes after another task."""
    prefix = ""
    messages: list[Message] = []
    if (roll := rng.random()) < 0.2:
        messages.append({"role": "system", "content": rng.choice(SYSTEM_TURNS)})
    elif roll < 0.25:
        messages.append({"role": "system", "content": PREFIX_TURN})
        prefix = "Answer: "
    earlier = [draw_task(rng.choice(tuple(KINDS)), rng, False)] if rng.random() < 0.2 else []
    for each in (*earlier, task):
        messages.append({"role": "user", "content": each.prompt})
        messages.append({"role": "assistant", "content": prefix + each.answer})
    return messages


def train_dialogue(rng: random.Random) -> list[Message]:
    """One training dialogue about a random kind; nothing in it is held out."""
    return dialogue(rng, draw_task(rng.choice(tuple(KINDS)), rng, False))


def held_out_dialogues(kind: str, count: int, seed: int) -> list[list[Message]]:
    """`count` dialogues on different held-out contents of `kind`; the last message of each is the right answer."""
    rng = random.Random(f"{seed}|{kind}")
    tasks: dict[str, Task] = {}
    for _ in range(200 * count):
        task = draw_task(kind, rng, True)
        tasks.setdefault(task.content, task)
        if len(tasks) == count:
            return [dialogue(rng, task) for task in tasks.values()]
    raise ValueError(f"kind {kind!r} holds fewer than {count} held-out tasks; ask for {len(tasks)}")
