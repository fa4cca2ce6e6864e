-- -> {generation, now, {{instance, lease_end_ms, {field, value, ...}, {"request|holder", "num|is_local", ...}}, ...},
--     {{loan, debtor, debtor_epoch, creditor, creditor_epoch, num_rblocks, state}, ...}}
local instances = call('ZRANGE', P .. ':leases', 0, -1)
table.sort(instances)
for i, id in ipairs(instances) do
  instances[i] = {id, call('ZSCORE', P .. ':leases', id), call('HGETALL', instance_key(id)),
    call('HGETALL', P .. ':placements:' .. id)}
end
local loans = call('SMEMBERS', P .. ':loans')
table.sort(loans)
for i, id in ipairs(loans) do
  local loan = read_loan(id)
  loans[i] = {id, loan.debtor, loan.debtor_epoch, loan.creditor, loan.creditor_epoch, text(loan.num), loan.state}
end
return {call('GET', P .. ':generation') or '', text(now), instances, loans}
