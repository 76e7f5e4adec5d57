from conftest import Broker


async def test_a_message_goes_through_its_life(broker: Broker) -> None:
    sent = await broker.call("enqueue", body={"hello": "world"}, headers={"a": "b"}, sender="me")
    taken = await broker.call("dequeue")
    (message,) = taken["messages"]
    assert message["message_id"] == sent["message_id"]
    assert message["body"] == {"hello": "world"}
    assert message["headers"] == {"a": "b"}
    assert message["sender"] == "me"
    assert message["receive_count"] == 1
    assert await broker.call("delete", receipt=message["receipt"]) == {"deleted": True}
    assert await broker.call("delete", receipt=message["receipt"]) == {"deleted": False}
