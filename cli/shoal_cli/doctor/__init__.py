"""`shoal doctor`: what is wrong with this node and its cluster, and what to do about it.

Modules here are pure: each has the facts of one concern and says what they mean, as findings. `look/` gathers the
facts, `examine.py` puts both together, all at the same time, each under a deadline. Nothing here changes anything.
"""
