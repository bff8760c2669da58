"""``python -m moefast``: the ``moefast`` command."""

import sys

from .cli import main

sys.exit(main())
