"""``python -m petals_client``: the command ``petals-client``."""

from petals_client.cli import main

if __name__ == "__main__":
    main()
