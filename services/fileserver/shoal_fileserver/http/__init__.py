"""HTTP for byte ranges: connections, their limits, the bytes themselves."""
