"""Programs that use the broker: a producer, a consumer, and two demos."""
