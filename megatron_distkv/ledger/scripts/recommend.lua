-- debtor, num_rblocks, limit -> {{instance, epoch, address, free}, ...} freest first
local found, covered, limit, wanted = {}, 0, number(ARGV[4]), number(ARGV[3])
for _, id in ipairs(call('ZREVRANGE', P .. ':free', 0, -1)) do
  if #found >= limit or covered >= wanted then break end
  if id ~= ARGV[2] and number(call('ZSCORE', P .. ':leases', id)) > now then
    local record, free = call('HMGET', instance_key(id), 'epoch', 'address'), call('ZSCORE', P .. ':free', id)
    found[#found + 1] = {id, record[1], record[2], free}
    covered = covered + number(free)
  end
end
return found
