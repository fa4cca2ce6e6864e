-- instance, epoch, lease_ms, local_used, state, num_running, num_waiting, max_request_tokens,
--   prefill_tokens_left, placements, counted (JSON; empty: as they were)
-- -> {0} | {1, generation, lent, borrowed, free, offered by others, lent by others at most, members,
--    {loan, num_rblocks, ...} recalls, moves ("request|destination|num", a line each)}
local id, key = ARGV[2], instance_key(ARGV[2])
local r = call('HMGET', key, 'local_used', 'state', 'num_running', 'num_waiting', 'max_request_tokens', 'prefill_tokens_left',
  'placements', 'epoch', 'address', 'total', 'reserved', 'info', 'seal', 'lent', 'borrowed', 'moves', 'counted')
-- A record without any lease has lost it by no doing of ours: death takes both away.
local lease_end = call('ZSCORE', P .. ':leases', id)
if r[8] ~= ARGV[3] or (lease_end and number(lease_end) <= now) then
  expire_a_few()
  return {0}
end
local function is_list(json) return json and string.sub(json, 1, 1) == '[' and string.sub(json, -1) == ']' end
if not is_list(r[7]) or not is_list(r[17] or '[]') or not has_seal(id, r[8], r[9], r[10], r[11], r[12], r[13]) then
  note('unreadable', 'instance', id)
  return {0}
end
local placements, counted, is_new = ARGV[11] ~= '' and ARGV[11] or r[7], ARGV[12] ~= '' and ARGV[12] or r[17], false
for i = 1, 6 do is_new = is_new or r[i] ~= ARGV[i + 4] end
if is_new or placements ~= r[7] or counted ~= r[17] then
  call('HSET', key, 'local_used', ARGV[5], 'state', ARGV[6], 'num_running', ARGV[7], 'num_waiting', ARGV[8],
    'max_request_tokens', ARGV[9], 'prefill_tokens_left', ARGV[10], 'placements', placements, 'counted', counted or '[]')
  touch(id)
end
call('ZADD', P .. ':leases', text(now + number(ARGV[4])), id)
note_lease(ARGV[4])
expire_a_few()
local recalls = {}
if r[15] ~= '0' then
  for _, loan in ipairs(loans_with_both_sides(':debts:', id)) do
    if loan.is_recalled then
      recalls[#recalls + 1] = loan.id
      recalls[#recalls + 1] = text(loan.num)
    end
  end
end
local moves = r[16] or ''
if moves ~= '' then call('HSET', key, 'moves', '') end
local sums = call('HMGET', key, 'lent', 'borrowed')
local lending = {r[10], r[11], ARGV[5], sums[1], sums[2], ARGV[6]}
if is_new then index(id, lending) end
local free, offered, cap = lendable(lending)
local all_offered, all_caps, members = pool_sums()
return {1, generation(), sums[1], sums[2], text(free), text(math.max(0, all_offered - offered)),
  text(math.max(0, all_caps - cap)), members, recalls, moves}
