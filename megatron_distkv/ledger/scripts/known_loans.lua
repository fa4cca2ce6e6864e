-- loan, ... -> those that there are
local found = {}
for i = 2, #ARGV do
  if read_loan(ARGV[i]) then found[#found + 1] = ARGV[i] end
end
return found
