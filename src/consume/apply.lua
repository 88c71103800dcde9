#!lua
-- Applies one batch of one partition together with its offset, or nothing at all.
--
-- KEYS[1]  hash of the board: generation, topic, and one `offset:<partition>` a partition
-- ARGV     generation, partition, offset that the batch builds on ("" for none), next offset, then the counts
-- Returns  {1} when applied, else {0, stored generation, stored offset}, absent ones as ""
--
-- The first line makes Redis refuse the script before it starts when memory is full. All keys lie in the hash
-- slot of KEYS[1], whose name is in braces.
local main, generation, field = KEYS[1], ARGV[1], 'offset:' .. ARGV[2]
local stored = redis.call('HMGET', main, 'generation', field)
if (stored[1] or '') ~= generation or (stored[2] or '') ~= ARGV[3] then
  return {0, stored[1] or '', stored[2] or ''}
end
redis.call('HSET', main, field, ARGV[4])

local at = 4
local function take()
  at = at + 1
  return ARGV[at]
end

-- Compares bytes: `<` on strings follows the server's locale.
local function before(a, b)
  for i = 1, math.min(#a, #b) do
    local x, y = a:byte(i), b:byte(i)
    if x ~= y then return x < y end
  end
  return #a < #b
end

local prefix = main .. ':' .. generation .. ':'

for _ = 1, tonumber(take()) do
  local key = prefix .. 'content:' .. take()
  local id, title, kind, expires = take(), take(), take(), take()
  local known = redis.call('HGET', key, 'id')
  if not known or before(known, id) then
    redis.call('HSET', key, 'id', id, 'title', title, 'content_type', kind)
  end
  -- A key without expiry counts as one that never expires, which GT would leave so.
  if known then
    redis.call('EXPIREAT', key, expires, 'GT')
  else
    redis.call('EXPIREAT', key, expires)
  end
end

for _ = 1, tonumber(take()) do
  local bucket, expires = prefix .. take() .. ':', take()
  local contents = tonumber(take())
  for _ = 1, contents do
    local content = take()
    redis.call('ZINCRBY', bucket .. 'millis', take(), content)
    redis.call('ZINCRBY', bucket .. 'events', take(), content)
    local users, key = tonumber(take()), bucket .. 'users:' .. content
    -- Lua passes at most some 8000 arguments at once.
    while users > 0 do
      local n = math.min(users, 5000)
      if redis.call('PFADD', key, unpack(ARGV, at + 1, at + n)) == 1 then
        redis.call('EXPIREAT', key, expires)
      end
      at, users = at + n, users - n
    end
  end
  local devices = tonumber(take())
  for _ = 1, devices do
    local device = take()
    redis.call('ZINCRBY', bucket .. 'devices', take(), device)
    redis.call('ZADD', bucket .. 'last', 'GT', take(), device)
  end
  local late, future = take(), take()
  if late ~= '0' then redis.call('HINCRBY', bucket .. 'dropped', 'late', late) end
  if future ~= '0' then redis.call('HINCRBY', bucket .. 'dropped', 'future', future) end
  for _, kind in ipairs({'millis', 'events', 'devices', 'last', 'dropped'}) do
    redis.call('EXPIREAT', bucket .. kind, expires)
  end
end
return {1}
