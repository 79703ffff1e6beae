"""Checkpoints, and Transformers models cut into a client's half and spans of blocks."""
