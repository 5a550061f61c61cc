"""Arbitrary bytes against everything that reads what strangers wrote: `python -m tests.fuzz`."""
