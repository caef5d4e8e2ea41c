"""Requests between services and commands from people, with their replies."""
