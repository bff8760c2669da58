"""The truth: plain MLX operations, written to be read. Runs wherever MLX runs; differentiable."""

from __future__ import annotations

from ...registry import Backend, Kernel
from .attention import attention, cached_attention
from .embed import embed
from .experts import experts, moe, switch_glu
from .logsumexp import logsumexp
from .matmul import dense, several
from .norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from .rope import rope
from .route import route

REFERENCE = Backend(
    name="reference",
    kernels={
        "route": Kernel(route),
        "switch_glu": Kernel(switch_glu),
        "experts": Kernel(experts),
        "moe": Kernel(moe),
        "quantized_matmul": Kernel(dense),
        "quantized_matmuls": Kernel(several),
        "attention": Kernel(attention),
        "cached_attention": Kernel(cached_attention),
        "rms_norm": Kernel(rms_norm),
        "layer_norm": Kernel(layer_norm),
        "add_rms_norm": Kernel(add_rms_norm),
        "add_layer_norm": Kernel(add_layer_norm),
        "rope": Kernel(rope),
        "embed": Kernel(embed),
        "logsumexp": Kernel(logsumexp),
    },
)
