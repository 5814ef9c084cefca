"""Kinds of adapters: what is adapted (config, targets), and one file a kind."""
