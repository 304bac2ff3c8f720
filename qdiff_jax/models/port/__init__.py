"""Published checkpoints of PyTorch as parameters of ours: one table of names for each family."""
