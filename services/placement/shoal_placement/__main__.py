"""`python -m shoal_placement`"""

import sys

from shoal_common.service import main
from shoal_placement.service import run

if __name__ == "__main__":
    sys.exit(main("placement", run))
