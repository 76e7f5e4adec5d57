-- Many consumers that wait on one queue, and producers that keep `in_system` messages on their way.
-- Options: queue, producers, in_system, bodies. Counts the messages that were deleted, as the broker says.
--
-- A connection that is free deletes what was taken; or stores, as long as less than `in_system` messages are
-- under way and less than `producers` connections store; or waits for a message.

local common = require "common"

local ENQUEUE, DEQUEUE, DELETE = 1, 2, 3
local options, next_body
local receipts, in_system, producing = {}, 0, 0

function init(arguments)
   options = common.options(arguments)
   next_body = common.bodies(options.bodies)
end

function request()
   if #receipts > 0 then
      return common.delete(DELETE, receipts, 1)
   elseif producing < options.producers and in_system < options.in_system then
      producing, in_system = producing + 1, in_system + 1
      return common.enqueue(ENQUEUE, options.queue, next_body, 1)
   end
   return common.dequeue(DEQUEUE, options.queue, 1, 20)
end

function response(status, _, body)
   local id = common.judge(status, body)
   if id == ENQUEUE then
      producing = producing - 1
   elseif id == DEQUEUE then
      common.take_receipts(body, receipts)
   elseif id == DELETE then
      in_system = in_system - 1
      if body:find('"deleted":true', 1, true) then
         completed = completed + 1
      else
         common.refuse(status, body)
      end
   end
end
