"""What is timed: the workloads, and everybody who solves them."""
