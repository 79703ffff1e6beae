"""Tensors as bytes and back."""
