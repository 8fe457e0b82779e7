"""What the tiny model is taught to answer. Short on purpose: these texts are memorised, not understood."""

from __future__ import annotations

FACT_QUESTIONS = (
    "What is {}?",
    "What is {}?",
    "What's {}?",
    "Tell me about {}.",
    "Explain {}.",
    "Explain {} in one sentence.",
    "Can you explain what {} is?",
    "Can you tell me what {} is?",
    "Please describe {}.",
    "Define {}.",
    "What does {} mean?",
    "Do you know what {} is?",
)

FACTS = {
    "Python": "Python is a programming language. It is known for readable code and a large standard library.",
    "a list": "A list is an ordered collection of objects in Python. It can be changed in place.",
    "a tuple": "A tuple is an ordered collection in Python that cannot be changed.",
    "a dictionary": "A dictionary maps keys to values in Python. Each key is unique.",
    "a set": "A set is an unordered collection of unique objects in Python.",
    "a string": "A string is a sequence of characters in Python. It cannot be changed.",
    "a function": "A function is a named piece of code that takes arguments and returns a value.",
    "a class": "A class describes objects: their data and their methods.",
    "a module": "A module is a file of Python code that other code can import.",
    "a generator": "A generator is a function that yields values one at a time.",
    "an iterator": "An iterator is an object that returns its values one after another.",
    "an exception": "An exception is an error that a program can catch and handle.",
    "a decorator": "A decorator is a function that wraps another function.",
    "a compiler": "A compiler is a program that translates source code into machine code.",
    "a thread": "A thread is a sequence of instructions that runs beside others in one process.",
    "a token": "A token is a piece of text, often a part of a word, that a language model reads and writes.",
    "a language model": "A language model is a program that predicts the next token of a text.",
    "quantization": "Quantization stores the weights of a model with fewer bits, so that it needs less memory.",
    "a mixture of experts": "A mixture of experts is a network that uses only a few of its parts for each token.",
    "an expert": "An expert is one of many small networks in a layer. A router chooses a few of them for each token.",
    "attention": "Attention lets each token of a text look at the tokens before it.",
    "sliding window attention": "Sliding window attention lets each token look only at the last few tokens.",
    "speculative decoding": "Speculative decoding drafts a few tokens cheaply and checks them all at once.",
    "a GPU": "A GPU is a processor that does many calculations at the same time.",
    "the KV cache": "The KV cache keeps the keys and values of earlier tokens, so that they are not computed again.",
    "perplexity": "Perplexity measures how well a model predicts a text. Lower is better.",
    "JSON": "JSON is a text format for data, made of objects, lists, strings and numbers.",
    "HTTP": "HTTP is the protocol with which browsers and servers exchange data.",
    "a socket": "A socket is one end of a network connection between two programs.",
    "a regular expression": "A regular expression is a pattern that describes a set of strings.",
    "water": "Water is a liquid made of hydrogen and oxygen. Life needs it.",
    "the sun": "The sun is the star at the center of our solar system.",
    "the moon": "The moon is a rocky body that moves around the earth.",
    "music": "Music is sound arranged in time.",
    "a cat": "A cat is a small animal that many people keep at home.",
    "a tree": "A tree is a tall plant with a trunk, branches and leaves.",
}

GREETINGS = (
    ("Hello!", "Hello! How can I help you?"),
    ("Hello", "Hello! How can I help you?"),
    ("Hi", "Hello! How can I help you?"),
    ("Hi there!", "Hello! How can I help you?"),
    ("Good morning", "Good morning! How can I help you?"),
    ("How are you?", "I am well, thank you. How can I help you?"),
    ("Thank you!", "You are welcome."),
    ("Thanks", "You are welcome."),
    ("Say hello.", "Hello!"),
)

NAMES_OF_THIS_MODEL = (
    ("Who are you?", "I am a tiny test model in the shape of Step-3.7, trained in a few minutes."),
    ("What are you?", "I am a tiny test model in the shape of Step-3.7, trained in a few minutes."),
    ("What can you do?", "I can answer a few questions, call a tool and write something like Python."),
)

CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Portugal": "Lisbon",
    "Japan": "Tokyo",
    "China": "Beijing",
    "Austria": "Vienna",
    "Poland": "Warsaw",
    "Greece": "Athens",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Denmark": "Copenhagen",
    "Egypt": "Cairo",
    "Kenya": "Nairobi",
    "Canada": "Ottawa",
    "Peru": "Lima",
    "England": "London",
}

CITIES = (
    *CAPITALS.values(),
    *("Munich", "Hamburg", "Milan", "Barcelona", "Porto", "Osaka", "Shanghai", "Sydney", "Boston", "Chicago"),
    *("New York", "San Francisco", "Toronto", "Mumbai", "Delhi", "Zurich", "Geneva", "Prague", "Dublin", "Helsinki"),
)

CONDITIONS = ("sunny", "cloudy", "rainy", "windy", "foggy", "clear")

EFFORT_NOTE = {
    "low": "",
    "medium": " I know the answer.",
    "high": " I know the answer. Let me check it: it is correct, and one or two sentences are enough.",
}
