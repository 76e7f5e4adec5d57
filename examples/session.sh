#!/bin/sh
# The life of a message, and publish-subscribe, with nothing but curl: sh examples/session.sh
set -eu
BROKER_URL=${BROKER_URL:-http://127.0.0.1:8080}

call() {
    answer=$(curl -sS --max-time 60 -H 'Content-Type: application/json' ${BROKER_TOKEN:+-H "Authorization: Bearer $BROKER_TOKEN"} \
        --data "$1" "$BROKER_URL/rpc")
    printf '%s\n' "$answer"
    case $answer in '{'*'"result":'*) ;; *) return 1 ;; esac
}

echo 'A queue. Asked for again, it is left as it is.'
call '{"jsonrpc":"2.0","id":1,"method":"create_queue","params":{"queue":"letters","visibility_timeout":30}}'

echo 'A producer sends a message. It is committed before the answer comes.'
call '{"jsonrpc":"2.0","id":2,"method":"enqueue","params":{"queue":"letters","body":{"hello":"world"},"sender":"shell"}}'

echo 'A consumer takes it, waiting up to 20 seconds for one. For 30 seconds nobody else gets it.'
delivery=$(call '{"jsonrpc":"2.0","id":3,"method":"dequeue","params":{"queue":"letters","wait":20}}')
printf '%s\n' "$delivery"
receipt=$(printf '%s\n' "$delivery" | sed -n 's/.*"receipt": *"\([^"]*\)".*/\1/p')

echo 'The work takes longer: five minutes from now.'
call '{"jsonrpc":"2.0","id":4,"method":"extend_visibility","params":{"receipt":"'"$receipt"'","visibility_timeout":300}}'

echo 'The work is done.'
call '{"jsonrpc":"2.0","id":5,"method":"delete","params":{"receipt":"'"$receipt"'"}}'

echo 'What lies in the queue now.'
call '{"jsonrpc":"2.0","id":6,"method":"count_messages","params":{"queue":"letters"}}'

echo 'A topic: each queue that subscribes gets a copy of what is published, if its filter lets it through.'
call '{"jsonrpc":"2.0","id":7,"method":"create_topic","params":{"topic":"news"}}'
subscription='"topic":"news","name":"reader","queue":"letters","filter":{"kind":["sports","weather"]}'
call '{"jsonrpc":"2.0","id":8,"method":"subscribe","params":{'"$subscription"'}}'

echo 'One copy was made. It is a message like any other; this consumer takes it at most once, and need not delete it.'
message='"topic":"news","body":{"rain":true},"headers":{"kind":"weather"}'
call '{"jsonrpc":"2.0","id":9,"method":"publish","params":{'"$message"'}}'
call '{"jsonrpc":"2.0","id":10,"method":"dequeue","params":{"queue":"letters","wait":20,"delivery":"at_most_once"}}'

echo 'Whoever has heard no answer sends again. Under a key the message is stored once: the second is a duplicate.'
order='"queue":"letters","body":{"order":7},"idempotency_key":"order-7-'$(date +%s%N)'"'
call '{"jsonrpc":"2.0","id":11,"method":"enqueue","params":{'"$order"'}}'
call '{"jsonrpc":"2.0","id":12,"method":"enqueue","params":{'"$order"'}}'

echo 'Work that failed is given back, to come again in a tenth of a second, and is taken once more.'
delivery=$(call '{"jsonrpc":"2.0","id":13,"method":"dequeue","params":{"queue":"letters","wait":20}}')
printf '%s\n' "$delivery"
receipt=$(printf '%s\n' "$delivery" | sed -n 's/.*"receipt": *"\([^"]*\)".*/\1/p')
call '{"jsonrpc":"2.0","id":14,"method":"extend_visibility","params":{"receipt":"'"$receipt"'","visibility_timeout":0.1}}'
delivery=$(call '{"jsonrpc":"2.0","id":15,"method":"dequeue","params":{"queue":"letters","wait":20}}')
printf '%s\n' "$delivery"
receipt=$(printf '%s\n' "$delivery" | sed -n 's/.*"receipt": *"\([^"]*\)".*/\1/p')

echo 'This time it is done.'
call '{"jsonrpc":"2.0","id":16,"method":"delete","params":{"receipt":"'"$receipt"'"}}'
