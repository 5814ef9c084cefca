"""Runs as they lie on disk, read while they grow: curves, settings, notes. Nothing here writes, or needs torch."""
