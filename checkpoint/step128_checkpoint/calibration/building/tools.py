"""Tools that generated conversations offer and call: schemas, arguments, results, and sentences about them.

The same tool comes under several names and wordings, as different clients write it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from step128_checkpoint.calibration.building.documents import Message
from step128_checkpoint.calibration.building.library import Function
from step128_checkpoint.calibration.building.words import CITIES, MONTHS, PRODUCTS, TOPICS, clock, date, person

Values = dict[str, Any]


@dataclass(frozen=True)
class Tool:
    """``words`` name it; ``parameters``: name -> (JSON type, description, required, maker of a value).

    ``asked`` are questions with the parameters' names in braces; ``result`` makes what the tool returns, and ``told``
    are answers with the names of parameters and of the result's fields.
    """

    words: str
    description: str
    parameters: dict[str, tuple[str, str, bool, Callable[[random.Random], Any]]]
    asked: tuple[str, ...]
    result: Callable[[random.Random, Values], Values]
    told: tuple[str, ...]


def _one_of(*values: Any) -> Callable[[random.Random], Any]:
    return lambda rng: rng.choice(values)


def _between(low: int, high: int) -> Callable[[random.Random], int]:
    return lambda rng: rng.randrange(low, high)


_CITY = ("string", "Name of the city", True, _one_of(*CITIES))
_DATE = ("string", "Date, YYYY-MM-DD", True, date)
_COLUMNS = {"city": CITIES, "product": PRODUCTS, "month": MONTHS}
_RATES = {"EUR": 1.0, "USD": 1.08, "GBP": 0.85, "JPY": 161.0, "CHF": 0.95, "SEK": 11.4, "INR": 90.2, "CNY": 7.8}

TOOLS: tuple[Tool, ...] = (
    Tool(
        "get weather",
        "Current weather of a city",
        {"city": _CITY, "unit": ("string", "celsius or fahrenheit", False, _one_of("celsius", "fahrenheit"))},
        ("What's the weather in {city}?", "Do I need a coat in {city} today? ({unit} please)", "weather {city}"),
        lambda rng, v: {
            "condition": rng.choice(("sunny", "light rain", "overcast", "snow", "windy", "fog")),
            "temperature": rng.randrange(-5, 36),
            "humidity": rng.randrange(20, 99),
        },
        ("In {city} it is {temperature} degrees: {condition}, with {humidity} % humidity.",),
    ),
    Tool(
        "search flights",
        "Find flights between two cities on a date",
        {
            "origin": _CITY,
            "destination": ("string", "City to fly to", True, _one_of(*reversed(CITIES))),
            "date": _DATE,
            "passengers": ("integer", "Number of travellers", False, _between(1, 6)),
        },
        (
            "I need to fly from {origin} to {destination} on {date}, {passengers} people.",
            "Find me a flight {origin} - {destination} for {date}; we are {passengers}.",
        ),
        lambda rng, v: {
            "flight": f"{rng.choice('ABKLQSTX')}{rng.choice('AFLMRXZ')}{rng.randrange(100, 9999)}",
            "departure": clock(rng),
            "price": rng.randrange(49, 1200),
        },
        ("Flight {flight} leaves {origin} at {departure} and costs {price} euros for {passengers} travellers.",),
    ),
    Tool(
        "convert currency",
        "Convert an amount of money at today's rate",
        {
            "amount": ("number", "How much", True, lambda rng: rng.randrange(100, 500000) / 100),
            "from_currency": ("string", "ISO 4217 code", True, _one_of(*_RATES)),
            "to_currency": ("string", "ISO 4217 code", True, _one_of(*reversed(_RATES))),
        },
        ("How much is {amount} {from_currency} in {to_currency}?", "{amount} {from_currency} -> {to_currency}"),
        lambda rng, v: {"result": round(v["amount"] / _RATES[v["from_currency"]] * _RATES[v["to_currency"]], 2)},
        ("{amount} {from_currency} are {result} {to_currency} at today's rate.",),
    ),
    Tool(
        "create event",
        "Add an event to the user's calendar",
        {
            "title": ("string", "What it is about", True, _one_of(*TOPICS)),
            "date": _DATE,
            "start": ("string", "Start, HH:MM", True, clock),
            "minutes": ("integer", "Length in minutes", False, _one_of(15, 30, 45, 60, 90)),
            "guests": ("array", "Names of the guests", False, lambda rng: [person(rng) for _ in range(2)]),
        },
        (
            "Put {title} into my calendar on {date} at {start}, {minutes} minutes, and invite {guests}.",
            "Schedule {minutes} minutes for {title} on {date}, {start}. Guests: {guests}",
        ),
        lambda rng, v: {"event_id": f"ev_{rng.getrandbits(40):010x}", "conflicts": []},
        ("Done: {title} is in your calendar on {date} at {start} ({event_id}). There are no conflicts.",),
    ),
    Tool(
        "find product",
        "Search the shop's catalogue",
        {
            "query": ("string", "What to look for", True, _one_of(*PRODUCTS)),
            "max_price": ("number", "Highest price in euros", False, _between(10, 300)),
            "in_stock": ("boolean", "Only what can be sent today", False, _one_of(True, False)),
        },
        ("I'm looking for a {query} under {max_price} euros.", "do you have a {query}? max {max_price}"),
        lambda rng, v: {
            "sku": f"{rng.choice('ABCDEFGH')}-{rng.randrange(10000, 99999)}",
            "price": round(v.get("max_price", 80) * rng.uniform(0.4, 1), 2),
            "left": rng.randrange(1, 60),
        },
        ("Yes: a {query} for {price} euros (number {sku}); {left} are left.",),
    ),
    Tool(
        "order status",
        "Where an order is",
        {"order_number": ("string", "Number on the confirmation", True, lambda rng: str(rng.randrange(10**6, 10**7)))},
        ("Where is my order {order_number}?", "Order {order_number} has not arrived. What happened?"),
        lambda rng, v: {
            "status": rng.choice(("packed", "shipped", "at customs", "delivered")),
            "expected": f"{rng.randrange(1, 29)} {rng.choice(MONTHS)}",
        },
        ("Your order {order_number} is {status}; the expected date is {expected}.",),
    ),
    Tool(
        "query database",
        "Run a read-only SQL query and return its rows",
        {
            "sql": (
                "string",
                "One SELECT statement",
                True,
                lambda rng: (
                    f"SELECT {rng.choice(list(_COLUMNS))}, {rng.choice(('COUNT(*)', 'SUM(amount)'))} "
                    f"AS value FROM {rng.choice(('orders', 'visits', 'tickets'))} "
                    f"WHERE year = {rng.randrange(2015, 2027)} GROUP BY 1 ORDER BY 2 DESC LIMIT {rng.randrange(1, 9)}"
                ),
            )
        },
        ("Run this for me and tell me the first row:\n{sql}", "{sql}\n\nWhat comes out?"),
        lambda rng, v: {
            "first": rng.choice(_COLUMNS[v["sql"].split()[1].rstrip(",")]),
            "value": rng.randrange(10, 9999),
            "rows": int(v["sql"].split()[-1]),
        },
        ("The first of {rows} rows is {first}, with {value}.",),
    ),
    Tool(
        "send message",
        "Send a message to a person or channel",
        {
            "recipient": ("string", "Name or #channel", True, person),
            "text": ("string", "The message", True, lambda rng: f"Reminder: {rng.choice(TOPICS)}, {date(rng)}."),
            "urgent": ("boolean", "Notify at once", False, _one_of(True, False)),
        },
        ('Tell {recipient}: "{text}"', "Send {recipient} this message: {text}"),
        lambda rng, v: {"delivered": True, "message_id": rng.randrange(10**8, 10**9)},
        ("I have sent it to {recipient}.", "Sent: message {message_id} to {recipient}."),
    ),
    Tool(
        "distance between",
        "Distance and travel time between two places",
        {
            "start": _CITY,
            "end": ("string", "Where to", True, _one_of(*reversed(CITIES))),
            "mode": ("string", "car, train or bicycle", False, _one_of("car", "train", "bicycle")),
        },
        ("How far is it from {start} to {end} by {mode}?", "{start} to {end} by {mode}: how long?"),
        lambda rng, v: {"kilometres": rng.randrange(40, 2400), "hours": round(rng.uniform(0.5, 30), 1)},
        ("From {start} to {end} by {mode} it is {kilometres} km, about {hours} hours.",),
    ),
    Tool(
        "set thermostat",
        "Set the temperature of a room",
        {
            "room": ("string", "Which room", True, _one_of("kitchen", "bedroom", "office", "bathroom", "living room")),
            "degrees": ("number", "Target in degrees Celsius", True, lambda rng: rng.randrange(32, 50) / 2),
        },
        ("Make the {room} {degrees} degrees.", "Heat the {room} to {degrees}, please."),
        lambda rng, v: {"was": rng.randrange(28, 48) / 2, "ok": True},
        ("The {room} was at {was} and is now set to {degrees} degrees.",),
    ),
)


def written_name(rng: random.Random, words: str) -> str:
    """The words as a function name in one of the usual spellings."""
    parts = words.split()
    style = rng.randrange(4)
    if style == 0:
        return parts[0] + "".join(part.capitalize() for part in parts[1:])
    if style == 1:
        return f"{rng.choice(('api', 'assistant', 'home', 'office'))}_" + "_".join(parts)
    return "_".join(parts)


def schema(rng: random.Random, tool: Tool, name: str) -> Message:
    """The tool's definition; descriptions of parameters are sometimes left out."""
    described = rng.random() < 0.75
    properties = {
        parameter: {"type": kind}
        | ({"items": {"type": "string"}} if kind == "array" else {})
        | ({"description": text} if described else {})
        for parameter, (kind, text, _, _) in tool.parameters.items()
    }
    required = [parameter for parameter, (_, _, needed, _) in tool.parameters.items() if needed]
    description = tool.description + rng.choice(("", ".", ". Use it only if the user asks for it."))
    return _definition(name, description, properties, required)


def function_schema(function: Function) -> Message:
    """A tool made of a function of Python's library."""
    properties = {name: {"type": _json_type(default)} for name, default in function.parameters}
    required = [name for name, default in function.parameters if not default]
    name = f"{function.module.rpartition('.')[2]}_{function.name}".strip("_")
    return _definition(name, function.summary[:200], properties, required)


def _definition(name: str, description: str, properties: Values, required: list[str]) -> Message:
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _json_type(default: str) -> str:
    if default in ("True", "False"):
        return "boolean"
    if default.lstrip("-").isdigit():
        return "integer"
    return {"(": "array", "[": "array", "{": "object"}.get(default[:1], "string")
