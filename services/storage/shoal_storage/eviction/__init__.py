"""Free space: the plan, its execution, and a disk that is full."""
