"""Published checkpoints of PyTorch as parameters of ours: one table of names for each family.

Every function that returns a parameter tree returns float32 arrays on the default device
(`runtime.state_dicts.to_device`), whatever the file holds.
"""
