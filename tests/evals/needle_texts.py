"""Texts for the needle tests: a corpus of Python files, a stand-in for a codeneedle clone, and a model that copies."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from oracle import Reply

ASKED = re.compile(
    r"In the file (?P<file>\S+) there is the function `(?P<name>\w+)`\. It begins with this signature:\n\n"
    r"(?P<signature>.*?)\n\nWrite down the (?P<lines>\d+) lines",
    re.DOTALL,
)


def python_function(name: str, lines: int, indent: str = "") -> str:
    """A function whose every body line occurs nowhere else; blank lines in between."""
    rows = [f"{indent}def {name}(", f"{indent}    value: int,", f"{indent}) -> int:  # adds"]
    rows.append(f'{indent}    """Add to {name}."""')
    for number in range(1, lines):
        rows.append(f"{indent}    value = value + {number}  # step {number} of {name}")
        if number % 6 == 0:
            rows.append("")
    return "\n".join(rows) + "\n"


def write_corpus(folder: Path, files: int = 40, functions: int = 4, lines: int = 22) -> Path:
    """Files with a docstring, short functions, long ones, and methods."""
    for file in range(files):
        parts = [f'"""File {file}."""\n\nimport os\n\n\ndef main():\n    return os.name\n']
        parts += [python_function(f"work_{file}_{number}", lines + number) for number in range(functions - 1)]
        parts.append(f"class Kind{file}:\n" + python_function(f"method_{file}", lines, "    "))
        path = folder / f"part{file % 3}" / f"module_{file}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join(parts))
    return folder


def true_lines(content: str) -> tuple[re.Match[str], list[str]] | None:
    """The question of a prompt and the lines that it asks for, found in the haystack by plain search."""
    asked = ASKED.search(content)
    if asked is None:
        return None
    haystack = content[: asked.start()]
    signature = "\n" + asked["signature"] + "\n"
    assert haystack.count(signature) == 1
    after = haystack[haystack.index(signature) + len(signature) :]
    return asked, [line for line in after.split("\n") if line.strip()][: int(asked["lines"])]


def copying(change: Callable[[list[str], int], Reply]) -> Callable[[str, dict[str, Any]], Reply | None]:
    """A ``respond`` for the oracle; ``change`` makes the reply from the true lines and the question's number."""
    numbers: dict[str, int] = {}

    def respond(path: str, body: dict[str, Any]) -> Reply | None:
        if path != "/v1/chat/completions":
            return None
        content = str(body["messages"][0]["content"])
        found = true_lines(content)
        if found is None:
            return None
        asked, lines = found
        return change(lines, numbers.setdefault(asked[0], len(numbers)))

    return respond


def fenced(lines: list[str]) -> Reply:
    """A perfect answer."""
    return Reply("```python\n" + "\n".join(lines) + "\n```")


_BODY = "\n".join(f"    value += {number};" if number % 5 else "" for number in range(1, 23))
JAVASCRIPT = f"""\
function short() {{ return 1; }}
function plain(value) {{
{_BODY}
}}
const arrow = (value) => {{
{_BODY}
}};
window.tool.made = function (value) {{
{_BODY}
}};
const table = {{ entry: function (value) {{
{_BODY}
}}, "quoted-key": function named(value) {{
{_BODY}
}} }};
class Thing {{
  method(value) {{
{_BODY}
  }}
}}
function plain(value) {{
{_BODY}
}}
"""

RUNNER = '''\
"""Not the benchmark's prompt: our own words in its layout."""
import nothing_that_exists
PROMPT_TEMPLATE = (
    "{file_contents}"
    "Copy {n} lines of `{name}`{file_qualifier}, {anchor_phrase}, not `{signature_marker}`.{thinking_suffix}"
)
ANCHOR_PHRASE = {"js": "after the brace of {name}", "py": "after def {name}"}
SIGNATURE_MARKER = {"js": "the head of {name}", "py": "{name} and its colon"}
NO_THINK_SUFFIX = " /no_think"
raise SystemExit("a clone is never executed")
'''


def write_clone(folder: Path, functions: int = 20) -> Path:
    """A folder laid out as a clone of the benchmark, with our own texts."""
    for name, content in {
        "bench/runner.py": RUNNER,
        "configs/corpora/script.toml": '[files]\ndirectory = "fixtures"\nglob = "*.js"\n',
        "configs/corpora/module.toml": '[files]\ndirectory = "fixtures"\nglob = "*.py"\nlimit = 1\n[sample]\nk = 16\n',
        "configs/corpora/both.toml": '[files]\ndirectory = "fixtures"\nglob = "*"\n',
        "configs/corpora/broken.toml": "[files\n",
        "fixtures/script.js": JAVASCRIPT,
        "fixtures/module.py": "\n\n".join(python_function(f"job_{number:02}", 20) for number in range(functions)),
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder
