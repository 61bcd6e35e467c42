"""A griffe extension: the comment beside (or just above) a field of a class is its description in the reference, and
what `forward` does is what its class says."""

from __future__ import annotations

import ast
import io
import tokenize
from typing import Any

import griffe


class Fields(griffe.Extension):
    """Of `latents: Tensor  # (B, *grid, D), what the decoder sees` the comment becomes the docstring of `latents`."""

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Describe an annotated field of a class that has no docstring of its own."""
        if not isinstance(node, ast.AnnAssign) or attr.docstring or attr.name.startswith("_"):
            return
        if not (attr.parent and attr.parent.is_class and attr.lineno and attr.endlineno):
            return
        if isinstance(attr.filepath, list):  # of a namespace package
            return
        lines = attr.lines_collection[attr.filepath]
        above: list[str] = []
        for line in reversed(lines[: attr.lineno - 1]):
            if not line.strip().startswith("#"):
                break
            above.insert(0, line.strip().lstrip("# "))
        text = " ".join([*above, *comments("\n".join(lines[attr.lineno - 1 : attr.endlineno]))])
        if text:
            text = text[0].upper() + text[1:] + ("" if text.endswith(".") else ".")
            attr.docstring = griffe.Docstring(text, lineno=attr.lineno, endlineno=attr.endlineno, parent=attr)

    def on_function_instance(self, *, node: Any, func: griffe.Function, **kwargs: Any) -> None:
        """Show the signature of a `forward` that its class describes."""
        if func.name == "forward" and not func.docstring and func.parent and func.parent.is_class:
            func.docstring = griffe.Docstring("As the class describes.", parent=func)


def comments(source: str) -> list[str]:
    """The comments in a statement's lines."""
    tokens = tokenize.generate_tokens(io.StringIO(source.strip()).readline)
    return [token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT]
