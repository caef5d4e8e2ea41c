"""`python -m shoal_fetcher`"""

import sys

from shoal_common.service import main
from shoal_fetcher.service import run

if __name__ == "__main__":
    sys.exit(main("fetcher", run))
