-- instance, epoch, lease_ms, local_used, state, num_running, num_waiting, max_request_tokens,
--   then per changed placement: "request|holder", num_rblocks, is_local
-- -> {0} | {1, generation, lent, borrowed, free, {loan, num_rblocks, ...} recalls, {"request|destination|num", ...} moves}
drop_data_of_another_server()
local id = ARGV[2]
if not is_live(id, ARGV[3]) then
  expire(EXPIRE_PER_HEARTBEAT)
  return {0}
end
call('HSET', instance_key(id), 'local_used', ARGV[5], 'state', ARGV[6], 'num_running', ARGV[7], 'num_waiting', ARGV[8],
  'max_request_tokens', ARGV[9])
call('ZADD', P .. ':leases', now + number(ARGV[4]), id)
note_lease(ARGV[4])
index(id)
local placements = P .. ':placements:' .. id
for i = 10, #ARGV, 3 do
  if number(ARGV[i + 1]) > 0 then
    call('HSET', placements, ARGV[i], ARGV[i + 1] .. '|' .. ARGV[i + 2])
  else
    call('HDEL', placements, ARGV[i])
  end
end
expire(EXPIRE_PER_HEARTBEAT)
local recalls = {}
local debts = call('SMEMBERS', P .. ':debts:' .. id)
table.sort(debts)
for _, loan in ipairs(debts) do
  local r = call('HMGET', loan_key(loan), 'recalled', 'num_rblocks')
  if r[1] then
    recalls[#recalls + 1] = loan
    recalls[#recalls + 1] = r[2]
  end
end
local moves = call('LRANGE', P .. ':moves:' .. id, 0, -1)
call('DEL', P .. ':moves:' .. id)
local record = call('HMGET', instance_key(id), 'lent', 'borrowed')
return {1, call('GET', P .. ':generation'), record[1], record[2], text(index(id)), recalls, moves}
