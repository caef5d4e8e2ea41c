"""One module per verb: its options, what it asks for, and what it prints."""
