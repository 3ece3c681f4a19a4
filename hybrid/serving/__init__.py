"""A hybrid where models are served: transformers' continuous batching, and vLLM, each imported when used."""
