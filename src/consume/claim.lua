#!lua
-- Says where each partition stands. With a topic id it begins a new, empty generation when there is none, when the
-- topic was made anew, or when the caller asks to give up the generation that it saw.
--
-- KEYS[1]  hash of the board
-- ARGV     topic id ("" to look only), generation to give up ("" for none)
-- Returns  {topic id before this call or "", fields of the hash}
local main, topic = KEYS[1], ARGV[1]
local stored = redis.call('HMGET', main, 'generation', 'topic')
local generation, before = stored[1], stored[2] or ''
if topic ~= '' and (not generation or before ~= topic or generation == ARGV[2]) then
  -- By the clock, so that no generation's keys are met again even when this hash alone was deleted.
  local now = redis.call('TIME')
  generation = now[1] .. string.format('%06d', now[2])
  redis.call('DEL', main)
  redis.call('HSET', main, 'generation', generation, 'topic', topic)
end
return {before, redis.call('HGETALL', main)}
