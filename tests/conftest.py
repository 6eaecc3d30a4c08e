"""For all tests: no property test asserts how long an example takes, whatever else the machine does."""

from hypothesis import settings

settings.register_profile("mull", deadline=None)
settings.load_profile("mull")
