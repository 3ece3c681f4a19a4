"""HybridModel: injection points inside a frozen language model, their cache, masks and halting."""
