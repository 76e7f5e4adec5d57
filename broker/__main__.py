"""`python -m broker`: the same as the console script `wonderq`."""

from broker.cli import main

main()
