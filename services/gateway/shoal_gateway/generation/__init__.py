"""Chat completions: choose an instance, stream its tokens."""
