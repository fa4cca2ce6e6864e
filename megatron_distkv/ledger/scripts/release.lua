-- loan, instance, epoch -> rBlocks given back
local loan = read_loan(ARGV[2])
if not loan then return 0 end
local by_debtor = loan.debtor == ARGV[3] and loan.debtor_epoch == ARGV[4]
local by_creditor = loan.creditor == ARGV[3] and loan.creditor_epoch == ARGV[4]
if not (by_debtor or by_creditor) then return 0 end
return drop_loan(ARGV[2], 'release')
