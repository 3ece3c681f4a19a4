"""The whole recursion: its loop, its weights, and the ways in which it is launched."""
