"""The files of a store that more than one service reads."""
