-- creditor, epoch -> false (not the live one: what it lends is not for the ledger to say) |
--   {{loan, debtor, debtor_epoch, creditor, creditor_epoch, num_rblocks, state}, ...}
local r = call('HMGET', instance_key(ARGV[2]), 'epoch', 'lent')
if r[1] ~= ARGV[3] or number(call('ZSCORE', P .. ':leases', ARGV[2])) <= now then return false end
if r[2] == '0' then return {} end
local loans = loans_with_both_sides(':credits:', ARGV[2])
for i, loan in ipairs(loans) do loans[i] = loan_row(loan) end
return loans
