"""Qwen2 and Qwen2.5: biases on q, k and v; the layers from max_window_layers on may slide a window."""

from megalora.models.config import Family


def windows(hf) -> tuple[int | None, ...]:
    """HF's rule: `layer_types` where the config has it, else by `max_window_layers`."""
    if not hf.use_sliding_window or hf.sliding_window is None:
        return (None,) * hf.num_hidden_layers
    kinds = getattr(hf, "layer_types", None)
    if kinds is None:
        return tuple(hf.sliding_window if i >= hf.max_window_layers else None for i in range(hf.num_hidden_layers))
    return tuple(hf.sliding_window if kind == "sliding_attention" else None for kind in kinds)


FAMILY = Family("qwen2", qkv_bias=lambda hf: True, windows=windows)
