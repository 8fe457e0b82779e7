"""Functions of Python files that a model can be asked to copy: where they begin and end, and their lines."""

from __future__ import annotations

import ast
import re
import tokenize
import warnings
from collections import Counter
from dataclasses import dataclass

from step128_evals.corpus import SourceFile

SIGNATURE_CHARACTERS = 200
"""Longer ones, with the names of function and file, are not asked about: questions should be short beside haystacks."""

_MARKUP = ("```", "~~~", "<think>", "</think>")
"""What takes an answer apart: a function that has it in it would be scored wrongly."""

_DEFINITION = re.compile(r"\bdef[ \t]+(\w+)")


@dataclass(frozen=True)
class Function:
    """``first_line`` (that of ``def``) and ``last_line`` count from 0 and are inclusive.

    ``signature`` is its text as it stands in the file, ``def`` to colon, over as many lines as it takes. ``body`` are
    the lines after it that are not blank, comments and docstring included. ``decorators`` are the lines before it.
    """

    file: str
    name: str
    signature: str
    first_line: int
    last_line: int
    body: tuple[str, ...]
    decorators: tuple[str, ...] = ()

    @property
    def lines(self) -> tuple[str, ...]:
        """All of it that is not blank, from the first decorator on."""
        return (*self.decorators, *self.signature.split("\n"), *self.body)


def find_functions(file: SourceFile, lines_asked: int) -> list[Function]:
    """The functions and methods with at least so many body lines that are not blank; not those inside others.

    Left out: long signatures, and functions with a code fence or a reasoning tag in them, which could not be told from
    those of an answer or of a server's reasoning parser. A file that is no Python has none.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in strings
            tree = ast.parse(file.text)
    except (SyntaxError, ValueError, RecursionError):
        return []
    lines = file.text.split("\n")  # as Python counts lines: str.splitlines also splits at form feeds
    found = [_function(file.name, node, lines) for node in _outermost(tree)]
    return [function for function in found if _usable(function, lines_asked)]


def _outermost(node: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    found = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            found.append(child)
        else:
            found += _outermost(child)
    return found


def _function(file: str, node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> Function:
    first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
    rows = iter([line + "\n" for line in lines[first : last + 1]] + [""])
    tokens = tokenize.generate_tokens(rows.__next__)
    # The signature is one logical line, and its end the first token of this type.
    signature_rows = next(token.end[0] for token in tokens if token.type == tokenize.NEWLINE)
    signature = lines[first : first + signature_rows]
    body = _filled(lines[first + signature_rows : last + 1])
    decorators = _filled(lines[min((one.lineno - 1 for one in node.decorator_list), default=first) : first])
    return Function(file, node.name, "\n".join(signature), first, last, body, decorators)


def _filled(lines: list[str]) -> tuple[str, ...]:
    return tuple(line for line in lines if line.strip())


def _usable(function: Function, lines_asked: int) -> bool:
    return (
        len(function.body) >= lines_asked
        and len(function.signature) + len(function.name) + len(function.file) <= SIGNATURE_CHARACTERS
        and not any(mark in line for mark in _MARKUP for line in function.lines)
    )


def definitions(text: str) -> Counter[str]:
    """How often each name is defined in a text."""
    return Counter(_DEFINITION.findall(text))
