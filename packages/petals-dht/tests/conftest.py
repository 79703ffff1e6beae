from __future__ import annotations

from hypothesis import settings

# A busy machine is no reason to fail.
settings.register_profile("petals-dht", deadline=None, print_blob=True)
settings.load_profile("petals-dht")
