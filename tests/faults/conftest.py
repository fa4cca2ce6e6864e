"""Three instances and their ledger, as the invariants' tests have them."""

from tests.invariants.test_pool_of_instances import pool

__all__ = ["pool"]
