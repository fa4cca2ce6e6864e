-- creditor, epoch -> false (not the live one: what it lends is not for the ledger to say) |
--   {{loan, debtor, debtor_epoch, creditor, creditor_epoch, num_rblocks, state}, ...}
drop_data_of_another_server()
if not is_live(ARGV[2], ARGV[3]) then return false end
local loans = call('SMEMBERS', P .. ':credits:' .. ARGV[2])
table.sort(loans)
for i, id in ipairs(loans) do
  local loan = read_loan(id)
  loans[i] = {id, loan.debtor, loan.debtor_epoch, loan.creditor, loan.creditor_epoch, text(loan.num), loan.state}
end
return loans
