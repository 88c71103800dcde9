#!lua flags=allow-oom
-- Reads the board at one moment. Not flagged no-writes, since to Redis PFCOUNT is a write; it works in full memory.
--
-- KEYS[1]  hash of the board
-- ARGV     first bucket, last bucket, how many contents
-- Returns  {contents, devices, late, future}; a content is {id, millis, events, users, title, content_type}, a
--          device {name, events, last use in microseconds}. Texts that may be NULL are "" or have "=" before them.
local main, first, last, top = KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local generation = redis.call('HGET', main, 'generation')
if not generation then return {{}, {}, '0', '0'} end
local prefix = main .. ':' .. generation .. ':'

local function keys(kind)
  local names = {}
  for bucket = first, last do names[#names + 1] = prefix .. string.format('%.0f', bucket) .. ':' .. kind end
  return names
end

local function union(kind, aggregate)
  local names = keys(kind)
  names[#names + 1] = 'AGGREGATE'
  names[#names + 1] = aggregate
  names[#names + 1] = 'WITHSCORES'
  return redis.call('ZUNION', last - first + 1, unpack(names))
end

-- Compares bytes: `<` on strings follows the server's locale.
local function before(a, b)
  for i = 1, math.min(#a, #b) do
    local x, y = a:byte(i), b:byte(i)
    if x ~= y then return x < y end
  end
  return #a < #b
end

-- The union is ordered by score: the best stand at its end. All that tie with the last of them stay candidates,
-- since the number of events decides between these.
local function candidates()
  local sums, found, ids = union('millis', 'SUM'), {}, {}
  for i = #sums - 1, 1, -2 do
    local millis = tonumber(sums[i + 1])
    if #found >= top and millis < found[#found].millis then break end
    found[#found + 1] = {id = sums[i], millis = millis, events = 0}
    ids[#ids + 1] = sums[i]
  end
  return found, ids
end

local function count_events(found, ids)
  for _, key in ipairs(keys('events')) do
    for start = 1, #ids, 5000 do
      local stop = math.min(start + 4999, #ids)
      local counts = redis.call('ZMSCORE', key, unpack(ids, start, stop))
      for i = start, stop do
        found[i].events = found[i].events + tonumber(counts[i - start + 1] or 0)
      end
    end
  end
end

local function contents()
  if top < 1 then return {} end
  local found, ids = candidates()
  count_events(found, ids)
  table.sort(found, function(a, b)
    if a.millis ~= b.millis then return a.millis > b.millis end
    if a.events ~= b.events then return a.events > b.events end
    return before(a.id, b.id)
  end)
  local rows = {}
  for i = 1, math.min(top, #found) do
    local c = found[i]
    local users = redis.call('PFCOUNT', unpack(keys('users:' .. c.id)))
    local named = redis.call('HMGET', prefix .. 'content:' .. c.id, 'title', 'content_type')
    rows[i] = {c.id, string.format('%.0f', c.millis), string.format('%.0f', c.events), users, named[1] or '', named[2] or ''}
  end
  return rows
end

local function devices()
  local uses = {}
  local times = union('last', 'MAX')
  for i = 1, #times, 2 do uses[times[i]] = times[i + 1] end
  local rows, sums = {}, union('devices', 'SUM')
  for i = 1, #sums, 2 do rows[#rows + 1] = {sums[i], sums[i + 1], uses[sums[i]]} end
  return rows
end

local late, future = 0, 0
for _, key in ipairs(keys('dropped')) do
  local counts = redis.call('HMGET', key, 'late', 'future')
  late, future = late + (counts[1] or 0), future + (counts[2] or 0)
end
return {contents(), devices(), string.format('%.0f', late), string.format('%.0f', future)}
