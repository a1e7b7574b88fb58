"""`python -m mobilenets_zoo` is the command `mobilenets-zoo`."""

from mobilenets_zoo.cli import main

main()
