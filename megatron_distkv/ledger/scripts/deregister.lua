-- instance, epoch -> 1 when it left now
if not is_live(ARGV[2], ARGV[3]) then return 0 end
bury(ARGV[2], 'leave')
return 1
