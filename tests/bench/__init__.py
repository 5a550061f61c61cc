"""How fast the project is, beside stock RQ and a bare floor, in one run on one machine: `python -m tests.bench`."""
