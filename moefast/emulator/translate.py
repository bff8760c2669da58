"""Metal to C++ for OpenCL: the few spellings in which the two differ.

Edits keep every line where it was, so that the compiler's positions are the user's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from . import swizzles
from .conversions import Conversions
from .declarations import Declarations
from .edits import Edits
from .lexer import Source, Token
from .spaces import Spaces
from .structure import Structure


class Translated(NamedTuple):
    """C++ for OpenCL, and the names of the threadgroup variables: the first is number 1."""

    text: str
    variables: tuple[str, ...]


def translate(source: Source, structure: Structure, constants: Mapping[int | str, object]) -> Translated:
    """``source`` as C++ for OpenCL.

    Args:
        constants: values of function constants, by index or name.
    """
    edits = Edits(source.text)
    declarations = Declarations(source, structure, constants, edits)
    declarations.edit()
    conversions = Conversions(source, structure, edits)
    spaces = Spaces(source, structure, edits)
    tokens = source.tokens
    for i in source.at("thread"):
        spaces.thread(i)
    for i in source.at("constant"):
        spaces.constant(i)
    for i in source.at("is_function_constant_defined"):
        if tokens[i + 1].text == "(":
            _is_defined(source, structure, declarations, edits, i)
    conversions.edit()
    for i in source.at("("):
        if tokens[i + 1].text == "*":
            _function_parameter(source, structure, edits, i)
    for number in source.texts("number"):
        if by := _number(number):
            for i in source.at(number):
                edits.replace(tokens[i].start, tokens[i].end, by)
    for pragma in source.pragmas:
        _pragma(pragma, edits)
    before = f'# 1 "{swizzles.FILE}" 3\n{swizzles.classes(swizzles.used(source))}\n'
    before += swizzles.renamed(source)
    return Translated(before + edits.result(), tuple(declarations.variables))


def _is_defined(
    source: Source, structure: Structure, declarations: Declarations, edits: Edits, i: int
) -> None:
    name = source.tokens[i + 2].text
    constant = next((c for c in structure.constants if c.name == name), None)
    defined = constant is not None and declarations.value(constant) is not None
    closing = source.closing(i + 1)
    edits.replace(source.tokens[i].start, source.tokens[closing].end, "true" if defined else "false")


def _function_parameter(source: Source, structure: Structure, edits: Edits, i: int) -> None:
    """``template <void (*f)(int)>``: the pointer would be one to generic memory; a reference is not."""
    star, _, *rest = source.tokens[i + 1 : i + 5]
    if [token.text for token in rest] == [")", "("] and structure.in_template_parameters(i):
        edits.replace(star.start, star.end, "&")


# Digits with a point or an exponent, and no suffix.
_FLOAT = re.compile(
    r"(?:(?:\d[\d']*\.[\d']*|\.\d[\d']*)(?:[eE][+-]?\d+)?|\d[\d']*[eE][+-]?\d+|0[xX][\da-fA-F.']+[pP][+-]?\d+)"
)


def _number(number: str) -> str:
    """``1.0bf`` is a bfloat; ``1.0`` a float, also in a template, where the compiler would forget that.
    Nothing for a number that stays as it is."""
    if number.endswith(("bf", "BF")) and "x" not in number:
        return f"((bfloat){number[:-2]}f)"
    return f"{number}f" if _FLOAT.fullmatch(number) else ""


def _pragma(pragma: Token, edits: Edits) -> None:
    if "METAL" in pragma.text:
        contract = re.search(r"fp\s+contract\s*\(\s*(\w+)\s*\)", pragma.text)
        by = f"#pragma clang fp contract({contract[1]})" if contract else ""
        edits.replace(pragma.start, pragma.end, by)
    elif counted := re.match(r"(\s*#\s*pragma\s+unroll)\W.*[A-Za-z_]", pragma.text):
        # A count that is an expression may have macros in it, which the preprocessor has left and forgotten.
        edits.replace(pragma.start, pragma.end, counted[1])
