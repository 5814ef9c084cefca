"""What a run will take, counted before it runs: memory and time of every stage, and the layouts to choose from."""
