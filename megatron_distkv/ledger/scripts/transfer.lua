-- loan, new_loan, new_debtor, new_debtor_epoch, creditor, creditor_epoch -> "" | the refusal's name
local id, new_id, new_debtor, new_debtor_epoch, creditor, creditor_epoch = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7]
local known = read_loan(new_id)
if known then
  return has_terms(known, new_debtor, new_debtor_epoch, creditor, creditor_epoch, known.num) and '' or 'conflict'
end
local old = read_loan(id)
if not old then return 'unknown_loan' end
if old.creditor ~= creditor or old.creditor_epoch ~= creditor_epoch then return 'stale_creditor' end
local refusal = why_not_fenced(new_debtor, new_debtor_epoch, creditor, creditor_epoch, old.num)
if refusal then return refusal end
if number(call('HGET', instance_key(creditor), 'borrowed')) > 0 and number(call('HGET', instance_key(new_debtor), 'lent')) > 0 then
  return 'in_debt'
end
drop_loan(id, 'transfer', 'new_debtor', new_debtor)
add_loan(new_id, new_debtor, new_debtor_epoch, creditor, creditor_epoch, old.num, 'active')
return ''
