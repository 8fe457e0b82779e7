"""Generated dialogues: questions with memorised answers, reasoning, and tool calls only where the tool is offered.

Each dialogue is a (messages, template variables) pair, rendered through the chat template like every served request.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .knowledge import CAPITALS, CITIES, CONDITIONS, EFFORT_NOTE, FACT_QUESTIONS, FACTS, GREETINGS, NAMES_OF_THIS_MODEL

Message = dict[str, Any]


@dataclass(frozen=True)
class Dialogue:
    """Messages and what else the chat template is given."""

    messages: list[Message]
    variables: dict[str, Any] = field(default_factory=dict)


def weather_tool(rng: random.Random) -> Message:
    """get_weather(city), its schema worded as different clients word it."""
    parameter: Message = {"type": "string"}
    if rng.random() < 0.5:
        parameter["description"] = rng.choice(["The city", "City name", "Name of the city"])
    return _tool("get_weather", rng, ["Get the weather of a city", "Current weather in a city"], {"city": parameter})


def time_tool(rng: random.Random) -> Message:
    """get_time(city)."""
    return _tool("get_time", rng, ["Get the local time of a city", "Time in a city"], {"city": {"type": "string"}})


def add_tool(rng: random.Random) -> Message:
    """add(a, b)."""
    number = {"type": rng.choice(["integer", "number"])}
    return _tool("add", rng, ["Add two numbers", "The sum of two numbers"], {"a": number, "b": number})


def _tool(name: str, rng: random.Random, descriptions: list[str], properties: Message) -> Message:
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    tail = rng.choice(["", "."])
    return {
        "type": "function",
        "function": {"name": name, "description": rng.choice(descriptions) + tail, "parameters": schema},
    }


TOOLS: dict[str, Callable[[random.Random], Message]] = {
    "get_weather": weather_tool,
    "get_time": time_tool,
    "add": add_tool,
}


def _offer(rng: random.Random, needed: str | None) -> list[Message]:
    """Tools including `needed`, others at random, in random order."""
    names = [name for name in TOOLS if name == needed or rng.random() < (0.3 if needed else 0.5)]
    rng.shuffle(names)
    return [TOOLS[name](rng) for name in names]


def _answer(reasoning: str, content: str) -> Message:
    return {"role": "assistant", "reasoning_content": reasoning, "content": content}


def _spelling(rng: random.Random, question: str) -> str:
    """The question as people type it: sometimes without its mark or capital letter."""
    if rng.random() < 0.15:
        question = question[0].lower() + question[1:]
    return question.rstrip("?.") if rng.random() < 0.1 else question


def _plain(rng: random.Random) -> tuple[str, str, str]:
    """A question, the reasoning and the answer, none of which needs a tool."""
    kind = rng.random()
    if kind < 0.6:
        topic = rng.choice(sorted(FACTS))
        return rng.choice(FACT_QUESTIONS).format(topic), f"The user asks about {topic}.", FACTS[topic]
    if kind < 0.75:
        country = rng.choice(sorted(CAPITALS))
        question = rng.choice(["What is the capital of {}?", "Name the capital of {}.", "Capital of {}?"])
        answer = f"The capital of {country} is {CAPITALS[country]}."
        return question.format(country), f"The user asks for the capital of {country}.", answer
    if kind < 0.85:
        a, b = rng.randrange(10), rng.randrange(10)
        question = rng.choice(["What is {} + {}?", "What is {} plus {}?", "Add {} and {}."])
        return question.format(a, b), f"The user asks for {a} + {b}.", f"{a} + {b} = {a + b}."
    if kind < 0.95:
        question, answer = rng.choice(GREETINGS)
        return question, "The user greets me.", answer
    question, answer = rng.choice(NAMES_OF_THIS_MODEL)
    return question, "The user asks about me.", answer


def question_dialogue(rng: random.Random) -> Dialogue:
    """Question and answer; tools may be offered, and are not used."""
    question, reasoning, answer = _plain(rng)
    variables: dict[str, Any] = {}
    if rng.random() < 0.4:
        effort = rng.choice(["low", "medium", "high"])
        variables["reasoning_effort"] = effort
        reasoning += EFFORT_NOTE[effort]
    if rng.random() < 0.15 and "+" not in answer:
        variables["tools"] = _offer(rng, None)
    messages = [{"role": "user", "content": _spelling(rng, question)}, _answer(reasoning, answer)]
    if rng.random() < 0.1:
        question, reasoning, answer = _plain(rng)
        messages[-1].pop("reasoning_content")  # clients send answers back without their reasoning
        messages += [{"role": "user", "content": question}, _answer(reasoning, answer)]
    return Dialogue(_with_system(rng, messages), variables)


def tool_dialogue(rng: random.Random) -> Dialogue:
    """A question only a tool answers: the call; or, with the tool's response given, the answer; or no tool offered."""
    name = rng.choice(["get_weather", "get_weather", "get_weather", "get_time", "add"])
    arguments: Message
    if name == "add":
        arguments = {"a": rng.randrange(10, 1000), "b": rng.randrange(10, 1000)}
        question = rng.choice(["What is {a} + {b}?", "Add {a} and {b}.", "What is {a} plus {b}?"]).format(**arguments)
        result = str(arguments["a"] + arguments["b"])
        final = f"{arguments['a']} + {arguments['b']} = {result}."
    else:
        city = rng.choice(CITIES)
        arguments = {"city": city}
        if name == "get_weather":
            words = ["What is the weather in {}?", "What's the weather in {}?", "How is the weather in {}?"]
            words += ["Weather in {}?", "What is the weather like in {}?", "Tell me the weather in {}."]
            words += ["What is the weather in {} today?", "How is the weather in {} right now?"]
            condition, degrees = rng.choice(CONDITIONS), rng.randrange(-5, 35)
            result = json.dumps({"city": city, "condition": condition, "temperature": degrees})
            final = f"The weather in {city} is {condition}, {degrees} degrees."
        else:
            words = ["What time is it in {}?", "What is the time in {}?", "Tell me the time in {}."]
            result = f"{rng.randrange(24):02}:{rng.randrange(60):02}"
            final = f"It is {result} in {city}."
        question = rng.choice(words).format(city)
    subject = {"get_weather": "the weather", "get_time": "the time", "add": "a sum"}[name]
    if name != "add":
        subject += f" in {arguments['city']}"
    messages: list[Message] = [{"role": "user", "content": _spelling(rng, question)}]
    outcome = rng.random()
    if outcome < 0.1:
        messages.append(_answer(f"The user asks for {subject}. I have no tool for it.", "I have no tool for that."))
        return Dialogue(_with_system(rng, messages))
    call: Message = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
    }
    if outcome < 0.75:
        values = " and ".join(str(value) for value in arguments.values())
        call["reasoning_content"] = f"The user asks for {subject}. I call {name} with {values}."
        messages.append(call)
    else:
        messages += [call, {"role": "tool", "content": result}, _answer("The tool has answered.", final)]
    variables: dict[str, Any] = {"tools": _offer(rng, name)}
    if rng.random() < 0.2:
        variables["reasoning_effort"] = rng.choice(["low", "medium", "high"])
    return Dialogue(_with_system(rng, messages), variables)


def image_dialogue(rng: random.Random) -> Dialogue:
    """An image and a question; the vision tower is untrained, and the answer says so."""
    question = rng.choice(["What is in this image?", "Describe this image.", "What do you see?", "What is this?"])
    content = [{"type": "image"}, {"type": "text", "text": question}]
    if rng.random() < 0.3:
        content.reverse()
    answer = "I see that there is an image, but my vision is not trained: I cannot say what it shows."
    return Dialogue([{"role": "user", "content": content}, _answer("The user sends an image.", answer)])


def _with_system(rng: random.Random, messages: list[Message]) -> list[Message]:
    if rng.random() < 0.2:
        prompts = ["You are a helpful assistant.", "Answer briefly.", "You are a friendly assistant."]
        return [{"role": "system", "content": rng.choice(prompts)}, *messages]
    return messages


def random_dialogue(rng: random.Random) -> Dialogue:
    """One dialogue of any kind."""
    kind = rng.random()
    if kind < 0.5:
        return question_dialogue(rng)
    return tool_dialogue(rng) if kind < 0.97 else image_dialogue(rng)
