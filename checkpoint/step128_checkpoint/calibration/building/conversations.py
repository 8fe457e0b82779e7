"""Generated conversations. Their facts are computed or quoted from Python's library, so what they say is true."""

from __future__ import annotations

import datetime
import json
import random
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

from step128_checkpoint.calibration.building import library
from step128_checkpoint.calibration.building.documents import Document, Message
from step128_checkpoint.calibration.building.words import (
    CITIES,
    GIVEN_NAMES,
    LANGUAGES,
    MONTHS,
    PRODUCTS,
    TOPICS,
    WEEKDAYS,
    clock,
    date,
    listed,
    person,
    sentences,
)

_SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a careful programmer. Explain briefly, then show code.",
    "Answer in the user's language. Be concise.",
    "You are an assistant in an office. Today is a working day; ask back if something is unclear.",
    "You are a patient tutor: show each step of a calculation.",
    "Reply in Markdown.",
)
_Turns = list[Message]


def conversations(rng: random.Random) -> Iterator[Document]:
    """Conversations of every kind, without end: code, calculation, data, languages, letters, plans."""
    functions = library.functions(rng)
    kinds: tuple[Callable[[], _Turns], ...] = (
        lambda: _explain(rng, next(functions)),
        lambda: _write(rng, next(functions)),
        lambda: _document(rng, next(functions)),
        lambda: _shopping(rng),
        lambda: _schedule(rng),
        lambda: _extract(rng),
        lambda: _table(rng),
        lambda: _translate(rng),
        lambda: _letter(rng),
        lambda: _sorting(rng),
    )
    weights = (5, 5, 3, 2, 2, 2, 2, 3, 2, 2)
    for number in count(1):
        turns = rng.choices(kinds, weights)[0]()
        if rng.random() < 0.25:
            turns += _thanks(rng)
        if rng.random() < 0.35:
            turns.insert(0, {"role": "system", "content": rng.choice(_SYSTEM_PROMPTS)})
        variables: dict[str, Any] = {}
        if rng.random() < 0.25:
            variables["reasoning_effort"] = rng.choice(("low", "medium", "high"))
        yield Document(f"conversation {number}", messages=tuple(turns), variables=variables)


def user(text: str) -> Message:
    """What the user says."""
    return {"role": "user", "content": text}


def assistant(text: str, reasoning: str = "") -> Message:
    """What the model says, and thinks before."""
    message: Message = {"role": "assistant", "content": text}
    return message | {"reasoning_content": reasoning} if reasoning else message


def _thanks(rng: random.Random) -> _Turns:
    asked = rng.choice(("Thanks!", "Great, thank you.", "ok, that helps", "Perfect. That's all for now."))
    return [user(asked), assistant(rng.choice(("You're welcome!", "Glad to help.", "Happy to help. Good luck!")))]


def _explain(rng: random.Random, function: library.Function) -> _Turns:
    asked = rng.choice(
        (
            "What does this function do?",
            f"I found this in `{function.module}`. Can you explain it?",
            "Explain this code to me in a few sentences.",
            "can you tell me what this does and what its arguments mean",
        )
    )
    lines = [f"`{function.name}` is part of `{function.module}`. {function.docstring}"]
    if function.parameters:
        lines.append("Its parameters:")
        lines += [
            f"- `{name}`" + (f", `{default}` unless given" if default else ", required")
            for name, default in function.parameters
        ]
    reasoning = (
        f"The user shows a function called {function.name} with the arguments ({function.arguments}). The docstring "
        f"says: {function.summary} I explain that and list the parameters."
    )
    return [user(f"{asked}\n\n```python\n{function.source}\n```"), assistant("\n".join(lines), reasoning)]


def _write(rng: random.Random, function: library.Function) -> _Turns:
    asked = rng.choice(("Write a Python function", "Please implement a Python function", "I need a Python function"))
    text = f"{asked} `{function.name}({function.arguments})` that does this:\n\n{function.docstring}"
    reasoning = f"I need to implement {function.name}. {function.summary}"
    opening = rng.choice(("Here it is:", "This does what you describe:", "Here is an implementation:"))
    return [user(text), assistant(f"{opening}\n\n```python\n{function.source}\n```", reasoning)]


def _document(rng: random.Random, function: library.Function) -> _Turns:
    signature = f"{function.module}.{function.name}({function.arguments})"
    parts = [part for part in function.docstring.split("\n\n") if part.strip()]
    if len(parts) > 1 and rng.random() < 0.5:
        asked = "Give me one line for each of these points."
        answer = "\n".join(f"{i}. {' '.join(part.split())[:160]}" for i, part in enumerate(parts, start=1))
        return [user(f"{asked}\n\n{function.docstring}"), assistant(answer)]
    asked = "What is the first sentence of its documentation?"
    return [user(f"`{signature}`\n\n{asked}"), assistant(function.summary, f"They ask about {signature}.")]


def _shopping(rng: random.Random) -> _Turns:
    buyer, items = rng.choice(GIVEN_NAMES), rng.sample(PRODUCTS, rng.randint(2, 4))
    rows = [(item, rng.randint(1, 9), rng.randrange(150, 9000) / 100) for item in items]
    discount = rng.choice((0, 5, 10, 15, 20, 25))
    bought = listed([f"{number} x {item} at {price:.2f} each" for item, number, price in rows])
    text = f"{buyer} buys {bought}." + (f" There is a discount of {discount} %." if discount else "")
    subtotals = [round(number * price, 2) for _, number, price in rows]
    total = round(sum(subtotals), 2)
    steps = [
        f"{number} x {price:.2f} = {subtotal:.2f} for {item}"
        for (item, number, price), subtotal in zip(rows, subtotals, strict=True)
    ]
    final = round(total * (100 - discount) / 100, 2)
    reasoning = "I add up the lines. " + "; ".join(steps) + f". Together {total:.2f}."
    if discount:
        reasoning += f" {discount} % of {total:.2f} is {total - final:.2f}, which leaves {final:.2f}."
    asked = rng.choice(("How much is it in total?", "What does that cost?", "What is the total?"))
    answer = "\n".join(f"- {step}" for step in steps) + f"\n\nThe total is **{final:.2f}**."
    return [user(f"{text} {asked}"), assistant(answer, reasoning)]


def _schedule(rng: random.Random) -> _Turns:
    start = datetime.date(rng.randrange(2019, 2030), rng.randrange(1, 13), rng.randrange(1, 29))
    days = rng.randrange(5, 400)
    end = start + datetime.timedelta(days=days)
    topic = rng.choice(TOPICS)
    written = f"{start.day} {MONTHS[start.month - 1]} {start.year}"
    text = f"Work on {topic} starts on {written} and takes {days} days. On which date and weekday does it end?"
    weeks, rest = divmod(days, 7)
    first = WEEKDAYS[start.weekday()]
    reasoning = (
        f"{written} is a {first}. {days} days are {weeks} weeks and {rest} days, so the weekday moves on by {rest}. "
        f"Counting {days} days from {start.isoformat()} gives {end.isoformat()}."
    )
    answer = f"It ends on {WEEKDAYS[end.weekday()]}, {end.day} {MONTHS[end.month - 1]} {end.year}."
    turns = [user(text), assistant(answer, reasoning)]
    if rng.random() < 0.5:
        again = start + datetime.timedelta(days=days + 7)
        turns += [user("And if it takes a week longer?"), assistant(f"Then on {again.isoformat()}, the same weekday.")]
    return turns


def _extract(rng: random.Random) -> _Turns:
    sender, receiver, topic = person(rng), person(rng), rng.choice(TOPICS)
    record = {
        "from": sender,
        "to": receiver,
        "topic": topic,
        "date": date(rng),
        "time": clock(rng),
        "city": rng.choice(CITIES),
        "people": rng.randrange(2, 15),
    }
    text = rng.choice(
        (
            "Dear {to},\n\ncan we meet in {city} on {date} at {time} to talk about {topic}? We will be {people} people."
            "\n\nBest regards\n{from}",
            "hi {to}, quick note: {topic} is on for {date}, {time}, at our place in {city}. {people} of us are coming. "
            "/{from}",
            "{to}: please book a room for {people} in {city}. Subject: {topic}. When: {date}, {time}. Thanks, {from}",
        )
    ).format(**record)
    keys = rng.sample(sorted(record), rng.randint(3, len(record)))
    wanted = {key: record[key] for key in keys}
    asked = f"Extract {listed([f'`{key}`' for key in keys])} from this message as JSON. Reply with JSON only."
    reasoning = "The fields are " + "; ".join(f"{key}: {value}" for key, value in wanted.items()) + "."
    return [user(f"{asked}\n\n{text}"), assistant(json.dumps(wanted, indent=2, ensure_ascii=False), reasoning)]


def _table(rng: random.Random) -> _Turns:
    rows = [(name, rng.choice(CITIES), rng.randrange(20, 900)) for name in rng.sample(GIVEN_NAMES, rng.randint(4, 8))]
    header = ("name", "city", rng.choice(("orders", "points", "hours", "tickets")))
    as_csv = "\n".join(",".join(map(str, row)) for row in (header, *rows))
    best = max(rows, key=lambda row: row[2])
    total = sum(row[2] for row in rows)
    asked, answer = rng.choice(
        (
            (
                "Turn this CSV into a Markdown table, largest first.",
                "\n".join(
                    f"| {' | '.join(map(str, row))} |"
                    for row in (header, ("---",) * 3, *sorted(rows, key=lambda row: -row[2]))
                ),
            ),
            (
                f"Who has the most {header[2]}, and how many are there in all?",
                f"{best[0]} ({best[1]}) has the most, {best[2]}. In all there are {total}.",
            ),
            (
                "Give me this as a JSON list of objects.",
                "```json\n"
                + json.dumps([dict(zip(header, row, strict=True)) for row in rows], ensure_ascii=False, indent=1)
                + "\n```",
            ),
        )
    )
    reasoning = f"There are {len(rows)} rows. " + (
        "Adding: " + " + ".join(str(row[2]) for row in rows) + f" = {total}."
    )
    return [user(f"{asked}\n\n{as_csv}"), assistant(answer, reasoning)]


def _translate(rng: random.Random) -> _Turns:
    origin, target = rng.sample(sorted(LANGUAGES), 2)
    pairs = sentences(rng, rng.randint(1, 4), LANGUAGES[origin], LANGUAGES[target])
    asked = rng.choice(
        (f"Translate into {target}:", f"How do you say this in {target}?", f"{origin} -> {target}, please")
    )
    answer = "\n".join(translated for _, translated in pairs)
    return [
        user(asked + "\n\n" + "\n".join(original for original, _ in pairs)),
        assistant(answer, f"The text is {origin}; they want it in {target}. I keep names and numbers."),
    ]


def _letter(rng: random.Random) -> _Turns:
    sender, receiver, topic, when = person(rng), person(rng), rng.choice(TOPICS), date(rng)
    product, number = rng.choice(PRODUCTS), rng.randrange(1000, 99999)
    asked, body = rng.choice(
        (
            (
                f"Write a short, polite email from {sender} to {receiver}: the meeting about {topic} moves to {when}.",
                f"the meeting about {topic} has to be moved. The new date is {when}. Please tell me by the day before "
                "whether this suits you; otherwise I will look for another date.",
            ),
            (
                f"{receiver} ordered a {product} (order {number}) that arrives late, on {when}. Apologise as {sender}.",
                f"I am sorry that your order {number} ({product}) is late. It is on its way and should arrive on "
                f"{when}. If you no longer need it, we will refund the full price.",
            ),
            (
                f"Remind {receiver}, from {sender}, that notes on {topic} are due on {when}. Friendly, two sentences.",
                f"just a friendly reminder that your notes on {topic} are due on {when}. Let me know if anything is "
                "holding you up, and I will gladly help.",
            ),
        )
    )
    answer = f"Dear {receiver.split()[0]},\n\n{body}\n\nKind regards\n{sender}"
    turns = [user(asked), assistant(answer, f"An email from {sender} to {receiver}, dated {when}. Polite and short.")]
    if rng.random() < 0.4:
        turns += [user("Shorter please."), assistant(body.split(". ")[0].rstrip(".").capitalize() + ".")]
    return turns


def _sorting(rng: random.Random) -> _Turns:
    numbers = [rng.randrange(1, 100) for _ in range(rng.randint(4, 7))]
    asked = f"Sort {numbers} by insertion and show the list after each step."
    current, steps = list(numbers), []
    for i in range(1, len(current)):
        current[: i + 1] = sorted(current[: i + 1])
        steps.append(f"{i}. insert {numbers[i]}: {current}")
    reasoning = f"I take each number from the second on and put it in its place. The smallest is {min(numbers)}."
    return [user(asked), assistant("\n".join(steps) + f"\n\nSorted: {current}", reasoning)]
