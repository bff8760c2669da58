"""Words of the front end's language that are none of Metal's, found among the tokens."""

from __future__ import annotations

import re

from .lexer import Source
from .structure import Structure, is_builtin_type

_EXCEPTIONS = "exceptions are not supported in Metal"
_ASSEMBLY = "inline assembly is not supported in Metal"
_NEW = "new and delete are not supported in Metal"
_WORDS = {
    "goto": "goto is not supported in Metal",
    **dict.fromkeys(("throw", "try", "catch"), _EXCEPTIONS),
    "virtual": "virtual functions are not supported in Metal",
    "new": _NEW,
    "typeid": "typeid is not supported in Metal",
    "dynamic_cast": "dynamic_cast is not supported in Metal",
    "thread_local": "thread_local is not supported in Metal",
    "register": "the storage class register is not supported in Metal",
    "double": "double is not supported in Metal",
    **dict.fromkeys(("asm", "__asm", "__asm__"), _ASSEMBLY),
}
# Types and qualifiers of OpenCL and of the compiler, and its other ways to say what Metal says otherwise.
_FOREIGN = {
    *("__global", "__local", "__constant", "__private", "__generic", "__kernel", "__declspec"),
    *("__fp16", "_Float16", "__bf16", "__int128", "_Complex"),
}
_FOREIGN_ATTRIBUTES = {"vector_size", "ext_vector_type", "address_space", "opencl_global", "opencl_local"}
# Builtins of the compiler are in no document of Metal. These are in published kernels, MLX's among them,
# or are hints without an effect.
_BUILTINS = re.compile(r"__builtin_(?:clz|ctz|popcount)(?:l|ll|s)?|__builtin_(?:expect|assume|unreachable)")
_LABEL_LIKE = {"default", "public", "private", "protected"}


def check_words(source: Source, structure: Structure) -> list[tuple[int, str]]:
    """Tokens, and why Metal refuses them."""
    words = {"delete", "printf", "std", "long", "noexcept", "main", "auto", *structure.class_templates}
    words |= {*_WORDS, *_FOREIGN, *_FOREIGN_ATTRIBUTES}
    words |= {text for text in source.texts("name") if text.startswith("__builtin_")}
    labels = {i - 1 for i in source.at(":") if source.tokens[i - 1].kind == "name"}
    looked_at = sorted(labels.union(source.at(*words)))
    return [(i, message) for i in looked_at for message in _refusals(source, structure, i)]


def check_array_sizes(source: Source, structure: Structure) -> list[tuple[int, str]]:
    """Declared arrays whose size is a function constant, or made of one: its value comes after the compiler.

    Here it is a constant of the front end, which would take it.
    """
    tokens = source.tokens
    late = {constant.name for constant in structure.constants}
    for first, end in structure.globals if late else ():
        words = [tokens[i].text for i in range(first, end)]
        if "=" in words and late & set(words[words.index("=") :]):
            late.add(words[words.index("=") - 1])
    found = []
    for i in source.at(*late):
        opening = _enclosing_bracket(source, i)
        name = opening - 1
        while tokens[name].text == "]":  # of several dimensions
            name = source.opening(name) - 1
        kind = tokens[name - 1].text
        is_type = kind == ">" or is_builtin_type(kind) or kind in structure.types
        if opening and tokens[name].kind == "name" and is_type:
            found.append((i, "a function constant cannot be the size of an array in Metal"))
    return found


def _enclosing_bracket(source: Source, i: int) -> int:
    """The ``[`` that encloses token ``i`` within its statement; 0 if there is none."""
    while i := i - 1:
        text = source.tokens[i].text
        if text in (")", "]", "}"):
            i = source.opening(i)
        elif text in ("[", ";", "{", "}"):
            return i if text == "[" and source.tokens[i - 1].text != "[" else 0
    return 0


def _refusals(source: Source, structure: Structure, i: int) -> list[str]:
    tokens = source.tokens
    text, before, after = tokens[i].text, tokens[i - 1].text if i else ";", tokens[i + 1].text
    if text in _WORDS:
        return [_WORDS[text]]
    if text == "delete" and before != "=":
        return [_NEW]
    if text == "printf" and after == "(":
        return ["printf does not exist in Metal"]
    if text == "std" and (after == "::" or before == "namespace"):
        return ["the C++ standard library does not exist in Metal"]
    if text == "long" and after == "long":
        return ["long long is not supported in Metal: long has 64 bits"]
    if text in _FOREIGN or (text in _FOREIGN_ATTRIBUTES and before == "("):
        return [f"{text} is not a word of Metal"]
    if text.startswith("__builtin_") and not _BUILTINS.fullmatch(text):
        return [f"{text} is not part of Metal"]
    if text == "noexcept":
        return _noexcept(source, structure, i)
    if text == "main" and any(function.name == i for function in structure.functions):
        return ["a function cannot be called main in Metal"]
    if after == ":" and before in (";", "{", "}") and text not in _LABEL_LIKE:
        return ["labels are not supported in Metal"]
    if text == "auto":
        return _auto(source, structure, i)
    if text in structure.class_templates:
        return _deduced_class(source, structure, i)
    return []


def _noexcept(source: Source, structure: Structure, i: int) -> list[str]:
    """MLX's headers have the plain word on a method; the operator is on Metal's list of what there is not."""
    if source.tokens[i + 1].text == "(":
        return ["noexcept(...) is not supported in Metal"]
    kernels = (f for f in structure.functions if f.kernel)
    if any(f.parameters[1] < i < max(f.body[0], f.parameters[1] + 3) for f in kernels):
        return ["a kernel cannot be noexcept in Metal"]
    return []


def _auto(source: Source, structure: Structure, i: int) -> list[str]:
    tokens = source.tokens
    if structure.in_template_parameters(i):
        return ["a template parameter cannot be auto before Metal 4"]
    at = i + 1
    if tokens[at].text == "const":
        at += 1
    if tokens[at].text not in ("*", "&", "&&"):
        return []
    what = "pointer" if tokens[at].text == "*" else "reference"
    first = i - 1
    while tokens[first].kind == "name":
        if tokens[first].text in ("device", "constant", "threadgroup", "thread"):
            return []
        first -= 1
    return [f"{what} type must have an explicit address space: device, constant, threadgroup or thread"]


def _deduced_class(source: Source, structure: Structure, i: int) -> list[str]:
    """``P p(1.0f);`` in a function: the arguments of the class template P are deduced, as in C++17."""
    tokens = source.tokens
    declares = tokens[i + 1].kind == "name" and tokens[i + 2].text in ("(", "{", "=", ";")
    if not (declares or tokens[i + 1].text in ("(", "{")) or tokens[i - 1].text in ("::", "~", ".", "struct"):
        return []
    if is_builtin_type(tokens[i - 1].text) or any(body.first < i < body.last for body in structure.bodies):
        return []
    in_body = any(f.body[0] < i < f.body[1] for f in structure.functions if not f.method)
    message = f"the arguments of the class template {tokens[i].text} cannot be left out before Metal 4"
    return [message] if in_body else []
