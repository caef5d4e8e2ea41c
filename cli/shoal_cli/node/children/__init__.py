"""The supervisor's child processes: how each is started, watched, restarted and ended."""
