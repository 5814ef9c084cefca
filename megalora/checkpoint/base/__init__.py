"""Base weights on disk: Hugging Face folders, shards, GGUF, and streaming between them."""
