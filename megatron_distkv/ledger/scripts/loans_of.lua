-- creditor -> {{loan, debtor, debtor_epoch, creditor, creditor_epoch, num_rblocks, state}, ...}
local loans = call('SMEMBERS', P .. ':credits:' .. ARGV[2])
table.sort(loans)
for i, id in ipairs(loans) do
  local loan = read_loan(id)
  loans[i] = {id, loan.debtor, loan.debtor_epoch, loan.creditor, loan.creditor_epoch, text(loan.num), loan.state}
end
return loans
