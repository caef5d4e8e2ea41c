"""`python -m shoal_gateway`"""

import sys

from shoal_common.service import main
from shoal_gateway.service import run

if __name__ == "__main__":
    sys.exit(main("gateway", run))
