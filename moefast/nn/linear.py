"""Dense layers whose products go through :func:`moefast.quantized_matmul`, and quantized embeddings whose
rows come from :func:`moefast.ops.embed`.

They are MLX's layers, parameters and all; only these two are handed to a backend. On a CPU that is
worth most of a model's speed, and its accuracy: MLX's CPU sums quantized bfloat16 products in bfloat16.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn

from .projection import plain, quantized
from .recall import product, rows


class Linear(mlx.nn.Linear):
    """``x @ weight.T + bias``. See :class:`mlx.nn.Linear`."""

    def __call__(self, x: mx.array) -> mx.array:
        """x: ``[..., in]`` -> ``[..., out]``."""
        return product(self, x, plain)

    def to_quantized(
        self,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
        quantize_input: bool = False,
    ) -> Any:
        """A quantized approximation of this layer; what ``mlx.nn.quantize`` calls."""
        if quantize_input:
            return super().to_quantized(group_size, bits, mode, quantize_input)
        # MLX's None means the mode's default.
        return QuantizedLinear.from_linear(self, group_size, bits, mode)  # type: ignore[arg-type]


class QuantizedLinear(mlx.nn.QuantizedLinear):
    """A quantized :class:`Linear`. See :class:`mlx.nn.QuantizedLinear`."""

    def __call__(self, x: mx.array) -> mx.array:
        """x: ``[..., in]`` -> ``[..., out]``."""
        return product(self, x, quantized)


class Embedding(mlx.nn.Embedding):
    """A token embedding, also the output head where a model ties them. See :class:`mlx.nn.Embedding`."""

    def as_linear(self, x: mx.array) -> mx.array:
        """The head. x: ``[..., dims]`` -> ``[..., num_embeddings]``."""
        return product(self, x, plain)

    def to_quantized(
        self,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
        quantize_input: bool = False,
    ) -> Any:
        """A quantized approximation of this layer; what ``mlx.nn.quantize`` calls."""
        if quantize_input:
            return super().to_quantized(group_size, bits, mode, quantize_input)
        return QuantizedEmbedding.from_embedding(self, group_size, bits, mode)  # type: ignore[arg-type]


class QuantizedEmbedding(mlx.nn.QuantizedEmbedding):
    """A quantized :class:`Embedding`. See :class:`mlx.nn.QuantizedEmbedding`."""

    def __call__(self, x: mx.array) -> mx.array:
        """x: integers ``[...]`` -> ``[..., dims]``."""
        return rows(self, x)

    def as_linear(self, x: mx.array) -> mx.array:
        """The head. x: ``[..., dims]`` -> ``[..., num_embeddings]``."""
        return product(self, x, quantized)
