-- creditor, epoch -> false (not the live one: what it lends is not for the ledger to say) |
--   {{loan, debtor, debtor_epoch, creditor, creditor_epoch, num_rblocks, state}, ...}
if not is_live(ARGV[2], ARGV[3]) then return false end
local loans = loans_with_both_sides(':credits:', ARGV[2])
for i, loan in ipairs(loans) do loans[i] = loan_row(loan) end
return loans
