"""A view of a swarm that people leave open, and the same for programs.

``observations``, ``view``, ``controls``, ``keys``, ``figures`` and ``exports`` are values and rules only; ``screen``
draws; ``watcher`` and ``live`` talk to the network and to the terminal.
"""
