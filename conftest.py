"""How property tests run: without a time limit for each example, for machines differ and a busy one is no failure."""

from hypothesis import settings

settings.register_profile("petals", deadline=None, print_blob=True)
settings.load_profile("petals")
