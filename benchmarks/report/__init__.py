"""The tables and pictures of README and docs, made from files in the repository by benchmarks/tables.py."""
