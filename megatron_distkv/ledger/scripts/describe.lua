-- instance, epoch, info (JSON) -> 1 | 0 (a stale epoch changes nothing)
if not is_live(ARGV[2], ARGV[3]) then return 0 end
local r = call('HMGET', instance_key(ARGV[2]), 'epoch', 'address', 'total', 'reserved', 'info')
if not (r[2] and r[3] and r[4]) then return 0 end
if r[5] == ARGV[4] then return 1 end
call('HSET', instance_key(ARGV[2]), 'info', ARGV[4], 'seal', seal_of(ARGV[2], r[1], r[2], r[3], r[4], ARGV[4]))
touch(ARGV[2])
return 1
