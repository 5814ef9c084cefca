"""What a run shows of itself: console, metrics.jsonl, TensorBoard, timers, FLOP count."""

from megalora.monitor.flops import keys_seen, lora_flops_per_token
from megalora.monitor.monitor import Monitor
from megalora.monitor.timers import PHASES, Timers

__all__ = ["PHASES", "Monitor", "Timers", "keys_seen", "lora_flops_per_token"]
