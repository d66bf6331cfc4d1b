#!/usr/bin/env python3
from imrcnn_d2.cli.train import main

if __name__ == "__main__":
    main()
