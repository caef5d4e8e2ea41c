"""`shoal doctor`: what is wrong with this node and its cluster, and what to do about it.

`probes/` gathers facts, `checks/` turns the facts of one concern into findings, `run.py` runs both, all at the same
time and each under a deadline, and `render.py` prints the findings. Nothing here changes anything.
"""
