"""``python -m mlx_maxfactor`` is the command ``mlx-maxfactor``."""

import sys

from .commands import main

sys.exit(main())
