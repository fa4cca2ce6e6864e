-- debtor, limit, skip -> {{instance, epoch, address, free, info}, ...} freest first
-- What is skipped is not looked at: where one of those has just died, a page begins one too late for who reads on.
local limit, position = number(ARGV[3]), number(ARGV[4])
local found = {}
expire_a_few()
mend_indices()
local own_rank = call('ZREVRANK', P .. ':free', ARGV[2])
if own_rank and own_rank <= position then position = position + 1 end
while #found < limit do
  local rows = call('ZREVRANGE', P .. ':free', position, position + limit, 'WITHSCORES')
  if #rows == 0 or number(rows[2]) <= 0 then break end
  for i = 1, #rows, 2 do
    local id, free = rows[i], number(rows[i + 1])
    if id ~= ARGV[2] and free > 0 and #found < limit and is_sealed(id)
      and number(call('ZSCORE', P .. ':leases', id)) > now then
      local record = call('HMGET', instance_key(id), 'epoch', 'address', 'info')
      found[#found + 1] = {id, record[1], record[2], text(free), record[3]}
    end
  end
  position = position + #rows / 2
end
return found
