#!lua flags=no-writes,allow-oom
-- Reads what one bucket counts, together with where the board stands at that moment.
--
-- KEYS[1]  hash of the board
-- ARGV     bucket
-- Returns  {fields of the hash, millis, events, devices, last, dropped}; the first and the last are fields and values, the
--          others members and scores
local main = KEYS[1]
local answer = {redis.call('HGETALL', main)}
local generation = redis.call('HGET', main, 'generation') or ''
local bucket = main .. ':' .. generation .. ':' .. ARGV[1] .. ':'
for _, kind in ipairs({'millis', 'events', 'devices', 'last'}) do
  answer[#answer + 1] = redis.call('ZRANGE', bucket .. kind, 0, -1, 'WITHSCORES')
end
answer[#answer + 1] = redis.call('HGETALL', bucket .. 'dropped')
return answer
