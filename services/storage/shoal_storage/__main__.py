"""`python -m shoal_storage`"""

import sys

from shoal_common.service import main
from shoal_storage.service import run

if __name__ == "__main__":
    sys.exit(main("storage", run))
