"""The schema. All keys of a pool share one hash tag, so that they live in one slot and one script may touch them all.

    {pool}:state              hash     server: run id of the one that wrote the rest; another one drops it
                                       generation: names this life of the data
                                       epoch: the last one given out; begins at the server's clock (ms)
                                       wall, now, lease: the pool's own time, and the lease of the last report (ms)
                                       version, horizon: of the last change, and of the last that may be forgotten
                                       counted_at (ms), offered, caps, members: sums of all members
    {pool}:changed            zset     member -> version of the last change of its record, placements or credits
    {pool}:left               zset     who left lately -> version of that; the last thousand
    {pool}:leases             zset     instance -> end of its lease (ms)
    {pool}:free               zset     instance -> rBlocks it would lend now
    {pool}:caps               zset     instance -> rBlocks it lends at most; 0 where it is not up
    {pool}:instance:ID        hash     epoch address total reserved info (JSON), and the seal of these; local_used lent
                                       borrowed state num_running num_waiting max_request_tokens
                                       prefill_tokens_left placements (JSON)
                                       moves (planned, a line each: request|destination|num_rblocks)
                                       counted (JSON; for /metrics, of members that tell no gateway)
    {pool}:loan:ID            hash     debtor debtor_epoch creditor creditor_epoch num_rblocks state recalled
    {pool}:debts:ID           set      loans of which ID is the debtor
    {pool}:credits:ID         set      loans of which ID is the creditor
    {pool}:pending            zset     reserved loans -> deadline for the creditor's answer (ms)
    {pool}:leader             hash     candidate, until (ms)
    {pool}:events             stream   what happened, the last few thousand

Scripts get the prefix as KEYS[1], the injected time (ms, empty in production: the server's clock) as ARGV[1], and their
arguments from ARGV[2] on. Whoever finds a key of another type, or a record that cannot be read, drops just that: the
member whose it was registers again with its next heartbeat, or has its lease again.
"""


def prefix(pool: str) -> str:
    return "{" + pool + "}"
