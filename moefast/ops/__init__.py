"""The operations. Each checks its arguments, describes the problem and hands it to a backend."""

from .attention import attention
from .cached_attention import Rotation, cached_attention
from .embed import embed
from .experts import experts, switch_glu
from .logsumexp import logsumexp
from .moe import moe
from .norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from .quantized_matmul import quantized_matmul, quantized_matmuls
from .rope import rope
from .route import route

__all__ = [
    "Rotation",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "cached_attention",
    "embed",
    "experts",
    "layer_norm",
    "logsumexp",
    "moe",
    "quantized_matmul",
    "quantized_matmuls",
    "rms_norm",
    "rope",
    "route",
    "switch_glu",
]
