"""The page for operators: how a queue stands, lists of its requests, plots, one request in full, search, and retry.

Needs the extra ``web`` (Flask, Jinja2, waitress). Every page is complete without a script; nothing is built.
"""
