-- candidate, lease_ms -> 1 when it leads
local leader = call('HMGET', P .. ':leader', 'candidate', 'until')
if leader[1] and leader[1] ~= ARGV[2] and number(leader[2]) > now then return 0 end
call('HSET', P .. ':leader', 'candidate', ARGV[2], 'until', text(now + number(ARGV[3])))
return 1
