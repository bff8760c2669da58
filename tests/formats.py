"""The weight formats and activations every expert operation takes."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from moefast import Activation, QuantSpec

DTYPES = (mx.float32, mx.float16, mx.bfloat16)


@dataclass(frozen=True)
class Format:
    """How a weight is stored. ``dtype`` is that of unquantized values or of scales, None for that of x."""

    name: str
    quant: QuantSpec | None = None
    dtype: mx.Dtype | None = None
    global_scale: bool = False

    def of(self, x: mx.Dtype) -> dict[str, object]:
        """Arguments of the ``projection`` fixture for activations of dtype ``x``."""
        return {"quant": self.quant, "dtype": self.dtype or x, "global_scale": self.global_scale}


FORMATS = (
    Format("plain"),
    Format("plain-float32", dtype=mx.float32),
    Format("plain-bfloat16", dtype=mx.bfloat16),
    *(
        Format(f"affine{bits}-g{group}", QuantSpec(bits=bits, group_size=group))
        for bits in (2, 3, 4, 5, 6, 8)
        for group in (32, 64, 128)
    ),
    # What mlx_lm.convert makes of a bfloat16 checkpoint, run in another dtype.
    Format("affine4-bfloat16", QuantSpec(), mx.bfloat16),
    Format("mxfp4", QuantSpec(mode="mxfp4", bits=4, group_size=32)),
    Format("mxfp8", QuantSpec(mode="mxfp8", bits=8, group_size=32)),
    Format("nvfp4", QuantSpec(mode="nvfp4", bits=4, group_size=16)),
    Format("nvfp4-scaled", QuantSpec(mode="nvfp4", bits=4, group_size=16), global_scale=True),
)
BY_NAME = {format_.name: format_ for format_ in FORMATS}

# Limits low enough to clip some of the test's values.
ACTIVATIONS = (
    Activation(),
    Activation(name="swiglu_oai", limit=1.5),
    Activation(name="swiglu_clipped", limit=1.0),
    Activation(name="swiglu_clamped", limit=1.0),
    Activation(name="geglu_tanh"),
    Activation(name="situ"),
    Activation(name="situ", beta=1.5, linear_beta=2.0),
    Activation(name="gelu_tanh"),
    Activation(name="relu2"),
)
