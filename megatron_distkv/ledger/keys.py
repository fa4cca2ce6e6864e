"""The schema. All keys of a pool share one hash tag, so that they live in one slot and one script may touch them all.

    {pool}:server             string   run id of the server that wrote the rest; another one drops it (all but events)
    {pool}:generation         string   names this life of the data
    {pool}:epoch              string   the last epoch given out; seeded from the server's clock (ms)
    {pool}:clock              hash     the pool's own time (ms): wall, now, lease of the last report
    {pool}:leases             zset     instance -> end of its lease (ms)
    {pool}:free               zset     creditor -> rBlocks it would lend now; only those that may lend
    {pool}:instance:ID        hash     epoch address total reserved local_used lent borrowed state num_running
                                       num_waiting max_request_tokens info (JSON)
    {pool}:loans              set      loan ids
    {pool}:loan:ID            hash     debtor debtor_epoch creditor creditor_epoch num_rblocks state recalled
    {pool}:debts:ID           set      loans of which ID is the debtor
    {pool}:credits:ID         set      loans of which ID is the creditor
    {pool}:pending            zset     reserved loans -> deadline for the creditor's answer (ms)
    {pool}:placements:ID      hash     "request|holder" -> "num_rblocks|is_local"
    {pool}:moves:ID           list     planned moves for ID, "request|destination|num_rblocks"
    {pool}:leader             hash     candidate, until (ms)
    {pool}:events             stream   what happened, the last few thousand

Scripts get the prefix as KEYS[1], the injected time (ms, empty in production: the server's clock) as ARGV[1], and their
arguments from ARGV[2] on.
"""


def prefix(pool: str) -> str:
    return "{" + pool + "}"
