"""The source that mx.fast.metal_kernel makes of a kernel's body: the same characters as the installed
MLX's."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from .reflect import BUILTINS

# Inputs with fewer elements are in the constant address space.
CONSTANT_BELOW = 8

TYPES = {
    mx.bool_: "bool",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.uint32: "uint32_t",
    mx.uint64: "uint64_t",
    mx.int8: "int8_t",
    mx.int16: "int16_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.float16: "float16_t",
    mx.bfloat16: "bfloat16_t",
    mx.float32: "float",
    mx.complex64: "complex64_t",
}

Template = Sequence[tuple[str, "bool | int | mx.Dtype"]]


def type_name(dtype: mx.Dtype) -> str:
    """Metal's name of a dtype.

    Raises:
        ValueError: Metal has no such type (float64).
    """
    if dtype not in TYPES:
        raise ValueError(f"[metal_kernel] dtypes must be ones that Metal has, got {dtype}.")
    return TYPES[dtype]


def _template_value(value: bool | int | mx.Dtype) -> str:
    # MLX prints a bool as a number.
    return str(int(value)) if isinstance(value, int) else type_name(value)


def _template_kind(value: bool | int | mx.Dtype) -> str:
    return "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "typename"


def template_arguments(template: Template) -> str:
    return "<" + ", ".join(_template_value(value) for _, value in template) + ">"


def kernel_name(name: str, inputs: Sequence[mx.array], dtypes: Sequence[mx.Dtype], template: Template) -> str:
    """The function's name: it says how each input is passed, so that a name has one source only."""
    full = f"custom_kernel_{name}"
    if template:
        full += (
            "_"
            + template_arguments(template)
            .replace(", ", "_")
            .replace("<", "_")
            .replace(">", "_")
            .replace("-", "_")[:-1]
        )
    for array in inputs:
        full += "_" + type_name(array.dtype)
        full += "s" if array.ndim == 0 else "c" if array.size < CONSTANT_BELOW else ""
    return full + "".join(f"_{type_name(dtype)}" for dtype in dtypes)


def uses(body: str, names: Sequence[str]) -> list[tuple[bool, bool, bool]]:
    """Of each input: whether the body mentions its shape, strides and ndim, which are then parameters."""
    return [tuple(f"{name}_{what}" in body for what in ("shape", "strides", "ndim")) for name in names]  # type: ignore[misc]


def source(
    name: str,
    header: str,
    body: str,
    input_names: Sequence[str],
    inputs: Sequence[mx.array],
    output_names: Sequence[str],
    output_dtypes: Sequence[mx.Dtype],
    template: Template,
    atomic_outputs: bool,
) -> str:
    """The whole source, without MLX's own headers before it."""
    full = kernel_name(name, inputs, output_dtypes, template)
    text = header
    if template:
        text += "template <" + ", ".join(f"{_template_kind(value)} {key}" for key, value in template) + ">\n"
    text += f"[[kernel]] void {full}(\n"
    index = 0
    for input_name, array, used in zip(input_names, inputs, uses(body, input_names), strict=True):
        space = "constant" if array.size < CONSTANT_BELOW else "device"
        reference = "&" if array.ndim == 0 else "*"
        text += f"  const {space} {type_name(array.dtype)}{reference} {input_name} [[buffer({index})]],\n"
        index += 1
        for what, declared in zip(
            used, ("int* {}_shape", "int64_t* {}_strides", "int& {}_ndim"), strict=True
        ):
            if array.ndim and what:
                text += f"  const constant {declared.format(input_name)} [[buffer({index})]],\n"
                index += 1
    attributes = [
        f"  {'uint' if components == 1 else f'uint{components}'} {attribute} [[{attribute}]]"
        for attribute, components in BUILTINS.items()
        if attribute in body
    ]
    outputs = []
    for output_name, dtype in zip(output_names, output_dtypes, strict=True):
        declared = f"atomic<{type_name(dtype)}>" if atomic_outputs else type_name(dtype)
        outputs.append(f"  device {declared}* {output_name} [[buffer({index})]]")
        index += 1
    text += ",\n".join([*outputs, *attributes]) + ") {\n" + body + "\n}\n"
    if template:
        call = full + template_arguments(template)
        text += f'\ntemplate [[host_name("{full}")]] [[kernel]] decltype({call}) {call};\n'
    return text
