"""`python -m posenc` is the command `posenc`."""

import sys

from posenc.commands.dispatch import main

sys.exit(main())
