"""Generation: prompts -> token ids -> replies, with a key/value cache, on the meshes of training."""
