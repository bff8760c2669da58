"""The rules the operations share. All are about shapes and dtypes: no check evaluates an array."""

from __future__ import annotations

import mlx.core as mx

from ..errors import refuse
from ..weights import FLOATS, Form, Shape, dtype_name

_INTEGERS = (mx.uint32, mx.int32, mx.uint16, mx.int16, mx.uint8, mx.int8, mx.int64, mx.uint64)


def check_type(op: str, name: str, value: object, kind: type) -> None:
    """``value`` must be a ``kind``: an mx.array and not NumPy's, a spec and not a dictionary."""
    if not isinstance(value, kind):
        refuse(op, f"{name} must be of type {kind.__name__}", type(value).__name__)


def check_rows(op: str, name: str, shape: Shape, dtype: mx.Dtype, last: int, meaning: str) -> None:
    """``name`` must be a float array ``[..., last]``."""
    if not shape or shape[-1] != last:
        refuse(op, f"{name}.shape[-1] must equal {meaning}={last}", shape)
    if dtype not in FLOATS:
        refuse(op, f"{name} must be float32, float16 or bfloat16", dtype)


def check_vector(op: str, name: str, form: Form, size: int) -> None:
    """``name`` may be missing, else it must be a float array ``[size]``."""
    if form is not None and (form[0] != (size,) or form[1] not in FLOATS):
        refuse(op, f"{name} must be a float array ({size},)", form)


def check_indices(op: str, name: str, form: tuple[Shape, mx.Dtype], rows: Shape) -> None:
    """``name`` must be integers ``[..., top_k]`` over the leading dimensions of ``x``."""
    shape, dtype = form
    if len(shape) != len(rows) or shape[:-1] != rows[:-1]:
        refuse(op, f"{name} must be {(*rows[:-1], 'top_k')} for x of shape {rows}", shape)
    if dtype not in _INTEGERS:
        refuse(op, f"{name} must be integers", dtype)


def check_combine_dtype(op: str, dtype: mx.Dtype | None) -> None:
    """``combine_dtype`` may be missing, else it must be a float dtype."""
    if dtype is not None and dtype not in FLOATS:
        refuse(op, "combine_dtype must be float32, float16, bfloat16 or None", dtype)


def dtype_of(form: Form) -> str | None:
    """The dtype of an optional array by name: an mx.Dtype cannot be compared with None."""
    return None if form is None else dtype_name(form[1])
