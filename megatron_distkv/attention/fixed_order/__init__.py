"""`deterministic`: attention whose bits depend neither on where rBlocks lie nor on what else is in the batch.

tree.py fixes the order of merging by position; plan.py says who computes what of a step (kept_plans.py: as in the last
one); leaves.py computes it.
"""
