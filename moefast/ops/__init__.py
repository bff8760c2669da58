"""The operations. Each checks its arguments, describes the problem and hands it to a backend."""

from .attention import attention
from .experts import experts, switch_glu
from .moe import moe
from .quantized_matmul import quantized_matmul
from .route import route

__all__ = ["attention", "experts", "moe", "quantized_matmul", "route", "switch_glu"]
