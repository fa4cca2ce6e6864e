-- First on each new connection -> 1 when data were dropped.
-- Data that another life of the server wrote (a restart from disk, a replica that took over) may lack its last writes:
-- they are dropped as if all were lost, and the instances say again what they hold. Only the events stay. No connection
-- outlives the server's life, so nobody asks or changes anything before this is done.
if not known[4] or call('HGET', STATE, 'server') == life_of_server() then return 0 end
for _, index in ipairs({':leases', ':changed'}) do
  for _, id in ipairs(call('ZRANGE', P .. index, 0, -1)) do
    for _, set in ipairs({':debts:', ':credits:'}) do
      for _, loan in ipairs(call('SMEMBERS', P .. set .. id)) do call('DEL', loan_key(loan)) end
    end
    forget(id)
  end
end
for _, key in ipairs({':state', ':changed', ':left', ':leases', ':free', ':caps', ':pending', ':leader'}) do call('DEL', P .. key) end
note('rebuild')
return 1
