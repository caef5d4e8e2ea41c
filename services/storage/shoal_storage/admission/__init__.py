"""Approve or reject bytes before they arrive; expire what was reserved."""
