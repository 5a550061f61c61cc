"""The local exchange that `python -m worker sandbox` and the tests use: a book, its faults, a loopback server."""
