"""For all tests: hypothesis judges values, never speed (machines are noisy)."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "lazyfs", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("lazyfs")
