#!/usr/bin/env python3
import sys

from imrcnn_d2.cli.cross_validate import main

if __name__ == "__main__":
    sys.exit(main())
