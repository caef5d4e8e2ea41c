"""Downloads: requested, running, waiting, ended."""
