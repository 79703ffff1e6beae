"""``python -m petals_server`` is ``petals-server``."""

from petals_server.cli import main

main()
