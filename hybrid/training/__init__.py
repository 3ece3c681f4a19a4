"""The training run: its loop, folder, checkpoints and processes."""
