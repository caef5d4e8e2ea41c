"""Running a node on this machine: the supervisor behind `shoal up`."""
