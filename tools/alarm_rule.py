#!/usr/bin/env python3
import sys

from imrcnn import main

if __name__ == "__main__":
    sys.exit(main(["alarm_rule", *sys.argv[1:]]))
