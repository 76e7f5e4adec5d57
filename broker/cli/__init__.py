"""The command line: `wonderq`, a command for each thing that a person does with a broker, in a module for each noun.

Commands that talk to a broker are plain clients of it: they read BROKER_URL and BROKER_TOKEN and use `broker.client`.
Those that work on the database itself (`migrate`, `token`, a part of `doctor`) say so. A command's module is imported
when that command is called, so that `wonderq send` does not wait for what only a server needs.
"""

from broker.cli.commands import main as main

__all__ = ["main"]
