"""``python -m moefx.cli``."""

import sys

from moefx.cli import main

sys.exit(main())
