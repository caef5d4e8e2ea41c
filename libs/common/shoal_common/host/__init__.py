"""This machine: addresses, memory limits, credentials, the service manager."""
