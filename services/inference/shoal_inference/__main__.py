"""`python -m shoal_inference`"""

import sys

from shoal_common.service import main
from shoal_inference.service import run

if __name__ == "__main__":
    sys.exit(main("inference", run))
