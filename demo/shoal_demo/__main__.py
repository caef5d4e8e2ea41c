"""`python -m shoal_demo`, which is `shoal demo`."""

import sys

from shoal_demo.demo import main

if __name__ == "__main__":
    sys.exit(main())
