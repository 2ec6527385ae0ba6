"""The registry's schema, step by step. Append-only: a released version is never edited.

A new version adds ``versions/vNNNN_what.py`` and raises ``database.SCHEMA_VERSION`` to NNNN.
"""
