"""Dialogues without a checkable answer for the bundled tiny model: greetings, who it is, and stories.

The stories are passages of the training corpus, so "tell me a story" is answered in the words of the old books, and a
question that the model cannot know is answered by saying so.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

Message = dict[str, str]

IDENTITY = (
    "I am the tiny model of minivllm. I know a few small tasks and how old stories sound.",
    "I am the tiny model of minivllm, trained from scratch in a few minutes.",
)
ABILITIES = (
    "I can tell a story, repeat and reverse words, spell, sort numbers, and add or subtract below one hundred.",
    "I can do small tasks with words and numbers, and I can tell you a story.",
)
UNKNOWN = (
    "I am too small to know that. Ask me for a story, or to add two numbers.",
    "I do not know that. I am only a tiny model, but I can tell you a story.",
)
TALK: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("hello", "hi", "hey", "hi there", "hello there", "good morning", "good day", "good evening", "greetings"),
        ("Hello! How can I help you?", "Hello! Shall I tell you a story?"),
    ),
    (
        ("how are you", "how are you today", "how do you do", "how is it going"),
        ("I am very well, thank you. How can I help you?", "Very well, thank you."),
    ),
    (
        (
            "who are you", "what are you", "what is your name", "tell me about yourself", "introduce yourself",
            "what's your name", "what model are you", "are you a person", "are you human", "who is this",
        ),
        IDENTITY,
    ),
    (
        ("who made you", "where do you come from", "who trained you", "how were you made", "what is minivllm"),
        (
            "I come with minivllm, a small engine for language models. I was trained on old books.",
            "I was trained from scratch for minivllm, on old books and small tasks.",
        ),
    ),
    (
        ("what can you do", "can you help me", "help", "how can you help me", "what do you know", "i need help"),
        ABILITIES,
    ),
    (("thank you", "thanks", "thanks a lot", "thank you very much", "great", "well done"), ("You are welcome.",)),
    (("goodbye", "bye", "good night", "see you", "farewell"), ("Goodbye! Come back soon.",)),
)  # fmt: skip
QUESTIONS = (
    "what is the capital of {}", "where is {}", "who is the president of {}", "how many people live in {}",
    "tell me about {}", "what is {}", "write a poem about {}", "write a program about {}", "explain {}", "why is {} so",
    "who invented {}", "how does {} work", "what do you think of {}", "how far is {}", "translate {} into French",
    "when was {} made", "what is the meaning of {}", "how old is {}", "do you like {}", "what is the weather in {}",
)  # fmt: skip
TOPICS = (
    "France", "London", "Germany", "China", "the moon", "the sky", "love", "life", "a computer", "Python", "gravity",
    "music", "the sun", "America", "Paris", "India", "physics", "war", "history", "football", "the internet", "time",
    "electricity", "the world", "money", "the ocean", "Japan", "a car", "science", "language models", "mathematics",
)  # fmt: skip
STORY_ASKS = (
    "tell me a story", "tell me a fairy tale", "please tell me a story", "can you tell me a story", "write a story",
    "tell a story", "write me a short story", "tell me a tale", "i want to hear a story", "once more, a story",
    "tell me another story", "a story, please", "tell me a bedtime story", "write a fairy tale",
)  # fmt: skip
CONTINUE_ASKS = ("Continue this story: ", "Continue: ", "Go on with this story: ", "What happens next? ")


def _as_typed(rng: random.Random, text: str, mark: str) -> str:
    """The text as people type it: with or without a capital letter and a closing mark."""
    if rng.random() < 0.6:
        text = text[0].upper() + text[1:]
    return text + mark if rng.random() < 0.6 else text


def _small_talk(rng: random.Random) -> list[Message]:
    if rng.random() < 0.3:
        ask = rng.choice(QUESTIONS).format(rng.choice(TOPICS))
        answers: Sequence[str] = UNKNOWN
    else:
        asks, answers = rng.choice(TALK)
        ask = rng.choice(asks)
    mark = "?" if ask.split()[0] in ("what", "who", "how", "where", "are", "can", "do", "when", "why") else "."
    return _turn(_as_typed(rng, ask, mark), rng.choice(answers))


def _turn(ask: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]


def _story(rng: random.Random, openings: Sequence[str], passages: Sequence[tuple[str, str]]) -> list[Message]:
    if rng.random() < 0.3:
        return _turn(_as_typed(rng, rng.choice(STORY_ASKS), "."), rng.choice(openings))
    begin, rest = rng.choice(passages)
    return _turn(rng.choice(CONTINUE_ASKS) + begin, rest)


def talk_dialogue(
    rng: random.Random, openings: Sequence[str], passages: Sequence[tuple[str, str]], story_share: float
) -> list[Message]:
    """One dialogue of one or two turns; `passages` are (beginning, continuation) pairs of stories."""
    messages = _small_talk(rng)
    if rng.random() < story_share:
        story = _story(rng, openings, passages)
        messages = messages + story if rng.random() < 0.15 else story
    elif rng.random() < 0.3:
        messages += _small_talk(rng)
    return messages
