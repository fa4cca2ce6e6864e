-- loan, creditor, creditor_epoch -> "" | the refusal's name
local loan = read_loan(ARGV[2])
if not loan then return 'unknown_loan' end
if loan.creditor ~= ARGV[3] or loan.creditor_epoch ~= ARGV[4] or not is_live(ARGV[3], ARGV[4]) then
  return 'stale_creditor'
end
call('ZREM', P .. ':pending', ARGV[2])
if loan.state == 'active' then return '' end
call('HSET', loan_key(ARGV[2]), 'state', 'active')
touch(loan.creditor)
return ''
