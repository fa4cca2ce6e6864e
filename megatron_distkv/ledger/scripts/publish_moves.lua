-- leader, then per move: source, "request|destination|num_rblocks" -> 1 when `leader` leads
local leader = call('HMGET', P .. ':leader', 'candidate', 'until')
if leader[1] ~= ARGV[2] or number(leader[2]) <= now then return 0 end
for i = 3, #ARGV, 2 do
  if call('HEXISTS', instance_key(ARGV[i]), 'epoch') == 1 then call('RPUSH', P .. ':moves:' .. ARGV[i], ARGV[i + 1]) end
end
return 1
