-- creditor, epoch, num_rblocks -> {{loan, debtor, num_rblocks}, ...}
if not is_live(ARGV[2], ARGV[3]) then return {} end
local recalls, wanted, mine = {}, number(ARGV[4]), loans_in(':credits:', ARGV[2])
table.sort(mine, function(a, b) if a.num ~= b.num then return a.num > b.num end return a.id < b.id end)
for _, loan in ipairs(mine) do
  if wanted <= 0 then break end
  call('HSET', loan_key(loan.id), 'recalled', '1')
  recalls[#recalls + 1] = {loan.id, loan.debtor, text(loan.num)}
  wanted = wanted - loan.num
end
return recalls
