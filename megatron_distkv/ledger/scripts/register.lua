-- instance, address, total, reserved, lease_ms, epoch hint (0: none), generation hint, info (JSON)
-- -> {epoch, generation} | {"superseded", live epoch}
local id, hint, hint_generation = ARGV[2], number(ARGV[7]), ARGV[8]
local live_epoch = call('HGET', instance_key(id), 'epoch')
if live_epoch and hint > 0 and hint < number(live_epoch) and is_sealed(id) then return {'superseded', live_epoch} end
if live_epoch or call('ZSCORE', P .. ':leases', id) or call('EXISTS', P .. ':debts:' .. id, P .. ':credits:' .. id) > 0 then
  bury(id, 'replaced')
end
local this_generation = generation()
local epoch, last_epoch = hint, number(known[7])
if last_epoch == 0 then last_epoch = wall end
-- A hint of another generation outlived a loss of the ledger: it stays, and so do its loans.
if hint == 0 or hint_generation == this_generation then epoch = last_epoch + 1 end
call('HSET', STATE, 'epoch', text(math.max(last_epoch, epoch)))
call('DEL', instance_key(id))
call('HSET', instance_key(id), 'epoch', text(epoch), 'address', ARGV[3], 'total', ARGV[4], 'reserved', ARGV[5],
  'local_used', '0', 'lent', '0', 'borrowed', '0', 'state', 'up', 'num_running', '0', 'num_waiting', '0',
  'max_request_tokens', '0', 'prefill_tokens_left', '0', 'info', ARGV[9], 'placements', '[]', 'counted', '[]', 'moves', '',
  'seal', seal_of(id, text(epoch), ARGV[3], ARGV[4], ARGV[5], ARGV[9]))
call('ZADD', P .. ':leases', text(now + number(ARGV[6])), id)
call('ZREM', P .. ':left', id)
note_lease(ARGV[6])
index(id)
touch(id)
note('join', 'instance', id, 'epoch', text(epoch))
return {text(epoch), this_generation}
