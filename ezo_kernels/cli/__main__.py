"""``python -m ezo_kernels.cli``: the same as ``ezo``."""

import sys

from . import main

sys.exit(main())
