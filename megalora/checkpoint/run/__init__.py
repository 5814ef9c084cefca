"""The checkpoints of a run: state, retention, writing in the background."""
