"""Fixtures of the policy's tests: small random float64 models."""

from policy.conftest import exact_norms, make_policy, statistics

__all__ = ["exact_norms", "make_policy", "statistics"]
