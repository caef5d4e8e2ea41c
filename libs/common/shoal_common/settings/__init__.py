"""Settings: each is declared once, and what reads, changes, shows or documents it follows from the declaration.

docs/settings.md lists them and says how one is added.
"""
