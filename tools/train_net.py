#!/usr/bin/env python3
from imrcnn_d2.cli.train import main
from imrcnn_d2.engine import launch_script

if __name__ == "__main__":
    launch_script(main)
