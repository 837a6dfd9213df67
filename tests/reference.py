import sys

from mlx_maxfactor import reference

sys.modules[__name__] = reference
