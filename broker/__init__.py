"""WonderQ: a message broker on PostgreSQL, spoken to as JSON-RPC 2.0 over HTTP."""

__version__ = "0.1.0"
