"""An OpenAI-compatible server over a replica: bodies in, prompts to the replica, replies out as JSON or as events."""
