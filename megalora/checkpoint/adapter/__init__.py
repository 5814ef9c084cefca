"""Adapters on disk: PEFT folders, shards, Merak's files."""
