"""The drop-in: MoE layers of models that mlx-lm loaded, run by moefast's backends.

    model, tokenizer = mlx_lm.load(...)
    report = moefast.accelerate(model)
    print(report)

The order of reading: :mod:`.model`; :mod:`.look` finds what can be accelerated and :mod:`.checks` says of a
layer what would run it; :mod:`.block` is what then runs, :mod:`.swap` how it comes to. The one thing that is
no layer: :mod:`.sampling`. What is known of mlx-lm's blocks: :mod:`moefast.families`.
"""

from .model import accelerate, accelerated, restore
from .report import Entry, Report

__all__ = ["Entry", "Report", "accelerate", "accelerated", "restore"]
