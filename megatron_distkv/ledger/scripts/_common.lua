-- Shared by all scripts, put in front of each. The key schema is in ../keys.py.
-- KEYS[1] = prefix "{pool}"; ARGV[1] = injected time in ms ("" in production: the server's clock); arguments from ARGV[2].
local P = KEYS[1]
local EXPIRE_PER_CALL, MAX_EVENTS, MAX_TOMBSTONES, MAX_NUMBER = 4, 4096, 1024, 2 ^ 53
-- The pool's sums are counted again when they are older than this, in ms for each member: half a percent of the server.
local SUMS_AGE_MS_PER_MEMBER = 0.25

-- A key of another type than ours holds nothing of ours: it is dropped, as if it had been lost.
local function call(command, key, ...)
  local answer = redis.pcall(command, key, ...)
  if type(answer) ~= 'table' or not answer.err then return answer end
  if not string.find(answer.err, 'WRONGTYPE', 1, true) then error(answer.err, 0) end
  redis.call('DEL', key)
  return redis.call(command, key, ...)
end

local function text(number) return string.format('%.0f', number) end
-- What is no number, or none that is exact here, is 0.
local function number(value)
  local n = tonumber(value or 0)
  return n and n > -MAX_NUMBER and n < MAX_NUMBER and n or 0
end

local function wall_clock()
  if ARGV[1] ~= '' then return tonumber(ARGV[1]) end
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

-- What is one for the whole pool lies in one hash, and is read at once.
local STATE = P .. ':state'
local known = call('HMGET', STATE, 'wall', 'now', 'lease', 'generation', 'version', 'horizon', 'epoch', 'counted_at',
  'offered', 'caps', 'members')
local wall, last_lease_ms = wall_clock(), number(known[3])

-- The pool's own time follows the server's clock, but does not jump with it: it never goes back, and from one operation
-- to the next it goes on by half a lease at most, so that no clock that is put right ends the leases of the living.
local function pool_clock()
  local passed = known[1] and math.max(0, wall - number(known[1])) or 0
  if known[3] then passed = math.min(passed, math.floor(last_lease_ms / 2)) end
  local time = known[2] and number(known[2]) + passed or wall
  if wall ~= number(known[1]) then call('HSET', STATE, 'wall', text(wall), 'now', text(time)) end
  return time, not known[2] or passed > 0
end

local now, is_later = pool_clock()
local function note_lease(lease_ms)
  if known[3] ~= lease_ms then call('HSET', STATE, 'lease', lease_ms) end
end
local function instance_key(id) return P .. ':instance:' .. id end
local function loan_key(id) return P .. ':loan:' .. id end

local function note(event, ...)
  call('XADD', P .. ':events', 'MAXLEN', '~', MAX_EVENTS, '*', 'event', event, ...)
end

-- Which changes there have been: each change of a member gets the next version. Versions begin at the clock (us), so that
-- no life of the data repeats another's. The horizon is the last change that is no longer known: a member that left then.
local version, horizon = number(known[5]), known[6] and number(known[6]) or number(known[5])

local function highest(key) return number(call('ZREVRANGE', key, 0, 0, 'WITHSCORES')[2]) end

local function next_version()
  if version == 0 then
    version = math.max(wall * 1000, highest(P .. ':changed'), highest(P .. ':left'))
    horizon = version
  end
  version = version + 1
  call('HSET', STATE, 'version', text(version), 'horizon', text(horizon))
  return version
end

local function touch(id) call('ZADD', P .. ':changed', text(next_version()), id) end

local function bury_in_versions(id)
  call('ZREM', P .. ':changed', id)
  call('ZADD', P .. ':left', text(next_version()), id)
  if call('ZCARD', P .. ':left') <= MAX_TOMBSTONES then return end
  local oldest = call('ZRANGE', P .. ':left', 0, 0, 'WITHSCORES')
  call('ZREM', P .. ':left', oldest[1])
  horizon = number(oldest[2])
  call('HSET', STATE, 'horizon', text(horizon))
end

-- The one place where "may lend" and "how much" are decided: keeps {pool}:free and {pool}:caps in step with the record.
-- `r`: total, reserved, local_used, lent, borrowed, state. Returns rBlocks free to lend, offered now, lent at most.
local function lendable(r)
  local cap = number(r[1]) - number(r[2])
  local free = cap - number(r[3]) - number(r[4])
  if r[6] ~= 'up' then return free, 0, 0 end
  return free, number(r[5]) == 0 and free > 0 and free or 0, cap
end
local function index(id, r)
  local _, offered, cap = lendable(
    r or call('HMGET', instance_key(id), 'total', 'reserved', 'local_used', 'lent', 'borrowed', 'state'))
  call('ZADD', P .. ':free', text(offered), id)
  call('ZADD', P .. ':caps', text(cap), id)
end

local function is_live(id, epoch)
  return call('HGET', instance_key(id), 'epoch') == epoch and number(call('ZSCORE', P .. ':leases', id)) > now
end

-- What only a registration says of a member, sealed: where somebody else has written, the member registers again.
local function seal_of(id, epoch, address, total, reserved, info)
  return table.concat({P, id, epoch, address, total, reserved, #info}, '|')
end
local function has_seal(id, epoch, address, total, reserved, info, seal)
  return seal and epoch and address and total and reserved and info
    and seal_of(id, epoch, address, total, reserved, info) == seal
end
local function is_sealed(id)
  return has_seal(id, unpack(call('HMGET', instance_key(id), 'epoch', 'address', 'total', 'reserved', 'info', 'seal')))
end

-- nil where there is none, or none that can be read.
local function read_loan(id)
  local r = call('HMGET', loan_key(id), 'debtor', 'debtor_epoch', 'creditor', 'creditor_epoch', 'num_rblocks', 'state', 'recalled')
  for i = 1, 6 do if not r[i] then return nil end end
  local num = number(r[5])
  if num < 1 or num % 1 ~= 0 or number(r[2]) < 1 or number(r[4]) < 1 then return nil end
  if r[6] ~= 'pending' and r[6] ~= 'active' then return nil end
  return {debtor = r[1], debtor_epoch = r[2], creditor = r[3], creditor_epoch = r[4], num = num, state = r[6],
    is_recalled = r[7]}
end

local SIDES = {
  [':debts:'] = {mine = 'debtor', sum = 'borrowed', other = 'creditor', others = ':credits:'},
  [':credits:'] = {mine = 'creditor', sum = 'lent', other = 'debtor', others = ':debts:'},
}

-- The loans of `id` on one side (':debts:' or ':credits:'), in order. One that cannot be read has ended.
local function loans_in(set, id, is_recount)
  local side, found, sum = SIDES[set], {}, 0
  local loans = call('SMEMBERS', P .. set .. id)
  table.sort(loans)
  for _, loan_id in ipairs(loans) do
    local loan = read_loan(loan_id)
    if loan and loan[side.mine] == id then
      loan.id = loan_id
      found[#found + 1] = loan
      sum = sum + loan.num
    else
      is_recount = true
      call('SREM', P .. set .. id, loan_id)
      if not loan then
        call('DEL', loan_key(loan_id))
        call('ZREM', P .. ':pending', loan_id)
        note('unreadable_loan', 'loan', loan_id, 'instance', id)
      end
    end
  end
  if is_recount and call('HEXISTS', instance_key(id), 'epoch') == 1 then
    call('HSET', instance_key(id), side.sum, text(sum))
    index(id)
    touch(id)
  end
  return found
end

local function loan_row(loan)
  return {loan.id, loan.debtor, loan.debtor_epoch, loan.creditor, loan.creditor_epoch, text(loan.num), loan.state}
end

local function has_terms(loan, debtor, debtor_epoch, creditor, creditor_epoch, num)
  return loan.debtor == debtor and loan.debtor_epoch == debtor_epoch and loan.creditor == creditor
    and loan.creditor_epoch == creditor_epoch and loan.num == num
end

local function why_not_fenced(debtor, debtor_epoch, creditor, creditor_epoch, num)
  if debtor == creditor or num < 1 then return 'self' end
  if not is_live(debtor, debtor_epoch) then return 'stale_debtor' end
  if not is_live(creditor, creditor_epoch) then return 'stale_creditor' end
  return nil
end

local function shift(id, field, num)
  local r = call('HMGET', instance_key(id), 'epoch', field)
  if not r[1] then return end
  call('HSET', instance_key(id), field, text(number(r[2]) + num))
  index(id)
  touch(id)
end

local function change(creditor, debtor, num)
  shift(creditor, 'lent', num)
  shift(debtor, 'borrowed', num)
end

local function add_loan(id, debtor, debtor_epoch, creditor, creditor_epoch, num, state)
  call('HSET', loan_key(id), 'debtor', debtor, 'debtor_epoch', debtor_epoch, 'creditor', creditor,
    'creditor_epoch', creditor_epoch, 'num_rblocks', text(num), 'state', state)
  call('SADD', P .. ':debts:' .. debtor, id)
  call('SADD', P .. ':credits:' .. creditor, id)
  change(creditor, debtor, num)
  note('loan', 'loan', id, 'debtor', debtor, 'creditor', creditor, 'rblocks', text(num))
end

-- Further arguments go into the event.
local function drop_loan(id, why, ...)
  local loan = read_loan(id)
  call('ZREM', P .. ':pending', id)
  if not loan then return 0 end
  call('DEL', loan_key(id))
  call('SREM', P .. ':debts:' .. loan.debtor, id)
  call('SREM', P .. ':credits:' .. loan.creditor, id)
  change(loan.creditor, loan.debtor, -loan.num)
  note(why, 'loan', id, 'debtor', loan.debtor, 'creditor', loan.creditor, 'rblocks', text(loan.num), ...)
  return loan.num
end

local function is_of_living(loan)
  return call('HGET', instance_key(loan.debtor), 'epoch') == loan.debtor_epoch
    and call('HGET', instance_key(loan.creditor), 'epoch') == loan.creditor_epoch
end

-- The same, and where one of a loan's two sides was lost it is there again; or the loan has ended with its other side.
local function loans_with_both_sides(set, id)
  local side, kept = SIDES[set], {}
  for _, loan in ipairs(loans_in(set, id)) do
    local other = loan[side.other]
    local is_alive = is_of_living(loan)
    if is_alive then kept[#kept + 1] = loan else drop_loan(loan.id, 'void') end
    if not is_alive then loans_in(set, id, true) end
    if not is_alive or call('SADD', P .. side.others .. other, loan.id) == 1 then loans_in(side.others, other, true) end
  end
  return kept
end

local function forget(id)
  call('DEL', instance_key(id), P .. ':debts:' .. id, P .. ':credits:' .. id)
end

-- Death of an instance: its debts are void, the credits of others return, and nothing of it stays.
local function bury(id, why)
  for _, set in ipairs({':debts:', ':credits:'}) do
    for _, loan in ipairs(loans_in(set, id)) do drop_loan(loan.id, 'void') end
  end
  forget(id)
  for _, key in ipairs({':leases', ':free', ':caps'}) do call('ZREM', P .. key, id) end
  bury_in_versions(id)
  note(why, 'instance', id)
end

local function expire(limit)
  local dead = call('ZRANGEBYSCORE', P .. ':leases', '-inf', now, 'LIMIT', 0, limit)
  for _, id in ipairs(dead) do bury(id, 'dead') end
  for _, id in ipairs(call('ZRANGEBYSCORE', P .. ':pending', '-inf', now, 'LIMIT', 0, limit)) do drop_loan(id, 'overdue') end
  return dead
end
-- On the way of other operations, a few; not twice in the same ms.
local function expire_a_few()
  if is_later then expire(EXPIRE_PER_CALL) end
end

local function life_of_server() return string.match(redis.call('INFO', 'server'), 'run_id:(%w+)') end

-- The name of this life of the data. Whoever begins one says on which server.
local function generation()
  if known[4] then return known[4] end
  known[4], horizon = 'g' .. text(wall), version
  call('HSET', STATE, 'generation', known[4], 'server', life_of_server(), 'horizon', text(horizon))
  return known[4]
end

-- All members are in each index, and nobody else is. Who lost one gets it back: unseen, it would be told to nobody;
-- without a lease, never end.
local function mend_indices()
  local members = call('ZCARD', P .. ':leases')
  for _, key in ipairs({':changed', ':free', ':caps'}) do
    if call('ZCARD', P .. key) ~= members then
      for _, id in ipairs(call('ZRANGE', P .. ':leases', 0, -1)) do
        if not call('ZSCORE', P .. key, id) then
          if call('HEXISTS', instance_key(id), 'epoch') == 0 then
            call('ZREM', P .. ':leases', id)
          elseif key == ':changed' then
            touch(id)
          else
            index(id)
          end
        end
      end
      for _, id in ipairs(call('ZRANGE', P .. key, 0, -1)) do
        if not call('ZSCORE', P .. ':leases', id) then
          if call('HEXISTS', instance_key(id), 'epoch') == 0 then
            call('ZREM', P .. key, id)
          else
            call('ZADD', P .. ':leases', text(now + last_lease_ms), id)
          end
        end
      end
    end
  end
end

local function sum_of(key)
  local sum, rows = 0, call('ZRANGE', key, 0, -1, 'WITHSCORES')
  for i = 2, #rows, 2 do sum = sum + number(rows[i]) end
  return sum
end

-- What all members together offer now, lend at most, and how many they are. Counted anew from time to time, and never
-- kept by differences: those would stay wrong where a key is lost.
local function pool_sums()
  local age_ms, members = now - number(known[8]), number(known[11])
  if known[8] and age_ms >= 0 and age_ms <= members * SUMS_AGE_MS_PER_MEMBER then
    return number(known[9]), number(known[10]), members
  end
  mend_indices()
  local offered, caps = sum_of(P .. ':free'), sum_of(P .. ':caps')
  members = call('ZCARD', P .. ':leases')
  call('HSET', STATE, 'counted_at', text(now), 'offered', text(offered), 'caps', text(caps), 'members', members)
  return offered, caps, members
end
