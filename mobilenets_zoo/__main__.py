"""`python -m mobilenets_zoo` is the command `mobilenets-zoo`."""

from mobilenets_zoo_cli import main

main()
