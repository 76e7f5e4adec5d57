-- What the scripts for wrk share: bodies, calls of the broker, and the judging of its answers.
--
-- wrk runs a script once in each of its threads; its globals are that thread's, and `done` adds them up.
-- Options stand behind `--` as name=value. An answer that is an error counts as `refused`, and as nothing else.

local common = {}

completed, calls, refused, refusal = 0, 0, 0, ""

local threads = {}
-- The field of a request's head that says who calls, where the option `token` was given.
local authorization = ""

function setup(thread)
   table.insert(threads, thread)
end

-- Return the options; each is a string, or a number where it looks like one.
function common.options(arguments)
   local options = {}
   for _, argument in ipairs(arguments) do
      local name, value = argument:match("^([%w_]+)=(.*)$")
      options[name] = tonumber(value) or value
   end
   if options.token then
      authorization = "\r\nAuthorization: Bearer " .. options.token
   end
   return options
end

-- Read the bodies, one JSON string a line; return a function that returns another one with each call.
function common.bodies(path)
   local lines, n = {}, 0
   for line in io.lines(path) do
      lines[#lines + 1] = line
   end
   return function()
      n = n % #lines + 1
      return lines[n]
   end
end

-- Return a request that calls a method; its answer bears `id`, one digit.
function common.call(id, method, params)
   local body = '{"jsonrpc":"2.0","id":' .. id .. ',"method":"' .. method .. '","params":{' .. params .. "}}"
   return "POST /rpc HTTP/1.1\r\nHost: " .. wrk.headers["Host"] ..
      "\r\nContent-Type: application/json\r\nContent-Length: " .. #body .. authorization .. "\r\n\r\n" .. body
end

-- A call that stores `batch` messages.
function common.enqueue(id, queue, next_body, batch)
   if batch == 1 then
      return common.call(id, "enqueue", '"queue":"' .. queue .. '","body":' .. next_body())
   end
   local messages = {}
   for i = 1, batch do
      messages[i] = '{"body":' .. next_body() .. "}"
   end
   return common.call(id, "enqueue_batch", '"queue":"' .. queue .. '","messages":[' .. table.concat(messages, ",") .. "]")
end

-- A call that takes up to `batch` messages, and waits `wait` seconds for one.
function common.dequeue(id, queue, batch, wait)
   return common.call(
      id, "dequeue", '"queue":"' .. queue .. '","max_messages":' .. batch .. (wait and ',"wait":' .. wait or "")
   )
end

-- A call that deletes what up to `batch` of these receipts name, which are removed from the list.
function common.delete(id, receipts, batch)
   if batch == 1 then
      return common.call(id, "delete", '"receipt":"' .. table.remove(receipts) .. '"')
   end
   local chosen = {}
   for i = 1, math.min(batch, #receipts) do
      chosen[i] = '"' .. table.remove(receipts) .. '"'
   end
   return common.call(id, "delete_batch", '"receipts":[' .. table.concat(chosen, ",") .. "]")
end

-- Return how often a text stands in another.
function common.count(text, what)
   local count, at = 0, 1
   while true do
      local first, last = text:find(what, at, true)
      if not first then
         return count
      end
      count, at = count + 1, last + 1
   end
end

-- Append the receipts in an answer of dequeue; return how many.
function common.take_receipts(body, receipts)
   local before = #receipts
   for receipt in body:gmatch('"receipt":"([^"]+)"') do
      receipts[#receipts + 1] = receipt
   end
   return #receipts - before
end

-- Note that what was asked for was not done.
function common.refuse(status, body)
   refused = refused + 1
   if refusal == "" then
      refusal = status .. " " .. body:sub(1, 200)
   end
end

-- Return the id of an answer that is no error, else nil. (An `error` of one element of a batch is one, too.)
function common.judge(status, body)
   calls = calls + 1
   if status == 200 and body:find('"result":', 1, true) and not body:find('"error":', 1, true) then
      local id = body:match('"id":(%d)', -12) or body:match('"id":(%d)')
      if id then
         return tonumber(id)
      end
   end
   common.refuse(status, body)
end

function done(summary, latency, requests)
   local sum = { completed = 0, calls = 0, refused = 0 }
   local text = ""
   for _, thread in ipairs(threads) do
      for name, value in pairs(sum) do
         sum[name] = value + thread:get(name)
      end
      text = text ~= "" and text or thread:get("refusal")
   end
   -- The last line of the output. Latencies are microseconds, as wrk has them.
   io.write(string.format(
      "\ncompleted=%d calls=%d refused=%d connect=%d read=%d write=%d timeout=%d microseconds=%d p50=%d p99=%d max=%d refusal=%s\n",
      sum.completed, sum.calls, sum.refused, summary.errors.connect, summary.errors.read, summary.errors.write,
      summary.errors.timeout, summary.duration, latency:percentile(50), latency:percentile(99), latency.max,
      (text:gsub("%s+", " "))
   ))
end

return common
