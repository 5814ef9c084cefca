"""What is on disk: base weights by slice, shards, PEFT folders, and the checkpoints of a run."""
