-- instance, epoch, lease_ms, local_used, state, num_running, num_waiting, max_request_tokens,
--   placements (JSON; absent: as they were)
-- -> {0} | {1, generation, lent, borrowed, free, offered by others, lent by others at most, members,
--    {loan, num_rblocks, ...} recalls, {"request|destination|num", ...} moves}
local id, key = ARGV[2], instance_key(ARGV[2])
local r = call('HMGET', key, 'local_used', 'state', 'num_running', 'num_waiting', 'max_request_tokens', 'placements',
  'epoch', 'total', 'reserved', 'lent', 'borrowed')
-- A record without any lease has lost it by no doing of ours: death takes both away.
local lease_end = call('ZSCORE', P .. ':leases', id)
if r[7] ~= ARGV[3] or (lease_end and number(lease_end) <= now) then
  expire(EXPIRE_PER_CALL)
  return {0}
end
if not is_sealed(id) or not string.find(r[6] or '', '^%[.*%]$') then
  note('unreadable', 'instance', id)
  return {0}
end
local placements, is_new = ARGV[10] or r[6], false
for i = 1, 5 do is_new = is_new or r[i] ~= ARGV[i + 4] end
if is_new or placements ~= r[6] then
  call('HSET', key, 'local_used', ARGV[5], 'state', ARGV[6], 'num_running', ARGV[7], 'num_waiting', ARGV[8],
    'max_request_tokens', ARGV[9], 'placements', placements)
  touch(id)
end
call('ZADD', P .. ':leases', text(now + number(ARGV[4])), id)
note_lease(ARGV[4])
expire(EXPIRE_PER_CALL)
local recalls = {}
for _, loan in ipairs(loans_with_both_sides(':debts:', id)) do
  if call('HGET', loan_key(loan.id), 'recalled') then
    recalls[#recalls + 1] = loan.id
    recalls[#recalls + 1] = text(loan.num)
  end
end
local moves = call('LRANGE', P .. ':moves:' .. id, 0, -1)
if #moves > 0 then call('DEL', P .. ':moves:' .. id) end
local sums = call('HMGET', key, 'lent', 'borrowed')
local free, offered, cap = index(id, {r[8], r[9], ARGV[5], sums[1], sums[2], ARGV[6]})
local all_offered, all_caps, members = pool_sums()
return {1, generation(), sums[1], sums[2], text(free), text(math.max(0, all_offered - offered)),
  text(math.max(0, all_caps - cap)), members, recalls, moves}
