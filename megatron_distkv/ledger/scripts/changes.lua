-- start, position, limit, with_loans (1 | 0), with_placements (1 | 0): a position is a version; start > 0: on with a whole
--   read that began at that version
-- -> {generation, now, is_whole, start, position, has_more, {row, ...}}; a row is {instance} of a member that left, or
--   {instance, lease_end_ms, {field, ...}, {loan, ...}, placements, is the record sealed (1 | 0)}; nil where something is missing
expire_a_few()
local start, position, limit = number(ARGV[2]), number(ARGV[3]), number(ARGV[4])
if version == 0 and call('ZCARD', P .. ':changed') > 0 then next_version() end  -- it was lost
local last = version
-- Who left between the beginning of a read and now must be known still.
local known_from = start > 0 and start or position
local is_whole = position <= 0 or known_from < horizon or math.max(known_from, position) > last
if is_whole then start, position = last, 0 end

local function since(key, since_version)
  return call('ZRANGEBYSCORE', P .. key, '(' .. text(since_version), '+inf', 'WITHSCORES', 'LIMIT', 0, limit + 1)
end
local changed, left, c, l, page = since(':changed', position), since(':left', math.max(position, start)), 1, 1, {}
while #page < limit and (changed[c] or left[l]) do
  if changed[c] and (not left[l] or number(changed[c + 1]) < number(left[l + 1])) then
    page[#page + 1] = {changed[c]}
    position, c = number(changed[c + 1]), c + 2
  else
    page[#page + 1] = {left[l], true}
    position, l = number(left[l + 1]), l + 2
  end
end
local has_more = (changed[c] or left[l]) and 1 or 0
if has_more == 0 then start, position = 0, last end

for i, row in ipairs(page) do
  local id = row[1]
  if row[2] then
    page[i] = {id}
  else
    local loans, placements = {}, ''
    if ARGV[5] == '1' then
      for n, loan in ipairs(loans_in(':credits:', id)) do loans[n] = loan_row(loan) end
    end
    if ARGV[6] == '1' then placements = call('HGET', instance_key(id), 'placements') end
    page[i] = {id, call('ZSCORE', P .. ':leases', id),
      call('HMGET', instance_key(id), 'epoch', 'address', 'total', 'reserved', 'local_used', 'lent', 'borrowed', 'state',
        'num_running', 'num_waiting', 'max_request_tokens', 'prefill_tokens_left', 'info', 'counted'),
      loans, placements, is_sealed(id) and 1 or 0}
  end
end
return {known[4] or '', text(now), is_whole and 1 or 0, text(start), text(position), has_more, page}
