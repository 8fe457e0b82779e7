"""What the model is asked: the haystack first, so that a server's prefix cache keeps it, and the question last."""

from __future__ import annotations

from step128_evals.needle.functions import Function

_QUESTION = """\
-----
That was the source code: parts of several Python files, each under a heading line that names its file and the lines \
shown.

Now copy from it. In the file {file} there is the function `{name}`. It begins with this signature:

{signature}

Write down the {lines} lines of its body that come right after this signature, beginning with the docstring or comment \
if there is one. Blank lines do not count as lines, and you may leave them out. Copy each line character by character, \
with the indentation that it has in the file. Do not repeat the signature, and explain nothing. Put the lines into one \
code block between ``` marks.
"""

_QUESTION_ALONE = """\
Write down from memory the source code of a function of the file {file}. The function is `{name}`, and begins with \
this signature:

{signature}

Write down the {lines} lines of its body that come right after this signature, beginning with the docstring or comment \
if there is one. Blank lines do not count as lines, and you may leave them out. Write each line character by \
character, with the indentation that it has in the file. Do not repeat the signature, and explain nothing. Put the \
lines into one code block between ``` marks.
"""


def heading(file: str, first_line: int, last_line: int) -> str:
    """The line above a file's part; line numbers count from 1 and are inclusive."""
    return f"# ===== {file}, lines {first_line} to {last_line} =====\n"


def question(function: Function, lines: int, closed_book: bool = False) -> str:
    """The question about a function; ``closed_book``: without a haystack, from what training left."""
    # A fence and not bare lines: servers and chat templates trim the first line's indentation at an answer's start.
    text = _QUESTION_ALONE if closed_book else _QUESTION
    return text.format(file=function.file, name=function.name, signature=function.signature, lines=lines)
