"""Serve a span of a language model's blocks to a Petals swarm.

``petals_server.server.Server`` runs a server inside a program; ``petals-server serve`` runs one from the command line.
"""
