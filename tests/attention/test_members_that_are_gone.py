"""What a debtor remembers of a creditor goes with it."""

import pytest
import torch

from megatron_distkv.attention import Deadlines, Debtor, Verification
from megatron_distkv.attention.deadlines import NUM_LEARNT
from megatron_distkv.clock import SystemClock
from megatron_distkv.errors import PeerWrong
from megatron_distkv.transport import TensorSpec

RBLOCK = TensorSpec((1, 1, 2, 4, 8), torch.float32)


def test_what_was_sent_to_a_member_is_forgotten_with_it() -> None:
    # Given a debtor that has sent rBlocks to b and c, and knows how quickly they answer
    verification = Verification(1, RBLOCK, 1.0, 1, 5.0, SystemClock())
    deadlines = Deadlines(0.1, 5.0, lambda _peer, _within_s: True)
    debtor = Debtor({}, 5.0, SystemClock(), verification=verification, deadlines=deadlines)
    sent = torch.randn(1, *RBLOCK.shape)
    for name in ("b", "c"):
        verification.note_sent(name, "loan", [3], sent)
        for _ in range(NUM_LEARNT):
            deadlines.note(name, 0.001)
    # When b is gone
    debtor.forget_all_but({"c"})
    # Then what comes back under b's name is another: it is not measured by what b was sent, nor by how quick b was
    verification.check_returned("b", [3], sent + 1)
    assert deadlines.doubtful_after_s("b") == 5.0
    # And c is
    with pytest.raises(PeerWrong):
        verification.check_returned("c", [3], sent + 1)
    assert deadlines.doubtful_after_s("c") < 5.0
    # And an alarm is told once
    assert verification.take_wrong() == {"c"}
    assert verification.take_wrong() == set()


def test_rblocks_that_another_instance_sent_are_not_known_here() -> None:
    """As of a request that was handed over together with its loans."""
    verification = Verification(1, RBLOCK, 1.0, 1, 5.0, SystemClock())
    verification.check_returned("b", [7], torch.randn(1, *RBLOCK.shape))
