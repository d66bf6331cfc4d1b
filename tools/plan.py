#!/usr/bin/env python3
import sys

from imrcnn import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
