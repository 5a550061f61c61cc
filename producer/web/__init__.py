"""The page for operators: how a queue stands, what failed and why, one request in full, search, and retry.

Needs the extra ``web`` (Flask, Jinja2, waitress). Every page is complete without a script; nothing is built.
"""
