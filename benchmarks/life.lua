-- Whole lives of messages in a closed loop: enqueue, dequeue, delete, by single calls or in batches.
-- Options: queue, batch, bodies. Counts the messages that were deleted, as the broker says.
--
-- Whichever connection is free does what is next: it deletes what was taken, else takes what was stored, else
-- stores. So there are never more messages than connections times the batch.

local common = require "common"

local ENQUEUE, DEQUEUE, DELETE = 1, 2, 3
local options, next_body
local receipts, stored = {}, 0

function init(arguments)
   options = common.options(arguments)
   next_body = common.bodies(options.bodies)
end

function request()
   if #receipts >= options.batch then
      return common.delete(DELETE, receipts, options.batch)
   elseif stored >= options.batch then
      stored = stored - options.batch
      return common.dequeue(DEQUEUE, options.queue, options.batch)
   end
   return common.enqueue(ENQUEUE, options.queue, next_body, options.batch)
end

function response(status, _, body)
   local id = common.judge(status, body)
   if id == ENQUEUE then
      stored = stored + common.count(body, '"message_id":')
   elseif id == DEQUEUE then
      -- What it did not get still lies there.
      stored = stored + options.batch - common.take_receipts(body, receipts)
   elseif id == DELETE then
      local deleted = common.count(body, '"deleted":true')
      completed = completed + deleted
      if deleted < options.batch then
         common.refuse(status, body)
      end
   end
end
