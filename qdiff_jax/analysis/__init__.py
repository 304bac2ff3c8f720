"""Why quantized diffusion models fail: one analysis a file, each a pure function that returns numbers."""
