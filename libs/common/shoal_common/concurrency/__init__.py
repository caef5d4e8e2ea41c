"""What asyncio leaves to its users: cancellation, back-off, shared calls, waiting for a change."""
