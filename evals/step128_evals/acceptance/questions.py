"""What the domains ``chat`` and ``maths`` ask: everyday questions, and word problems made with a seed."""

from __future__ import annotations

import random

CHAT = (
    "What is a good way to learn the names of thirty new colleagues?",
    "Explain to a ten-year-old why the sky turns red in the evening.",
    "Write a short, friendly reminder to a neighbour about the noise after eleven.",
    "I have eggs, rice, spinach and half a lemon. What can I cook tonight?",
    "What is the difference between a virus and a bacterium?",
    "Give me three arguments for and three against working from home.",
    "How do I get red wine out of a white tablecloth?",
    "Tell me a story of about a hundred words about a lighthouse keeper who is afraid of the dark.",
    "Which questions should I ask before I sign the contract for a flat?",
    "Summarise how a bill becomes a law in a parliament of two chambers.",
    "My bicycle's chain skips under load. What should I check, in which order?",
    "What does it mean when someone says that correlation is not causation? Give an example.",
    "Plan a day in a city with children of four and nine, in the rain.",
    "Write a poem of eight lines about the first frost.",
    "How does a heat pump heat a house when it is cold outside?",
    "Draft an e-mail that declines an invitation to speak at a conference, and keeps the door open.",
    "What should be in a first-aid kit for a three-day hike?",
    "Explain compound interest with numbers.",
    "Why do languages borrow words from each other? Name some examples.",
    "Suggest a training plan of six weeks for a first run of ten kilometres.",
    "What is the trolley problem, and why do people disagree about it?",
    "How can I tell whether an e-mail that claims to be from my bank is genuine?",
    "Compare the taste and use of thyme, sage and rosemary.",
    "What happens in the body between falling asleep and waking up?",
)

_PROBLEMS = (
    "A shop gets {a} boxes with {b} pens each and sells {c} pens. How many pens are left?",
    "A train covers {a} kilometres in {b} hours, then {c} kilometres in 2 hours. What is its average speed?",
    "{a} friends share a bill of {b} euros and each adds a tip of {c} euros. How much does each of them pay?",
    "A tank holds {a}00 litres. A pipe fills {b} litres a minute, a leak loses {c}. How long until it is full?",
    "A book has {a}0 pages. Mia reads {b} pages on each of the first {c} days. How many pages are left for her?",
    "A farmer plants {a} rows of {b} trees. {c} trees die in the first winter, and half of them are replaced. "
    "How many trees stand in the end?",
    "A coat costs {a}0 euros. It becomes {b} per cent cheaper, then {c} euros cheaper. What does it cost now?",
    "A is {a} years old and B is {b}. In how many years will their ages add up to {c}0 more than now?",
)


def word_problems(count: int, seed: int) -> list[str]:
    """So many problems of arithmetic, the same for the same seed."""
    draw = random.Random(seed)
    problems = []
    for index in range(count):
        a, b, c = draw.randint(12, 40), draw.randint(5, 11), draw.randint(2, 4)
        problem = _PROBLEMS[index % len(_PROBLEMS)].format(a=a, b=b, c=c)
        problems.append(f"{problem} Work it out step by step.")
    return problems
