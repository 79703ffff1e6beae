"""``python -m petals_dht``."""

from petals_dht.cli import main

main()
