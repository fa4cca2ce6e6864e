-- instance, address, total, reserved, lease_ms, epoch hint (0: none), generation hint, info (JSON)
-- -> {epoch, generation} | {"superseded", live epoch}
drop_data_of_another_server()
local id, hint, hint_generation = ARGV[2], number(ARGV[7]), ARGV[8]
local live_epoch = call('HGET', instance_key(id), 'epoch')
if live_epoch and hint > 0 and hint < number(live_epoch) then return {'superseded', live_epoch} end
if live_epoch then bury(id, 'replaced') end
call('SETNX', P .. ':generation', 'g' .. text(wall))
call('SETNX', P .. ':epoch', text(wall))
local generation, epoch = call('GET', P .. ':generation'), nil
if hint > 0 and hint_generation ~= generation then
  epoch = hint  -- it outlived a loss of the ledger: its loans stay valid
  if epoch > number(call('GET', P .. ':epoch')) then call('SET', P .. ':epoch', text(epoch)) end
else
  epoch = call('INCR', P .. ':epoch')
end
call('HSET', instance_key(id), 'epoch', text(epoch), 'address', ARGV[3], 'total', ARGV[4], 'reserved', ARGV[5],
  'local_used', '0', 'lent', '0', 'borrowed', '0', 'state', 'up', 'num_running', '0', 'num_waiting', '0',
  'max_request_tokens', '0', 'info', ARGV[9])
call('ZADD', P .. ':leases', now + number(ARGV[6]), id)
note_lease(ARGV[6])
index(id)
note('join', 'instance', id, 'epoch', text(epoch))
return {text(epoch), generation}
