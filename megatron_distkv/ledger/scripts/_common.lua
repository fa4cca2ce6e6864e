-- Shared by all scripts, put in front of each. The key schema is in ../keys.py.
-- KEYS[1] = prefix "{pool}"; ARGV[1] = injected time in ms ("" in production: the server's clock); arguments from ARGV[2].
local P = KEYS[1]
local call = redis.call
local EXPIRE_PER_HEARTBEAT, MAX_EVENTS = 4, 4096

local function text(number) return string.format('%.0f', number) end
local function number(value) return tonumber(value or 0) or 0 end

local function wall_clock()
  if ARGV[1] ~= '' then return tonumber(ARGV[1]) end
  local t = call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

-- The pool's own time follows the server's clock, but does not jump with it: it never goes back, and from one operation
-- to the next it goes on by half a lease at most, so that no clock that is put right ends the leases of the living.
local function pool_clock(wall)
  local seen = call('HMGET', P .. ':clock', 'wall', 'now', 'lease')
  local passed = seen[1] and math.max(0, wall - number(seen[1])) or 0
  if seen[3] then passed = math.min(passed, math.floor(number(seen[3]) / 2)) end
  local now = seen[2] and number(seen[2]) + passed or wall
  call('HSET', P .. ':clock', 'wall', text(wall), 'now', text(now))
  return now
end

local wall = wall_clock()
local now = pool_clock(wall)
local function note_lease(lease_ms) call('HSET', P .. ':clock', 'lease', lease_ms) end
local function instance_key(id) return P .. ':instance:' .. id end
local function loan_key(id) return P .. ':loan:' .. id end

local function note(event, ...)
  call('XADD', P .. ':events', 'MAXLEN', '~', MAX_EVENTS, '*', 'event', event, ...)
end

-- The one place where "may lend" and "how much" are decided: keeps {pool}:free in step with the instance's record.
local function index(id)
  local r = call('HMGET', instance_key(id), 'total', 'reserved', 'local_used', 'lent', 'borrowed', 'state')
  local free = number(r[1]) - number(r[2]) - number(r[3]) - number(r[4])
  if r[6] == 'up' and number(r[5]) == 0 and free > 0 then
    call('ZADD', P .. ':free', free, id)
  else
    call('ZREM', P .. ':free', id)
  end
  return free
end

local function is_live(id, epoch)
  return call('HGET', instance_key(id), 'epoch') == epoch and number(call('ZSCORE', P .. ':leases', id)) > now
end

local function read_loan(id)
  local r = call('HMGET', loan_key(id), 'debtor', 'debtor_epoch', 'creditor', 'creditor_epoch', 'num_rblocks', 'state')
  if not r[1] then return nil end
  return {debtor = r[1], debtor_epoch = r[2], creditor = r[3], creditor_epoch = r[4], num = number(r[5]), state = r[6]}
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

local function change(creditor, debtor, num)
  call('HINCRBY', instance_key(creditor), 'lent', num)
  call('HINCRBY', instance_key(debtor), 'borrowed', num)
  index(creditor)
  index(debtor)
end

local function add_loan(id, debtor, debtor_epoch, creditor, creditor_epoch, num, state)
  call('HSET', loan_key(id), 'debtor', debtor, 'debtor_epoch', debtor_epoch, 'creditor', creditor,
    'creditor_epoch', creditor_epoch, 'num_rblocks', text(num), 'state', state)
  call('SADD', P .. ':loans', id)
  call('SADD', P .. ':debts:' .. debtor, id)
  call('SADD', P .. ':credits:' .. creditor, id)
  change(creditor, debtor, num)
  note('loan', 'loan', id, 'debtor', debtor, 'creditor', creditor, 'rblocks', text(num))
end

local function drop_loan(id, why)
  local loan = read_loan(id)
  if not loan then return 0 end
  call('DEL', loan_key(id))
  call('SREM', P .. ':loans', id)
  call('SREM', P .. ':debts:' .. loan.debtor, id)
  call('SREM', P .. ':credits:' .. loan.creditor, id)
  call('ZREM', P .. ':pending', id)
  change(loan.creditor, loan.debtor, -loan.num)
  note(why, 'loan', id, 'debtor', loan.debtor, 'creditor', loan.creditor, 'rblocks', text(loan.num))
  return loan.num
end

-- Death of an instance: its debts are void, the credits of others return, and nothing of it stays.
local function bury(id, why)
  for _, set in ipairs({':debts:', ':credits:'}) do
    local loans = call('SMEMBERS', P .. set .. id)
    table.sort(loans)
    for _, loan in ipairs(loans) do drop_loan(loan, 'void') end
  end
  call('DEL', instance_key(id), P .. ':debts:' .. id, P .. ':credits:' .. id, P .. ':placements:' .. id, P .. ':moves:' .. id)
  call('ZREM', P .. ':leases', id)
  call('ZREM', P .. ':free', id)
  note(why, 'instance', id)
end

-- Data that another life of the server wrote (a restart from disk, a replica that took over) may lack its last writes:
-- they are dropped as if all were lost, and the instances say again what they hold. Only the events stay.
local function drop_data_of_another_server()
  local life = string.match(call('INFO', 'server'), 'run_id:(%w+)')
  local known = call('GET', P .. ':server')
  if known == life then return end
  call('SET', P .. ':server', life)
  if not known then return end
  for _, id in ipairs(call('ZRANGE', P .. ':leases', 0, -1)) do
    call('DEL', instance_key(id), P .. ':debts:' .. id, P .. ':credits:' .. id, P .. ':placements:' .. id, P .. ':moves:' .. id)
  end
  for _, id in ipairs(call('SMEMBERS', P .. ':loans')) do call('DEL', loan_key(id)) end
  for _, key in ipairs({':generation', ':epoch', ':leases', ':free', ':loans', ':pending', ':leader'}) do call('DEL', P .. key) end
  note('rebuild')
end

local function expire(limit)
  local dead = call('ZRANGEBYSCORE', P .. ':leases', '-inf', now, 'LIMIT', 0, limit)
  for _, id in ipairs(dead) do bury(id, 'dead') end
  for _, id in ipairs(call('ZRANGEBYSCORE', P .. ':pending', '-inf', now, 'LIMIT', 0, limit)) do drop_loan(id, 'overdue') end
  return dead
end
