"""Real work over the broker: every file below a directory is read by one of several processes.

    python -m examples.demo          (or: make demo)

Two producers send a message for each file. Three consumers read the files and report size and SHA-256,
as messages of a second queue. One of them is killed while it holds messages; they come back and the
others finish them. In the end every digest is compared with one that this process computes by itself:
the exit code is 1 if a file is missing, wrong or counted twice.

    DEMO_DIR        the directory (Python's standard library without site-packages)
    DEMO_DATA_DIR   where the demo's own broker keeps its data (.demo)
    BROKER_URL      a running broker to use instead of an own one; BROKER_TOKEN its token
    DEMO_FAULT      wrong, missing or twice: makes the workers do that, to see the demo notice it
"""

FILES = "demo-files"
RESULTS = "demo-results"

# How long the messages of a killed consumer are waited for: short, as nobody would in earnest.
VISIBILITY_TIMEOUT = 3.0

# What DEMO_FAULT may be.
FAULTS = ("", "wrong", "missing", "twice")
