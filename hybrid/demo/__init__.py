"""The demonstration: a frozen language model learns to follow a ball, by a TRM alone. No network, no GPU."""
