"""Property tests: `@given` tests with the mark `property`.

They run 200 cases each; `make test-properties` runs 10,000 cases each. The cases are the same in
every run, so that a failure can be repeated."""

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "fast",
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile("thorough", settings.get_profile("fast"), max_examples=10_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))
