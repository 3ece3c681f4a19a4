"""vLLM's entry point here: `register` is called in each of its processes before a model is chosen."""


def register() -> None:
    """Make vLLM know the architecture that a hybrid's config.json names, and AutoConfig its model type."""
    from vllm import ModelRegistry

    import hybrid.model.hybrid_model  # noqa: F401  it registers the config

    if "HybridModel" not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model("HybridModel", "hybrid.serving.vllm_model:HybridForCausalLM")
