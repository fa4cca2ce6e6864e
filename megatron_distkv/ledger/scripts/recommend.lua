-- debtor, num_rblocks, limit, skip -> {{instance, epoch, address, free, info}, ...} freest first
local wanted, limit, skip = number(ARGV[3]), number(ARGV[4]), number(ARGV[5])
local found, covered, passed, position = {}, 0, 0, 0
expire_a_few()
mend_indices()
while #found < limit and covered < wanted do
  local rows = call('ZREVRANGE', P .. ':free', position, position + skip + limit, 'WITHSCORES')
  if #rows == 0 or number(rows[2]) <= 0 then break end
  for i = 1, #rows, 2 do
    local id, free = rows[i], number(rows[i + 1])
    if id ~= ARGV[2] and free > 0 and number(call('ZSCORE', P .. ':leases', id)) > now then
      passed = passed + 1
      if passed > skip and #found < limit and covered < wanted then
        local record = call('HMGET', instance_key(id), 'epoch', 'address', 'info')
        if is_sealed(id) then
          found[#found + 1] = {id, record[1], record[2], text(free), record[3] or ''}
          covered = covered + free
        end
      end
    end
  end
  position = position + #rows / 2
end
return found
