"""Imported last by the process that others are forked from: nothing that it holds is collected or copied again."""

import gc

gc.collect()
gc.freeze()
