-- loan, debtor, debtor_epoch, creditor, creditor_epoch, num_rblocks, pending_ms -> "" (reserved) | the refusal's name
local id, debtor, debtor_epoch, creditor, creditor_epoch = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local num = number(ARGV[7])
local known = read_loan(id)
if known then
  return has_terms(known, debtor, debtor_epoch, creditor, creditor_epoch, num) and '' or 'conflict'
end
local refusal = why_not_fenced(debtor, debtor_epoch, creditor, creditor_epoch, num)
if refusal then return refusal end
local r = call('HMGET', instance_key(creditor), 'total', 'reserved', 'local_used', 'lent', 'borrowed', 'state')
local cap = number(r[1]) - number(r[2])
if r[6] ~= 'up' then return 'draining' end
if number(r[5]) > 0 then return 'in_debt' end
if cap - number(r[4]) < num then return 'cap' end
if cap - number(r[3]) - number(r[4]) < num then return 'full' end
add_loan(id, debtor, debtor_epoch, creditor, creditor_epoch, num, 'pending')
call('ZADD', P .. ':pending', text(now + number(ARGV[8])), id)
return ''
