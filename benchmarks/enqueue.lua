-- Store messages, one a call or `batch` of them, in turn in each of `queues` queues: queue0, queue1, …
-- Options: queue, queues, batch, bodies. Counts the messages whose storing was acknowledged.

local common = require "common"

local options, next_body, turn = nil, nil, 0

function init(arguments)
   options = common.options(arguments)
   next_body = common.bodies(options.bodies)
end

function request()
   local queue = options.queue
   if options.queues > 1 then
      queue = queue .. turn
      turn = (turn + 1) % options.queues
   end
   return common.enqueue(1, queue, next_body, options.batch)
end

function response(status, _, body)
   if common.judge(status, body) then
      local stored = common.count(body, '"message_id":')
      if stored == options.batch then
         completed = completed + stored
      else
         common.refuse(status, body)
      end
   end
end
