"""Which blocks a server holds: where it starts, when it moves, and how movers keep out of each other's way.

Values and rules only; the server and the simulator (``tools/simulate.py``) run the same code. ``docs/placement.md`` has
the rules' reasons and the proof that no move leaves a block dark.
"""
