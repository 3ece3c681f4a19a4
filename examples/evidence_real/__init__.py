"""`make evidence-real`: what a recursion learns inside a real language model, and what else does."""
