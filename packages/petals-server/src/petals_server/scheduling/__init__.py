"""Whose turn on the device is next, and what is computed in it. Nothing here imports torch or an event loop."""
