"""The commands: one module each, with its flags in `argument_parser` and its work in `main`."""
