-- instance, epoch, info (JSON) -> 1 | 0 (a stale epoch changes nothing)
if not is_live(ARGV[2], ARGV[3]) then return 0 end
call('HSET', instance_key(ARGV[2]), 'info', ARGV[4])
return 1
