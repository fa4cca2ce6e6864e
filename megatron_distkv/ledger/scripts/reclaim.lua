-- creditor, epoch, num_rblocks -> {{loan, debtor, num_rblocks}, ...}
if not is_live(ARGV[2], ARGV[3]) then return {} end
local mine, recalls, wanted = {}, {}, number(ARGV[4])
for _, id in ipairs(call('SMEMBERS', P .. ':credits:' .. ARGV[2])) do
  local loan = read_loan(id)
  mine[#mine + 1] = {id, loan.debtor, loan.num}
end
table.sort(mine, function(a, b) if a[3] ~= b[3] then return a[3] > b[3] end return a[1] < b[1] end)
for _, loan in ipairs(mine) do
  if wanted <= 0 then break end
  call('HSET', loan_key(loan[1]), 'recalled', '1')
  recalls[#recalls + 1] = loan
  wanted = wanted - loan[3]
end
return recalls
