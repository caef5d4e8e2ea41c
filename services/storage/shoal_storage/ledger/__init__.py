"""What the disk holds, in memory, and which blob is needed by what."""
