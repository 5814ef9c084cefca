"""megalora: LoRA fine-tuning with tensor, pipeline and data parallelism, the same numbers on every layout."""

__version__ = "0.1.0"
