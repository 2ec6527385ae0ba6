"""``python -m moectl``."""

import sys

from moectl.cli.app import main

sys.exit(main())
