"""How property tests run here: without a time limit for each example, for machines differ."""

from hypothesis import settings

settings.register_profile("petals", deadline=None)
settings.load_profile("petals")
