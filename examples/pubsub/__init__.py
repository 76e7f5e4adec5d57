"""Publish-subscribe over the broker: two publishers, two subscribers that are pushed to, and a broadcast.

    python -m examples.pubsub        (or: make demo-pubsub)

Two publishers publish a message for each module of a directory, with headers for its package and its size. Two
subscribers are small HTTP servers, to which the broker pushes: `index` finds every function, `lines` counts the lines
of those modules that its filter lets through. They check signatures, and know a message that comes again by its
webhook-id. One of them is killed while it holds messages and comes back later; the other goes on meanwhile. Of a second
topic, which delivers on broadcast, both get what was published before they had subscribed.

In the end everything that they found is compared with the same work done by this process alone: the exit code is 1 if
a module is missing, wrong or handled twice, or if a forged message was taken.

    DEMO_DIR        the directory (Python's standard library without its tests and site-packages)
    DEMO_DATA_DIR   where the demo's own broker keeps its data (.demo)
    BROKER_URL      a running broker to use instead of an own one, which must have been started with
                    --webhook-allow 127.0.0.0/8; BROKER_TOKEN its token
    DEMO_FAULT      some of wrong, missing, twice and forged, with commas: makes that happen, to see the demo notice it
"""

# A message for each module; a message for each package, which waits for a broadcast.
MODULES = "demo-modules"
PACKAGES = "demo-packages"

# What DEMO_FAULT may name.
FAULTS = ("wrong", "missing", "twice", "forged")
