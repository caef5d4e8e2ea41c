"""`python -m shoal_fileserver`"""

import sys

from shoal_common.service import main
from shoal_fileserver.service import run

if __name__ == "__main__":
    sys.exit(main("fileserver", run))
