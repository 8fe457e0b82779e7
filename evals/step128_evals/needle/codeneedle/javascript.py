"""Named functions of a JavaScript file, found by the library esprima."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

_FUNCTIONS = ("FunctionDeclaration", "FunctionExpression", "ArrowFunctionExpression")
_NAMED_BY_PLACE = {
    ("VariableDeclarator", "init"): "id",
    ("AssignmentExpression", "right"): "left",
    ("Property", "value"): "key",
    ("MethodDefinition", "value"): "key",
}
"""(type of the node around a function, the field the function is in) -> the field that then names the function."""


def javascript_bodies(text: str) -> list[tuple[str, int, int]]:
    """(name, first body line, last body line) of every named function with a block, depth first.

    The body lies between the line of the opening brace and the line of the closing one. A function is named by itself,
    or else by the variable, property or method that it is the value of.

    Raises:
        ValueError: the file is no JavaScript that esprima knows (ECMAScript 2017).
    """
    esprima = importlib.import_module("esprima")
    node_class = importlib.import_module("esprima.nodes").Node
    options = {"loc": True, "tolerant": True}
    try:
        tree = esprima.parseModule(text, options=options)
    except esprima.Error:
        try:
            tree = esprima.parseScript(text, options=options)
        except esprima.Error as error:
            raise ValueError(str(error)) from error
    bodies = []
    for node, place_name in _walk(tree, None, node_class):
        if node.type not in _FUNCTIONS or node.body.type != "BlockStatement":
            continue
        name = node.id.name if node.id else place_name
        if name:
            bodies.append((name, node.body.loc.start.line + 1, node.body.loc.end.line - 1))
    return bodies


def _walk(node: Any, place_name: str | None, node_class: type) -> Iterator[tuple[Any, str | None]]:
    yield node, place_name
    for field, value in vars(node).items():
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, node_class):
                yield from _walk(child, _name_of_place(node, field), node_class)


def _name_of_place(node: Any, field: str) -> str | None:
    namer = getattr(node, _NAMED_BY_PLACE.get((node.type, field), ""), None)
    if namer is not None and namer.type == "MemberExpression" and node.type == "AssignmentExpression":
        namer = namer.property  # a.b.c = function...: c
    if namer is None:
        return None
    if namer.type == "Literal" and node.type == "Property":
        return str(namer.value)
    return str(namer.name) if namer.type == "Identifier" else None
