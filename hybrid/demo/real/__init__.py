"""The demonstration on a real language model: SmolLM2-135M-Instruct, out of a package of Python's index."""
