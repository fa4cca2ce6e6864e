-- leader, then per move: source, "request|destination|num_rblocks" -> 1 when `leader` leads
local leader = call('HMGET', P .. ':leader', 'candidate', 'until')
if leader[1] ~= ARGV[2] or number(leader[2]) <= now then return 0 end
for i = 3, #ARGV, 2 do
  local r = call('HMGET', instance_key(ARGV[i]), 'epoch', 'moves')
  if r[1] then call('HSET', instance_key(ARGV[i]), 'moves', (r[2] or '') .. ARGV[i + 1] .. '\n') end
end
return 1
