"""Set before torch is loaded: threads that wait for each other must not spin while something else wants the core."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")
