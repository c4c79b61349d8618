"""The result tables of README.md and docs/, one file a subject; make_tables.py lists them all."""
